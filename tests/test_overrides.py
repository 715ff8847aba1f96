"""Overrides mean what they mean in Hydra, which parses the command lines of TAO."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from taoq.spec.hydra import NotHydraError, parse_value
from taoq.spec.source import read_spec, source_of

VALUES: dict[str, Any] = {
    "": "",
    " x ": "x",
    "a b": "a b",
    "null": None,
    "NULL": None,
    "null x": "null x",
    "true": True,
    "False": False,
    "yes": "yes",
    "12": 12,
    "+5": 5,
    "1_000": 1000,
    "012": "012",
    "0x10": "0x10",
    "1e-3": 0.001,
    ".5": 0.5,
    "5.": 5.0,
    "e5": "e5",
    "12:30": "12:30",
    "a: b": "a: b",
    "/data/a-b_c+d@e%f?g|h.pth": "/data/a-b_c+d@e%f?g|h.pth",
    "*.fc": "*.fc",
    "'a b'": "a b",
    '"a, b"': "a, b",
    "'null'": "null",
    r"'it\'s'": "it's",
    r'"a\"b"': 'a"b',
    r"'a\\'": "a\\",
    r"'a\nb'": r"a\nb",
    r"a\,b\=c": "a,b=c",
    r"a\b": r"a\b",
    "${results_dir}/x": "${results_dir}/x",
    "'${results_dir}/x'": "${results_dir}/x",
    "[]": [],
    "[ ]": [],
    "[a]": ["a"],
    "[a b, 'c,d' ,1,null]": ["a b", "c,d", 1, None],
    "[*fc*,BatchNorm2d]": ["*fc*", "BatchNorm2d"],
    "[${oc.env:HOME},[b]]": ["${oc.env:HOME}", ["b"]],
    "{}": {},
    "{image_dir:/data,json_file:a.json}": {"image_dir": "/data", "json_file": "a.json"},
    "{a b: x:y, c: {d: [1, 2]}}": {"a b": "x:y", "c": {"d": [1, 2]}},
    "{1: x, false: y}": {1: "x", False: "y"},
    "[{module_name:*,weights:{dtype:int8}},{module_name:fc,weights:null}]": [
        {"module_name": "*", "weights": {"dtype": "int8"}},
        {"module_name": "fc", "weights": None},
    ],
}
"""What hydra-core 1.3.8 makes of the value of an override."""
NOT_HYDRA = (
    "[a,]", "[a,,b]", "[a", "a]", "{a}", "{a:}", "{'a':1}", '{"a": 1}', "a,b", "a=b", "f(x)", "é", "a'b", '"x"y',
    "${a", "!x", "a#b",
)  # fmt: skip
"""Values that hydra-core 1.3.8 refuses."""


@pytest.mark.parametrize("text", VALUES)
def test_a_value_means_what_it_means_in_hydra(text: str) -> None:
    value = parse_value(text)
    assert (value, type(value)) == (VALUES[text], type(VALUES[text]))


@pytest.mark.parametrize("text", NOT_HYDRA)
def test_a_value_that_hydra_refuses_is_not_in_the_grammar(text: str) -> None:
    with pytest.raises(NotHydraError):
        parse_value(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a,b", "a,b"),
        ("a=b", "a=b"),
        ("/data/model (1).pth", "/data/model (1).pth"),
        ("Bäume", "Bäume"),
        ("/data/run #1", "/data/run #1"),
        ("~/model.pth", "~/model.pth"),
        ('{"a": [1, "x"]}', {"a": [1, "x"]}),
        ("'it''s'", "it's"),
    ],
)
def test_a_value_that_hydra_refuses_is_a_text_or_yaml(text: str, value: object) -> None:
    assert source_of({}, [f"key={text}"]).data.key == value


SPEC = """\
device: cuda
names: [a, b]
rules:
  - {name: fc, dtype: int8}
arguments: {x: 1}
empty: null
"""
DATA: dict[str, Any] = {
    "device": "cuda",
    "names": ["a", "b"],
    "rules": [{"name": "fc", "dtype": "int8"}],
    "arguments": {"x": 1},
    "empty": None,
}


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in DATA.items() if key not in keys}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["device=cpu"], DATA | {"device": "cpu"}),
        (["++device=cpu"], DATA | {"device": "cpu"}),
        (["device=null"], DATA | {"device": None}),
        (["device="], DATA | {"device": ""}),
        (["++seed=3"], DATA | {"seed": 3}),
        (["+seed=3"], DATA | {"seed": 3}),
        (["seed=3"], DATA | {"seed": 3}),
        (["+empty=3"], DATA | {"empty": 3}),
        (["+empty.a.b=3"], DATA | {"empty": {"a": {"b": 3}}}),
        (["+arguments.y=2"], DATA | {"arguments": {"x": 1, "y": 2}}),
        (["arguments={y:2}"], DATA | {"arguments": {"x": 1, "y": 2}}),
        (["+arguments={y:2}"], DATA | {"arguments": {"x": 1, "y": 2}}),
        (["names=[c]"], DATA | {"names": ["c"]}),
        (["++names=[c]"], DATA | {"names": ["c"]}),
        (["names.1=c"], DATA | {"names": ["a", "c"]}),
        (["rules.0.name=*"], DATA | {"rules": [{"name": "*", "dtype": "int8"}]}),
        (["rules[0].name=*"], DATA | {"rules": [{"name": "*", "dtype": "int8"}]}),
        (["~device"], without("device")),
        (["~device=cuda"], without("device")),
        (["~arguments.x"], DATA | {"arguments": {}}),
        (["~rules.0"], DATA | {"rules": []}),
        (["~names.0", "names.0=c"], DATA | {"names": ["c"]}),
        (["~device", "+device=cpu"], DATA | {"device": "cpu"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_signs_add_replace_and_remove(tmp_path: Path, overrides: Sequence[str], expected: dict[str, Any]) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC)
    assert OmegaConf.to_container(read_spec(str(path), overrides).data) == expected


def test_an_override_with_a_sign_is_located() -> None:
    source = source_of({"a": {"b": [1]}}, ["++a.c=2", "~a.b.0"])
    assert source.locate("a.c") == "override ++a.c=2: a.c"
    assert source.locate("a.b[0]") == "override ~a.b.0: a.b[0]"
