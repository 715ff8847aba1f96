# SPDX-License-Identifier: Apache-2.0
"""Type aliases for plain data (JSON, YAML, keyword arguments) whose exact types only its reader knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

JsonObject = dict[str, Any]
"""An object of a JSON file, or a section of a YAML file."""
JsonMapping = Mapping[str, Any]
"""A `JsonObject` that is only read."""
Options = Mapping[str, Any]
"""Keyword arguments for a library, as written in a spec."""
Plain = Any
"""A value that JSON can hold: None, a bool, a number, a string, or a list or object of such values."""
