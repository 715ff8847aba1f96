"""A wrong override or command line is refused, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.commands import Taoq
from support.small_spec import Refused

ONE_GPU = "taoq runs on one GPU, which the section of the action names: device=cuda:N, in export gpu_id=N"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        pytest.param(
            "quantize.device",
            "quantize.device: an override has the form key=value\nhint: for example quantize.device=cpu\n",
            id="without a value",
        ),
        pytest.param(
            "=cpu",
            "=cpu: an override has the form key=value\nhint: for example quantize.device=cpu\n",
            id="without a key",
        ),
        pytest.param(
            "quantize.layers.7.weights.dtype=int8",
            "override quantize.layers.7.weights.dtype=int8: list index out of range\n"
            "hint: name an existing field; lists take an index, layers.0.weights.dtype\n",
            id="of a rule that is not there",
        ),
        pytest.param(
            "quantize.layers.fc.weights.dtype=int8",
            "override quantize.layers.fc.weights.dtype=int8: Index 'fc' (str) is not an int\n"
            "hint: name an existing field; lists take an index, layers.0.weights.dtype\n",
            id="of a rule by its pattern",
        ),
        pytest.param(
            "quantize.layers.1.weights.dtype=int4",
            "override quantize.layers.1.weights.dtype=int4: quantize.layers[1].weights.dtype: unknown value 'int4'\n"
            "hint: did you mean 'int8'?\n",
            id="wrong value in a rule",
        ),
        pytest.param(
            "quantize.layers=[{module_name: Linear, weights: {dtype: int4}}]",
            "override quantize.layers=[{module_name: Linear, weights: {dtype: int4}}]:"
            " quantize.layers[0].weights.dtype: unknown value 'int4'\n"
            "hint: did you mean 'int8'?\n",
            id="wrong value in a list",
        ),
        pytest.param(
            "quantize.layers=[{module_name: Linear, weights: {}}]",
            "override quantize.layers=[{module_name: Linear, weights: {}}]:"
            " quantize.layers[0].weights.dtype: missing: this field needs a value\n"
            "hint: write it in the spec, or give quantize.layers[0].weights.dtype=...\n",
            id="missing value in a list",
        ),
        pytest.param(
            "dataset={num_classes: 0}",
            "override dataset={num_classes: 0}: dataset.num_classes: 0 is less than 1\n"
            "hint: the field is: Number of classes\n",
            id="wrong value in a section",
        ),
        pytest.param(
            "quantize.devise=cpu",
            "override quantize.devise=cpu: quantize.devise: unknown field in section 'quantize'\n"
            "hint: did you mean 'device'?\n",
            id="unknown field",
        ),
        pytest.param(
            "quantise.device=cpu",
            "override quantise.device=cpu: quantise: unknown field in the spec\nhint: did you mean 'quantize'?\n",
            id="unknown section",
        ),
        pytest.param(
            "dataset.num_classes.digits=10",
            "override dataset.num_classes.digits=10: dataset.num_classes: is a section, not a single value\n"
            "hint: the field is: Number of classes\n",
            id="below a value",
        ),
        pytest.param(
            "dataset.num_classes=",
            "override dataset.num_classes=: dataset.num_classes: is empty, not a single value\n"
            "hint: the field is: Number of classes\n",
            id="empty",
        ),
        pytest.param(
            "quantize.layers=[{module_name: Linear",
            "override quantize.layers=[{module_name: Linear: not valid YAML: did not find expected ','"
            " or '}'\n"
            "hint: a spec is plain YAML data\n",
            id="that does not parse",
        ),
        pytest.param(
            "dataset.num_classes=!!python/object/apply:os.system ['touch ran']",
            "override dataset.num_classes=!!python/object/apply:os.system ['touch ran']: not valid YAML:"
            " could not determine a constructor for the tag '!!python/object/apply:os.system'\n"
            "hint: a spec is plain YAML data\n",
            id="with code",
        ),
        pytest.param(
            "+quantize.device=cuda",
            "override +quantize.device=cuda: quantize.device: the spec has it already, and + only adds\n"
            "hint: write ++quantize.device=..., which replaces it\n",
            id="adds what is there",
        ),
        pytest.param(
            "+quantize.devise=cpu",
            "override +quantize.devise=cpu: quantize.devise: unknown field in section 'quantize'\n"
            "hint: did you mean 'device'?\n",
            id="adds an unknown field",
        ),
        pytest.param(
            "+++quantize.device=cpu",
            "+++quantize.device=cpu: an override has the form key=value\nhint: for example quantize.device=cpu\n",
            id="with three signs",
        ),
        pytest.param(
            "++quantize.device",
            "++quantize.device: an override has the form key=value\nhint: for example quantize.device=cpu\n",
            id="adds without a value",
        ),
        pytest.param(
            "~quantize.strict",
            "override ~quantize.strict: quantize.strict: the spec does not have it, there is nothing to remove\n"
            "hint: leave the override out: the field has its default\n",
            id="removes what is not there",
        ),
        pytest.param(
            "~quantize.layers.7",
            "override ~quantize.layers.7: quantize.layers[7]: the spec does not have it, there is nothing to remove\n"
            "hint: leave the override out: the field has its default\n",
            id="removes a rule that is not there",
        ),
        pytest.param(
            "~quantize.device=cuda",
            "override ~quantize.device=cuda: quantize.device: is cpu, not cuda\n"
            "hint: write ~quantize.device to remove any value\n",
            id="removes another value",
        ),
        pytest.param(
            "~quantize.device=[cuda",
            "override ~quantize.device=[cuda: not valid YAML: did not find expected ',' or ']'\n"
            "hint: a spec is plain YAML data\n",
            id="removes what does not parse",
        ),
        pytest.param(
            "~quantize.layers",
            "override ~quantize.layers: quantize.layers: empty: nothing would be quantized\n"
            "hint: write at least one rule: {module_name: Linear, weights: {dtype: int8}}\n",
            id="removes what the action needs",
        ),
    ],
)
def test_a_wrong_override_is_named(work: Path, refused: Refused, override: str, message: str) -> None:
    assert refused("quantize", override) == (2, message)
    assert not Path("ran").exists()
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-e"], "argument -e/--experiment_spec_file: expected one argument\nhint: see taoq {} --help\n"),
        (["-e", ""], "no spec is given\nhint: add -e spec.yaml\n"),
        (["spec.yaml"], "no spec is given\nhint: add -e spec.yaml\n"),
        (["-e", "spec.yaml", "--fast"], "unrecognized arguments: --fast\nhint: see taoq {} --help\n"),
        (
            ["-e", "spec.yaml", "--gpus", "2"],
            f"unrecognized arguments: --gpus\nhint: {ONE_GPU}\n",
        ),
        (
            ["-e", "spec.yaml", "--num_gpus=2"],
            f"unrecognized arguments: --num_gpus=2\nhint: {ONE_GPU}\n",
        ),
        (
            ["-e", "spec.yaml", "-k", "key"],
            "unrecognized arguments: -k\nhint: taoq does not encrypt files: leave it out\n",
        ),
        (["-e", "spec.yaml", "-r", "out"], "unrecognized arguments: -r\nhint: write results_dir=FOLDER\n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_refused(taoq: Taoq, work: Path, words: list[str], message: str) -> None:
    action = "classification_pyt quantize"
    assert taoq(*action.split(), *words) == (2, "", f"{action}: {message.format(action)}")


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        pytest.param(
            "results_dir=weights.safetensors/new",
            1,
            "weights.safetensors/new: cannot be written: Not a directory\n"
            "hint: free some space, or name another folder\n",
            id="below a file",
        ),
        pytest.param(
            "results_dir=[new]",
            2,
            "override results_dir=[new]: results_dir: is a list, not a single value\n"
            "hint: the field is: Folder of all results; each action writes into a subfolder, unless its section has a"
            " results_dir\n",
            id="a list",
        ),
        pytest.param(
            "results_dir=${new}",
            2,
            "override results_dir=${new}: results_dir: interpolation key 'new' not found\n"
            "hint: give it a value, or write the path of an existing field as ${section.field}\n",
            id="a wrong interpolation",
        ),
        pytest.param(
            "result_dir=new",
            2,
            "override result_dir=new: result_dir: unknown field in the spec\nhint: did you mean 'results_dir'?\n",
            id="misspelt",
        ),
    ],
)
def test_a_wrong_results_dir_for_the_default_spec_is_refused(
    taoq: Taoq, work: Path, override: str, code: int, message: str
) -> None:
    assert taoq("classification_pyt", "default_specs", override) == (code, "", message)
