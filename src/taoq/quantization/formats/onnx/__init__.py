# SPDX-License-Identifier: Apache-2.0
"""The ONNX model format: files, layers, Q/DQ nodes, bias correction and measurements."""
