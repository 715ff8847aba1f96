# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs: read, write, look at, quantize, measure."""
