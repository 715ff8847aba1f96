# SPDX-License-Identifier: Apache-2.0
"""Names for plain data, whose types only its reader knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

JsonObject = dict[str, Any]
"""An object of a JSON file, or a section of a YAML file."""
JsonMapping = Mapping[str, Any]
"""The same, read only."""
Options = Mapping[str, Any]
"""Arguments of a library, as a spec gives them."""
Plain = Any
"""A plain value: None, a bool, a number, a text, or a list or object of such."""
