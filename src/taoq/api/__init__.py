# SPDX-License-Identifier: Apache-2.0
"""The public API: the pipeline for a network or ONNX file, data loaders and a metric supplied from Python.

Each public function is defined in a module of the same name.

The functions print nothing: notices go to the logger `taoq` and into the result, and user errors are raised as
`taoq.TaoqError`. They do not modify the networks that are passed in.
"""
