"""Checkpoints in the deploy form of the original code, and those of other detectors, which are refused by name."""

from __future__ import annotations

import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from original import Original, RepVgg, shuffled
from test_rtdetr_model import ORIGINALS, TINY_MODEL, TINY_ORIGINAL, assert_same, photograph, run, spec
from torch import nn

from taoq.errors import TaoqError
from taoq.tasks.rtdetr.model import build_model


def deploy(network: nn.Module, *, keep: bool) -> dict[str, torch.Tensor]:
    """The state dict after `deploy()`: each RepVGG block has one convolution; the authors' code keeps the branches."""
    state = dict(network.state_dict())
    for name, block in network.named_modules():
        if not isinstance(block, RepVgg):
            continue
        kernels, biases = [], []
        for branch in (block.conv1, block.conv2):
            scale = branch.norm.weight / (branch.norm.running_var + branch.norm.eps).sqrt()
            kernels.append(branch.conv.weight * scale[:, None, None, None])
            biases.append(branch.norm.bias - branch.norm.running_mean * scale)
        state[f"{name}.conv.weight"] = kernels[0] + nn.functional.pad(kernels[1], [1, 1, 1, 1])
        state[f"{name}.conv.bias"] = biases[0] + biases[1]
    if keep:
        return state
    return {
        name: value for name, value in state.items() if ".bottlenecks." not in name or (name.split(".")[-2] == "conv"
        and name.split(".")[-3].isdigit())
    }  # fmt: skip


@pytest.mark.parametrize("keep", [False, True], ids=["alone", "beside its branches"])
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "as it is"])
def test_a_deployed_checkpoint_gives_the_outputs_of_the_original(tmp_path: Path, keep: bool, fuse: bool) -> None:
    theirs, ours = ORIGINALS["basic blocks, half-width fusion, as R18"]
    original = shuffled(Original(**theirs, **TINY_ORIGINAL))
    state = deploy(original, keep=keep)
    assert ("encoder.pan_blocks.1.bottlenecks.2.conv1.conv.weight" in state) == keep
    torch.save({"model": state}, tmp_path / "deployed.pth")
    built = build_model(spec({**TINY_MODEL, **ours, "fuse": fuse}, (96, 160), 5), str(tmp_path / "deployed.pth"))
    assert_same(run(built, photograph((96, 160))), run(original, photograph((96, 160))))


def of_transformers(name: str) -> list[str]:
    """The names of the tensors of a detector of transformers, in its default size."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it does not initialise tensors without elements
        network = getattr(transformers, f"{name}ForObjectDetection")(getattr(transformers, f"{name}Config")())
    return list(network.state_dict())


D_FINE = ["decoder.decoder.lqe_layers.0.reg_conf.layers.0.weight", "encoder.input_proj.0.conv.weight",
          "decoder.dec_score_head.0.weight"]  # fmt: skip
OTHERS: dict[str, tuple[Any, str]] = {
    "D-FINE": (D_FINE, "D-FINE or DEIM"),
    "D-FINE in transformers": ("DFine", "D-FINE or DEIM"),
    "DEIMv2 in transformers": ("Deimv2", "D-FINE or DEIM"),
    "RF-DETR": (
        ["backbone.0.encoder.encoder.embeddings.cls_token", "transformer.enc_output.0.weight", "refpoint_embed.weight"],
        "RF-DETR",
    ),
    "RF-DETR in transformers": ("RfDetr", "RF-DETR"),
    "LW-DETR": (["backbone.0.encoder.blocks.0.norm1.weight", "refpoint_embed.weight"], "LW-DETR"),
    "LW-DETR in transformers": ("LwDetr", "LW-DETR"),
    "Deformable DETR": (["transformer.level_embed", "backbone.0.body.conv1.weight"], "Deformable DETR or DINO"),
    "Deformable DETR in transformers": ("DeformableDetr", "Deformable DETR or DINO"),
    "DETR": (["backbone.0.body.conv1.weight", "query_embed.weight"], "DETR"),
    "DETR in transformers": ("Detr", "DETR"),
    "YOLOS": ("Yolos", "YOLOS"),
    "Ultralytics": (["model.0.conv.weight", "model.22.dfl.conv.weight"], "one of Ultralytics' networks"),
    "Ultralytics' RT-DETR": (["model.0.stem1.conv.weight", "model.28.dec_score_head.0.weight"],
                             "one of Ultralytics' networks"),
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("other", OTHERS)
def test_the_checkpoint_of_another_detector_is_refused_by_name(tmp_path: Path, other: str, prefix: str) -> None:
    source, name = OTHERS[other]
    names = of_transformers(source) if isinstance(source, str) else source
    path = tmp_path / "other.pth"
    # The authors of DETRs save their command line beside the weights.
    torch.save({"model": {prefix + key: torch.zeros(1) for key in names}, "args": Namespace(lr=1e-4)}, path)
    with pytest.raises(TaoqError) as error:
        build_model(spec(TINY_MODEL, (128, 128), 5), str(path))
    assert str(error.value).splitlines() == [
        f"{path}: is a checkpoint of {name}, which taoq does not build",
        "hint: give the checkpoint of an RT-DETR or RT-DETRv2",
    ]
