# SPDX-License-Identifier: Apache-2.0
"""The quantization core: spec -> plan -> backend. Independent of the tasks."""
