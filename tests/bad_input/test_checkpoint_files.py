"""A damaged or unsafe checkpoint, or one of another network, is refused; code in it does not run."""

from __future__ import annotations

import pickle
import shutil
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from support.commands import unchanged
from support.damage import GIT_LFS, Damage, cut
from support.pickles import Bomb
from support.small_spec import Refused
from taoq.checkpoint import read_state_dict
from taoq.errors import TaoqError

DAMAGED = "is cut off, or is not a checkpoint of torch\nhint: copy the file again, or give another one\n"
HOLDS_CODE = (
    "holds objects besides tensors, which taoq does not load: they could run code\n"
    "hint: save the tensors alone where you trust the file: torch.save(model.state_dict(), 'weights.pth')\n"
)
NO_STATE_DICT = "holds no state dict\nhint: give a file that torch.save wrote of a state dict\n"


def float_weights() -> dict[str, Tensor]:
    return load_file("weights.safetensors")


def save_and_cut(size: int, *, zipped: bool) -> None:
    torch.save(float_weights(), "bad.pth", _use_new_zipfile_serialization=zipped)
    cut("bad.pth", size)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(
            unchanged, "there is no such checkpoint\nhint: give a .pth, .ckpt or .safetensors file\n", id="missing"
        ),
        pytest.param(lambda: save_and_cut(700_000, zipped=True), DAMAGED, id="cut off"),
        pytest.param(lambda: save_and_cut(9, zipped=True), DAMAGED, id="cut off in the header"),
        pytest.param(lambda: save_and_cut(700_000, zipped=False), DAMAGED, id="of old torch, cut off"),
        pytest.param(lambda: save_and_cut(5_000, zipped=False), DAMAGED, id="of old torch, cut off in the names"),
        pytest.param(lambda: save_and_cut(18, zipped=False), DAMAGED, id="of old torch, cut off in the header"),
        pytest.param(lambda: save_and_cut(2, zipped=True), DAMAGED, id="cut off after two bytes"),
        pytest.param(lambda: Path("bad.pth").write_bytes(b""), DAMAGED, id="empty"),
        pytest.param(lambda: Path("bad.pth").write_bytes(b"a text\n"), DAMAGED, id="a text"),
        pytest.param(lambda: Path("bad.pth").write_bytes(b"<html></html>\n"), DAMAGED, id="a web page"),
        pytest.param(lambda: Path("bad.pth").write_bytes(GIT_LFS), DAMAGED, id="a pointer of git-lfs"),
        pytest.param(
            lambda: torch.save({"state_dict": float_weights(), "code": Bomb("ran")}, "bad.pth"),
            HOLDS_CODE,
            id="with code",
        ),
        pytest.param(
            lambda: torch.save([float_weights(), Bomb("ran")], "bad.pth", _use_new_zipfile_serialization=False),
            HOLDS_CODE,
            id="of old torch, with code",
        ),
        pytest.param(lambda: Path("bad.pth").write_bytes(pickle.dumps(Bomb("ran"))), DAMAGED, id="a pickle with code"),
        pytest.param(
            lambda: Path("bad.pth").write_bytes(pickle.dumps(Bomb("ran"), protocol=0)),
            DAMAGED,
            id="an old pickle with code",
        ),
        pytest.param(lambda: torch.save(nn.Linear(2, 2), "bad.pth"), HOLDS_CODE, id="a whole network"),
        pytest.param(
            lambda: torch.save({"epoch": 3}, "bad.pth"),
            NO_STATE_DICT.replace("dict", "dict, only epoch", 1),
            id="without tensors",
        ),
        pytest.param(lambda: torch.save([torch.zeros(2)], "bad.pth"), NO_STATE_DICT, id="a list"),
    ],
)
def test_a_file_that_is_no_safe_checkpoint_is_refused(
    work: Path, refused: Refused, damage: Damage, message: str
) -> None:
    damage()
    assert refused("quantize", "quantize.model_path=bad.pth") == (1, f"bad.pth: {message}")
    assert refused("evaluate", "evaluate.checkpoint=bad.pth") == (1, f"bad.pth: {message}")
    assert not Path("ran").exists()


