# SPDX-License-Identifier: Apache-2.0
"""Where an action writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from taoq.artifact import write_text
from taoq.errors import Fault, SpecError
from taoq.spec import spec_to_dict


def results_dir(spec: Any, action: str) -> Path:
    """`<action>.results_dir`, else `<results_dir>/<action>`, as in TAO.

    Raises:
        SpecError: Neither is set.
    """
    own = getattr(spec, action).results_dir
    if own:
        return Path(own)
    if not spec.results_dir:
        what = f"missing: neither results_dir nor {action}.results_dir is set"
        raise SpecError(Fault("results_dir", what, "name a folder for the results"))
    return Path(spec.results_dir, action)


def write_experiment(spec: Any, directory: Path) -> None:
    """Keep the resolved spec as experiment.yaml, as TAO does."""
    write_text(directory / "experiment.yaml", yaml.safe_dump(spec_to_dict(spec), sort_keys=False))
