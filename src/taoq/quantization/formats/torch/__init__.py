# SPDX-License-Identifier: Apache-2.0
"""The torch model format: layers, state dicts, bias correction and measurements."""
