# SPDX-License-Identifier: Apache-2.0
"""Results of the pipeline functions: frozen dataclasses with `to_json`, one module per function."""
