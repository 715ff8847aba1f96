# SPDX-License-Identifier: Apache-2.0
"""NVIDIA ModelOpt on ONNX graphs."""
