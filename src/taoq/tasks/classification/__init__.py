# SPDX-License-Identifier: Apache-2.0
"""Image classification: TAO's classification_pyt."""
