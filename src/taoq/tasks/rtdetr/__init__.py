# SPDX-License-Identifier: Apache-2.0
"""Object detection with RT-DETR: TAO's rtdetr."""
