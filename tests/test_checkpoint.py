"""Weights of checkpoints: containers and prefixes of frameworks, mismatches, networks built without initialisation."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from taoq.checkpoint import WithoutInitialisation, load_weights, read_names
from taoq.errors import TaoqError


def net(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width, 2))


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "model.model.", "_orig_mod.module."])
@pytest.mark.parametrize("container", [None, "state_dict", "model", "model_state_dict"])
def test_prefixes_and_containers_of_frameworks(tmp_path: Path, prefix: str, container: str | None) -> None:
    source, target = net(), net()
    state: dict[str, Any] = {f"{prefix}{key}": value for key, value in source.state_dict().items()}
    data = {container: state, "epoch": 3, "optimizer_states": [{"lr": 0.1}]} if container else state
    torch.save(data, tmp_path / "a.ckpt")
    load_weights(target, str(tmp_path / "a.ckpt"))
    assert equal(source, target)


def values(number: float) -> dict[str, Any]:
    return {key: torch.full_like(value, number) for key, value in net().state_dict().items()}


SHADOW = {"decay": 0.99, "num_updates": 3, "shadow_params": [torch.ones(2)], "collected_params": None}
TRAINING = {
    "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
    "lr_scheduler": {"base": torch.ones(1)},
    "epoch": 3,
}


@pytest.mark.parametrize(
    ("data", "number", "said"),
    [
        ({"state_dict": values(1), "state_dict_ema": values(2)}, 2,
         "the averaged weights in 'state_dict_ema' are taken, not 'state_dict'; model.checkpoint_key chooses"),
        ({"model": values(1), "model_ema": values(2)}, 2,
         "the averaged weights in 'model_ema' are taken, not 'model'; model.checkpoint_key chooses"),
        ({"model": values(1), "ema": {"module": values(2), "updates": 7}}, 2,
         "the averaged weights in 'ema.module' are taken, not 'model'; model.checkpoint_key chooses"),
        ({"student": values(1), "teacher": values(2)}, 2,
         "the averaged weights in 'teacher' are taken, not 'student'; model.checkpoint_key chooses"),
        ({"params": values(1), "params_ema": values(2)}, 2,
         "the averaged weights in 'params_ema' are taken, not 'params'; model.checkpoint_key chooses"),
        ({"model": values(1), "ema": SHADOW}, 1,
         "its averaged weights (ema) are a list without names, or empty: the others are taken"),
        ({"model": values(1), "ema": {}}, 1,
         "its averaged weights (ema) are a list without names, or empty: the others are taken"),
        ({"net": values(1)}, 1, "the tensors in 'net' are taken"),
        ({"weights": values(1)}, 1, "the tensors in 'weights' are taken"),
        ({"a": {"b": {"c": values(1)}}}, 1, "the tensors in 'a.b.c' are taken"),
        ({"generator": values(1), "model": values(2)}, 2,
         "'model' are taken, not 'generator'; model.checkpoint_key chooses"),
        ({"state_dict": values(1), "mean": torch.ones(3)}, 1, ""),
        ({"model": {"state_dict": values(1)}}, 1, ""),
    ],
    ids=str,
)  # fmt: skip
def test_the_state_dict_is_found_and_averaged_weights_go_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, data: dict[str, Any], number: int, said: str
) -> None:
    path, target = tmp_path / "a.pth", net()
    torch.save({**TRAINING, **data}, path)
    with caplog.at_level(logging.INFO, "taoq"):
        load_weights(target, str(path))
        names = read_names(str(path))
    assert all((value == number).all() for value in target.state_dict().values())
    assert caplog.messages == ([f"{path}: {said}"] if said else [])
    assert sorted(names) == sorted(net().state_dict())


@pytest.mark.parametrize(("key", "number"), [("model", 1), ("ema.module", 2), ("ema", 2)])
def test_a_key_chooses(tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str, number: int) -> None:
    torch.save({"model": values(1), "ema": {"module": values(2)}}, tmp_path / "a.pth")
    target = net()
    with caplog.at_level(logging.INFO, "taoq"):
        load_weights(target, str(tmp_path / "a.pth"), key=key)
    assert all((value == number).all() for value in target.state_dict().values())
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("key", "hint"),
    [("modle", "did you mean 'model' or 'ema.module'?"), ("xyz", "it has tensors under model, ema.module")],
)
def test_a_key_without_tensors_is_refused(tmp_path: Path, key: str, hint: str) -> None:
    path = tmp_path / "a.pth"
    torch.save({"model": values(1), "ema": {"module": values(2)}}, path)
    with pytest.raises(TaoqError) as error:
        load_weights(net(), str(path), key=key)
    assert str(error.value) == f"model.checkpoint_key: {path} has no tensors under '{key}'\nhint: {hint}"


def test_what_a_file_without_tensors_has_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"epoch": 3, "history": [1, 2], "best": 0.5}, path)
    with pytest.raises(TaoqError) as error:
        load_weights(net(), str(path))
    assert str(error.value) == (
        f"{path}: holds no state dict, only epoch, history, best\n"
        "hint: give a file that torch.save wrote of a state dict"
    )


def test_containers_that_are_shared_or_in_themselves_end(tmp_path: Path) -> None:
    inner: dict[str, Any] = {}
    for _ in range(4):
        inner = {str(number): inner for number in range(1000)}
    inner["self"] = inner
    torch.save({**inner, "model": values(1)}, tmp_path / "a.pth")
    target = net()
    load_weights(target, str(tmp_path / "a.pth"))
    assert (target.state_dict()["0.weight"] == 1).all()


def test_safetensors_in_half_precision_become_float32(tmp_path: Path) -> None:
    source, target = net().half(), net()
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, tmp_path / "a.safetensors")
    load_weights(target, str(tmp_path / "a.safetensors"))
    assert equal(source.float(), target)
    assert {value.dtype for key, value in target.named_parameters()} == {torch.float32}


def test_tensors_outside_of_the_network_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = {f"model.{key}": value for key, value in net().state_dict().items()}
    torch.save({"state_dict": {**state, "criterion.weight": torch.ones(2)}}, tmp_path / "a.ckpt")
    with caplog.at_level(logging.INFO, "taoq"):
        load_weights(net(), str(tmp_path / "a.ckpt"))
    path = tmp_path / "a.ckpt"
    assert caplog.messages == [f"{path}: 1 tensors outside of 'model.*' are not of this network: criterion.weight"]


@pytest.mark.parametrize(
    ("hint", "printed"),
    [
        ((), "check that the spec describes the network of this checkpoint"),
        (("check model.width",), "check model.width"),
    ],
    ids=["by default", "of a task"],
)
def test_a_mismatch_says_which_keys_and_shapes(tmp_path: Path, hint: tuple[str, ...], printed: str) -> None:
    state = net(8).state_dict()
    del state["3.bias"]
    state["4.weight"] = torch.ones(1)
    path = tmp_path / "a.pth"
    torch.save(state, path)
    with pytest.raises(TaoqError) as error:
        load_weights(net(), str(path), *hint)
    assert str(error.value) == (
        f"{path}: does not fit the network: tensors 7 of another shape (0.weight [8, 3, 3, 3] for [4, 3, 3, 3],"
        " 0.bias [8] for [4], 1.weight [8] for [4], ...), 1 missing (3.bias), 1 unknown (4.weight)\n"
        f"hint: {printed}"
    )


def test_a_failed_load_changes_no_tensor(tmp_path: Path) -> None:
    torch.save(net(8).state_dict(), tmp_path / "a.pth")
    target = net()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(TaoqError):
        load_weights(target, str(tmp_path / "a.pth"))
    assert all(torch.equal(before[key], value) for key, value in target.state_dict().items())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224", "resnet10t"])
def test_a_network_built_without_initialisation_is_the_same_once_loaded(tmp_path: Path, name: str) -> None:
    source = timm.create_model(name, num_classes=3).eval()
    torch.save(source.state_dict(), tmp_path / "a.pth")
    with WithoutInitialisation():
        target = timm.create_model(name, num_classes=3).eval()
    load_weights(target, str(tmp_path / "a.pth"))
    images = torch.rand(1, 3, 224, 224)
    assert torch.equal(source(images), target(images))


def test_a_parameter_with_two_names_stays_one(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        network[1].weight = network[0].weight
        return network

    source, target = tied(), tied()
    torch.save(source.state_dict(), tmp_path / "a.pth")
    load_weights(target, str(tmp_path / "a.pth"))
    assert equal(source, target)
    assert target[1].weight is target[0].weight


def test_a_checkpoint_that_tao_encrypted_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"state_dict": b"0123", "state_dict_encrypted": True}, path)
    with pytest.raises(TaoqError) as error:
        load_weights(net(), str(path))
    assert str(error.value).splitlines() == [
        f"{path}: is encrypted by TAO, and only TAO can decrypt it",
        "hint: train or export without encryption_key (-k)",
    ]


def test_the_command_line_that_a_script_saved_is_no_code(tmp_path: Path) -> None:
    source, target = net(), net()
    torch.save({"model": source.state_dict(), "args": Namespace(lr=0.1)}, tmp_path / "a.pth")
    load_weights(target, str(tmp_path / "a.pth"))
    assert equal(source, target)
