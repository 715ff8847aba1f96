# SPDX-License-Identifier: Apache-2.0
"""NVIDIA ModelOpt on torch networks."""
