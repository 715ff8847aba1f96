# SPDX-License-Identifier: Apache-2.0
"""Fill in what a parsed spec leaves out, so that interpolations can refer to it."""

from __future__ import annotations

from omegaconf import MISSING, DictConfig, OmegaConf

from taoq.plain import JsonObject, Plain
from taoq.spec.fields import is_field


def with_defaults(data: DictConfig, schema: type) -> JsonObject:
    """Return a parsed spec with the defaults of the fields that it leaves out, or that are null.

    Unlike OmegaConf.merge, it keeps `???`.
    """
    tree: JsonObject = _overlay(OmegaConf.to_container(OmegaConf.structured(schema)), OmegaConf.to_container(data))
    return tree


def imply_results_dirs(tree: JsonObject, schema: type) -> list[str]:
    """Set each empty `<section>.results_dir` to `${results_dir}/<section>`, in place.

    TAO does the same, so its users write `onnx_file: ${export.results_dir}/model.onnx`.

    Returns:
        The sections.
    """
    if tree.get("results_dir") in (None, "", MISSING):
        return []
    sections = [
        name
        for name, section in tree.items()
        if isinstance(section, dict) and section.get("results_dir") == "" and is_field(schema, f"{name}.results_dir")
    ]
    for name in sections:
        tree[name]["results_dir"] = f"${{results_dir}}/{name}"
    return sections


def _overlay(below: Plain, above: Plain) -> Plain:
    """Add to the mappings in `above` the keys that only `below` has, or that are null in `above`, recursively."""
    if above is None:
        return below
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: _overlay(below[key], value) if key in below else value for key, value in above.items()}
