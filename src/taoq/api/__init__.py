# SPDX-License-Identifier: Apache-2.0
"""The public API: the pipeline for the network or ONNX file, the loaders and the metric of a Python caller.

Each public function has a file of its name.

Nothing here prints. What the user should know is logged to the logger `taoq` and kept in the result. Errors are
`taoq.TaoqError`. The networks that are given are not changed.
"""
