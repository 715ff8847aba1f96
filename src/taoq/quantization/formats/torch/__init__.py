# SPDX-License-Identifier: Apache-2.0
"""Torch networks: their layers, their state, what quantization does to them."""
