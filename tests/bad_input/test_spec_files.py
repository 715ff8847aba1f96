"""A spec that is no YAML, no spec or not there, or that refers to what is not there, is refused; none of it is run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from support.small_spec import Edit, Refused


@pytest.mark.parametrize(
    ("value", "message"),
    [
        pytest.param(
            "${datset.classes}",
            "interpolation key 'datset.classes' not found\n"
            "hint: give it a value, or write the path of an existing field as ${section.field}\n",
            id="of a field that is not there",
        ),
        pytest.param(
            "${dataset.num_classes}",
            "recursive interpolation detected\n"
            "hint: give it a value, or write the path of an existing field as ${section.field}\n",
            id="of itself",
        ),
        pytest.param(
            "${dataset.img_size",
            "does not parse as an interpolation\n"
            "hint: give it a value, or write the path of an existing field as ${section.field}\n",
            id="without its end",
        ),
        pytest.param(
            "${oc.env:TAOQ_IS_NOT_SET}",
            "environment variable 'TAOQ_IS_NOT_SET' not found\n"
            "hint: give it a value, or write the path of an existing field as ${section.field}\n",
            id="of the environment",
        ),
        pytest.param(
            '${eval:\'__import__("pathlib").Path("ran").touch()\'}',
            "unsupported interpolation type eval\n"
            "hint: a spec is data: taoq runs no code from it; write the value itself\n",
            id="that is code",
        ),
    ],
)
@pytest.mark.parametrize("override", [False, True], ids=["spec", "override"])
def test_a_wrong_interpolation_is_named(edit: Edit, refused: Refused, value: str, message: str, override: bool) -> None:
    if override:
        where = f"override dataset.num_classes={value}"
        assert refused("quantize", f"dataset.num_classes={value}") == (2, f"{where}: dataset.num_classes: {message}")
    else:
        edit({"num_classes: 10": f"num_classes: {value}"})
        assert refused("quantize") == (2, f"spec.yaml:11: dataset.num_classes: {message}")
    assert not Path("ran").exists()
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"args: {channels: [16, 32, 64, 128]}": "args: {channels: [16, 32"},
            "spec.yaml:7: not valid YAML: expected ',' or ']', but got ':'\nhint: a spec is plain YAML data\n",
            id="that does not parse",
        ),
        pytest.param(
            {"    type: resnet_18": "\ttype: resnet_18"},
            "spec.yaml:5: not valid YAML: found character '\\t' that cannot start any token\n"
            "hint: a spec is plain YAML data\n",
            id="with a tab",
        ),
        pytest.param(
            {"img_size: 32": "num_classes: 11"},
            "spec.yaml:12: not valid YAML: found duplicate key num_classes\nhint: write each key once in a section\n",
            id="with a duplicate key",
        ),
        pytest.param(
            {"inference:\n": "evaluate:\n"},
            "spec.yaml:39: not valid YAML: found duplicate key evaluate\nhint: write each key once in a section\n",
            id="with a duplicate section",
        ),
        pytest.param(
            {"evaluate:\n": "---\nevaluate:\n"},
            "spec.yaml:36: not valid YAML: expected a single document in the stream, but found another document\n"
            "hint: a spec is plain YAML data\n",
            id="with two documents",
        ),
        pytest.param(
            {"num_classes: 10": "num_classes: *classes"},
            "spec.yaml:11: not valid YAML: found undefined alias 'classes'\nhint: a spec is plain YAML data\n",
            id="with an unknown alias",
        ),
        pytest.param(
            {"num_classes: 10": "num_classes: !!python/object/apply:os.system ['touch ran']"},
            "spec.yaml:11: not valid YAML:"
            " could not determine a constructor for the tag '!!python/object/apply:os.system'\n"
            "hint: a spec is plain YAML data\n",
            id="with code",
        ),
    ],
)
def test_damaged_yaml_is_refused(edit: Edit, refused: Refused, changes: Mapping[str, str], message: str) -> None:
    edit(changes)
    assert refused("quantize") == (2, message)
    assert not Path("ran").exists()
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(
            b"- quantize\n- evaluate\n",
            "spec.yaml:1: the spec is a list, not a mapping\nhint: write sections: `quantize:`, `dataset:`, ...\n",
            id="a list",
        ),
        pytest.param(
            b"quantize\n",
            "spec.yaml:1: the spec is a single value, not a mapping\n"
            "hint: write sections: `quantize:`, `dataset:`, ...\n",
            id="a scalar",
        ),
        pytest.param(
            b"!!python/object/apply:os.system ['touch ran']\n",
            "spec.yaml:1: the spec is a list, not a mapping\nhint: write sections: `quantize:`, `dataset:`, ...\n",
            id="code",
        ),
        pytest.param(
            b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
            "spec.yaml: is not a text file in UTF-8\nhint: give a YAML file with -e\n",
            id="a picture",
        ),
        pytest.param(
            b"a: \x00\n",
            "spec.yaml: not valid YAML: unacceptable character #x0000: special characters are not allowed\n"
            "hint: a spec is plain YAML data\n",
            id="with a zero byte",
        ),
        pytest.param(
            b"",
            "results_dir: missing: neither results_dir nor quantize.results_dir is set\n"
            "hint: name a folder for the results\n",
            id="empty",
        ),
    ],
)
def test_a_file_that_is_no_spec_is_refused(work: Path, refused: Refused, content: bytes, message: str) -> None:
    Path("spec.yaml").write_bytes(content)
    assert refused("quantize") == (2, message)
    assert not Path("ran").exists()
    assert not Path("results").exists()


def test_an_empty_spec_with_a_results_folder_has_no_rules(work: Path, refused: Refused) -> None:
    Path("spec.yaml").write_bytes(b"")
    assert refused("quantize", "results_dir=results") == (
        2,
        "quantize.layers: empty: nothing would be quantized\n"
        "hint: write at least one rule: {module_name: Linear, weights: {dtype: int8}}\n",
    )
    assert not Path("results").exists()


def test_a_missing_spec_is_refused(work: Path, refused: Refused) -> None:
    Path("spec.yaml").unlink()
    assert refused("quantize") == (
        2,
        "spec.yaml: cannot be read: No such file or directory\nhint: give the spec file with -e\n",
    )


def test_a_folder_as_a_spec_is_refused(work: Path, refused: Refused) -> None:
    Path("spec.yaml").unlink()
    Path("spec.yaml").mkdir()
    assert refused("quantize") == (
        2,
        "spec.yaml: cannot be read: Is a directory\nhint: give the spec file with -e\n",
    )
