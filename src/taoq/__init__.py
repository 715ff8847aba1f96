# SPDX-License-Identifier: Apache-2.0
"""taoq: quantize vision models from one YAML spec, and know what it cost."""

__version__ = "0.1.0"