def test_a_folder_that_is_no_artifact_is_refused(work: Path, refused: Refused) -> None:
    assert refused("quantize", "quantize.model_path=data") == (
        1,
        "data: is a folder, not a checkpoint\nhint: give a .pth, .ckpt or .safetensors file\n",
    )
    assert refused("evaluate", "evaluate.checkpoint=data") == (
        1,
        "data: is a folder without a manifest.json: it is not an artifact, or not a complete one\n"
        "hint: quantize again, or give a checkpoint file\n",
    )


@pytest.mark.parametrize("zipped", [True, False], ids=["a zip archive", "of old torch"])
def test_any_damage_of_a_checkpoint_is_named_as_a_fault(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "bad.pth"
    torch.save({f"layer{n}.weight": torch.ones(4, 4) for n in range(9)}, path, _use_new_zipfile_serialization=zipped)
    good = path.read_bytes()
    random = Random(0)
    for size in random.sample(range(len(good)), 300):
        path.write_bytes(good[:size])
        with pytest.raises(TaoqError) as error:
            read_state_dict(str(path))
        # a name that is cut off is another name, perhaps of an object that is not allowed
        assert f"{error.value}\n" in (f"{path}: {DAMAGED}", f"{path}: {HOLDS_CODE}")
    for _ in range(600):
        bad = bytearray(good)
        bad[random.randrange(len(bad))] = random.randrange(256)
        path.write_bytes(bad)
        with suppress(TaoqError):  # a changed number is no fault
            read_state_dict(str(path))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(
            lambda: cut("weights.safetensors", 700_000), "incomplete metadata, file not fully covered", id="cut"
        ),
        pytest.param(lambda: cut("weights.safetensors", 100), "invalid header length", id="cut in the header"),
        pytest.param(lambda: cut("weights.safetensors", 0), "header too small", id="empty"),
        pytest.param(
            lambda: Path("weights.safetensors").write_bytes(GIT_LFS), "header too large", id="a pointer of git-lfs"
        ),
        pytest.param(
            lambda: Path("weights.safetensors").write_bytes(pickle.dumps(Bomb("ran"))),
            "header too large",
            id="a pickle",
        ),
    ],
)
def test_a_damaged_safetensors_file_is_refused(work: Path, refused: Refused, damage: Damage, reason: str) -> None:
    damage()
    assert refused("quantize") == (
        1,
        f"weights.safetensors: is not a whole safetensors file: Error while deserializing header: {reason}\n"
        "hint: copy the file again\n",
    )
    assert not Path("ran").exists()


def test_the_checkpoint_of_another_network_is_refused(work: Path, refused: Refused) -> None:
    vit = Path(__file__).parents[2] / "examples" / "digits" / "checkpoints" / "vit_tiny.safetensors"
    shutil.copy(vit, "weights.safetensors")
    assert refused("quantize") == (
        1,
        "weights.safetensors: does not fit the network: tensors 128 missing (conv1.weight, bn1.weight, bn1.bias, ...),"
        " 80 unknown (blocks.0.attn.proj.bias, blocks.0.attn.proj.weight, blocks.0.attn.qkv.bias, ...)\n"
        "hint: check model.backbone.type, model.backbone.args and dataset.num_classes\n",
    )


def test_a_checkpoint_with_other_classes_is_refused(work: Path, refused: Refused) -> None:
    assert refused("quantize", "dataset.num_classes=12") == (
        1,
        "weights.safetensors: does not fit the network: tensors 2 of another shape (fc.weight [10, 128] for [12, 128],"
        " fc.bias [10] for [12])\n"
        "hint: check model.backbone.type, model.backbone.args and dataset.num_classes\n",
    )


@pytest.mark.parametrize("action", ["evaluate", "inference"])
def test_a_checkpoint_with_nan_is_refused(refused: Refused, action: str) -> None:
    state = load_file("weights.safetensors")
    name = next(name for name, value in state.items() if value.is_floating_point())
    state[name] = torch.full_like(state[name], float("nan"))
    torch.save(state, "nan.pth")
    code, err = refused(action, f"{action}.checkpoint=nan.pth")
    assert code == 1
    what, hint = err.splitlines()[-2:]
    assert what.startswith("nan.pth: its output output is not a number (NaN) for data/")
    assert hint == "hint: look for NaN or infinite values in the checkpoint, or in the sample"
