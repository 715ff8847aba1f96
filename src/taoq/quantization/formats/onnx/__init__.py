# SPDX-License-Identifier: Apache-2.0
"""The ONNX model format: files, layers, Q/DQ nodes, bias correction and measurements."""

import onnxruntime

# onnxruntime raises every error that it logs. Set here, before the first session: onnx_graphsurgeon opens some too.
onnxruntime.set_default_logger_severity(4)
