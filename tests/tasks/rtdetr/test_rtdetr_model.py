"""RT-DETR built from each kind of checkpoint, against a second implementation and against transformers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from original import Original, shuffled
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.functional import to_tensor
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrV2Config, RTDetrV2ForObjectDetection

from taoq.errors import SpecError
from taoq.spec.load import spec_from_dict
from taoq.tasks.rtdetr.model import build_model, make_config
from taoq.tasks.rtdetr.names import original_name
from taoq.tasks.rtdetr.network import Detector
from taoq.tasks.rtdetr.spec import RtdetrSpec

ROOT = Path(__file__).parents[3]
SMALL = ROOT / "examples" / "digit_scenes" / "checkpoints" / "rtdetr_small"
SMALL_MODEL: dict[str, Any] = {
    "backbone": "resnet_18",
    "backbone_args": {"embedding_size": 32, "hidden_sizes": [32, 64, 128, 256], "depths": [1, 2, 2, 1]},
    "hidden_dim": 96,
    "nheads": 6,
    "dim_feedforward": 256,
    "dec_layers": 3,
    "num_queries": 30,
    "num_select": 30,
}
TINY_ORIGINAL: dict[str, Any] = {"stem": 16, "width": 32, "heads": 4, "inner": 48, "queries": 20, "classes": 5}
TINY_MODEL: dict[str, Any] = {
    "hidden_dim": 32, "nheads": 4, "dim_feedforward": 48, "num_queries": 20, "num_select": 20,
}  # fmt: skip


LARGEST_DIFFERENCE = 2e-4
"""Relative to the largest value of an output; the bound that docs/rtdetr.md states."""


def spec(model: dict[str, Any], size: tuple[int, int] = (160, 160), classes: int = 10) -> RtdetrSpec:
    dataset = {"num_classes": classes, "augmentation": {"eval_spatial_size": list(size)}}
    return spec_from_dict({"model": model, "dataset": dataset}, RtdetrSpec)


def photograph(size: tuple[int, int]) -> Tensor:
    """A real photograph, resized to the size of the input."""
    from sklearn.datasets import load_sample_image

    image = Image.fromarray(load_sample_image("flower.jpg")).resize((size[1], size[0]))
    return to_tensor(image).unsqueeze(0)


def run(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        outputs = model(images)
    return tuple(outputs) if isinstance(outputs, tuple) else (outputs.logits, outputs.pred_boxes)


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    """Check that the queries are the same in any order: two of nearly the same score may change places.

    Logits and boxes are compared relative to the largest of them.
    """
    largest = [float(output.abs().max()) for output in theirs]
    scaled = [torch.cat([output / size for output, size in zip(outputs, largest, strict=True)], 2)
              for outputs in (ours, theirs)]  # fmt: skip
    for queries, reference in zip(*scaled, strict=True):
        assert queries.shape == reference.shape
        distances = torch.cdist(queries, reference, p=torch.inf)
        assert distances.amin(0).max() < LARGEST_DIFFERENCE
        assert distances.amin(1).max() < LARGEST_DIFFERENCE


def test_the_docs_state_the_bound_of_these_tests() -> None:
    page = (ROOT / "docs" / "rtdetr.md").read_text(encoding="utf-8")
    assert f"by at most {LARGEST_DIFFERENCE:.0e} of the largest value of the output".replace("e-0", "e-") in " ".join(
        page.split()
    )


ORIGINALS = {
    "basic blocks, half-width fusion, as R18": (
        {"widths": (16, 24, 32, 40), "depths": (2, 2, 2, 2), "bottleneck": False, "expansion": 0.5, "layers": 3},
        {"backbone": "resnet_18", "backbone_args": {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 40]},
         "expansion": 0.5, "dec_layers": 3},
    ),
    "bottlenecks, as R50": (
        {"widths": (8, 8, 12, 16), "depths": (3, 4, 6, 3), "bottleneck": True, "expansion": 1.0, "layers": 6},
        {"backbone": "resnet_50", "backbone_args": {"embedding_size": 16, "hidden_sizes": [32, 32, 48, 64]}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ORIGINALS)
@pytest.mark.parametrize("size", [(128, 128), (96, 160)], ids=["square", "wide"])
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "as it is"])
def test_an_original_checkpoint_gives_the_outputs_of_the_original(
    tmp_path: Path, kind: str, size: tuple[int, int], fuse: bool
) -> None:
    theirs, ours = ORIGINALS[kind]
    original = shuffled(Original(**theirs, **TINY_ORIGINAL))
    torch.save({"model": original.state_dict(), "last_epoch": 71}, tmp_path / "rtdetr.pth")
    built = build_model(spec({**TINY_MODEL, **ours, "fuse": fuse}, size, 5), str(tmp_path / "rtdetr.pth"))
    assert_same(run(built, photograph(size)), run(original, photograph(size)))


def test_averaged_weights_are_preferred_and_prefixes_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs, ours = ORIGINALS["basic blocks, half-width fusion, as R18"]
    averaged, last = (shuffled(Original(**theirs, **TINY_ORIGINAL), seed) for seed in (1, 2))
    torch.save(
        {"model": last.state_dict(), "ema": {"module": averaged.state_dict(), "updates": 9}}, tmp_path / "ema.pth"
    )
    lightning = {f"model.model.{name}": value for name, value in averaged.state_dict().items()}
    torch.save({"state_dict": {**lightning, "criterion.weight": torch.ones(3)}}, tmp_path / "lightning.ckpt")
    expected = run(averaged, photograph((128, 128)))
    for name in ("ema.pth", "lightning.ckpt"):
        with caplog.at_level(logging.INFO, "taoq"):
            built = build_model(spec({**TINY_MODEL, **ours}, (128, 128), 5), str(tmp_path / name))
        assert_same(run(built, photograph((128, 128))), expected)
    path = tmp_path / "ema.pth"
    assert f"{path}: not needed for inference: decoder.denoising_class_embed.weight" in caplog.messages


@pytest.mark.parametrize(
    ("backbone", "depths", "expansion", "layers", "millions"),
    [("resnet_18", (2, 2, 2, 2), 0.5, 3, 20), ("resnet_50", (3, 4, 6, 3), 1.0, 6, 42)],
)
def test_sizes_are_those_of_the_paper_and_every_tensor_has_its_place(
    backbone: str, depths: tuple[int, ...], expansion: float, layers: int, millions: int
) -> None:
    """Table 2 of the paper: R18 has 20M parameters, R50 42M."""
    with torch.device("meta"):
        original = Original(depths=depths, bottleneck=backbone == "resnet_50", expansion=expansion, layers=layers)
    names = set(original.state_dict()) - {"decoder.denoising_class_embed.weight"}
    model = {"backbone": backbone, "expansion": expansion, "dec_layers": layers, "fuse": False}
    built = build_model(spec(model, (64, 64), 80), None)
    assert sum(parameter.numel() for parameter in original.parameters()) // 1_000_000 == millions
    unused = {f"decoder.dec_score_head.{layer}.{part}" for layer in range(layers - 1) for part in ("weight", "bias")}
    counters = {name for name in names if name.startswith("backbone.") and name.endswith("num_batches_tracked")}
    built_names = {original_name(name).replace(".in_proj.", ".in_proj_") for name in built.state_dict()}
    assert names - unused - counters == {name for name in built_names if "position_embedding" not in name}


def transformers_small() -> nn.Module:
    network = RTDetrForObjectDetection(RTDetrConfig.from_dict(json.loads((SMALL / "config.json").read_text())))
    network.load_state_dict(load_file(SMALL / "model.safetensors"))
    return network.eval()


@pytest.mark.parametrize("size", [(160, 160), (96, 224)], ids=["square", "wide"])
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "as it is"])
def test_a_hugging_face_folder_gives_the_outputs_of_transformers(size: tuple[int, int], fuse: bool) -> None:
    built = build_model(spec({**SMALL_MODEL, "fuse": fuse}, size), str(SMALL))
    assert_same(run(built, photograph(size)), run(transformers_small(), photograph(size)))


def test_a_state_dict_of_transformers_is_enough() -> None:
    built = build_model(spec(SMALL_MODEL), str(SMALL / "model.safetensors"))
    assert_same(run(built, photograph((160, 160))), run(transformers_small(), photograph((160, 160))))


def test_rtdetr_v2_gives_the_outputs_of_transformers(tmp_path: Path) -> None:
    backbone = {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 40], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    config = RTDetrV2Config(
        backbone_config={"model_type": "rt_detr_resnet", "out_indices": [2, 3, 4], **backbone},
        encoder_in_channels=[24, 32, 40], encoder_hidden_dim=32, d_model=32, decoder_in_channels=[32] * 3,
        encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4,
        decoder_layers=2, num_queries=20, num_labels=5,
    )  # fmt: skip
    network = shuffled(RTDetrV2ForObjectDetection(config))
    network.save_pretrained(tmp_path)
    model = {**TINY_MODEL, "architecture": "rtdetr_v2", "backbone": "resnet_18", "dec_layers": 2,
             "backbone_args": {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 40]}}  # fmt: skip
    built = build_model(spec(model, (128, 128), 5), str(tmp_path))
    assert_same(run(built, photograph((128, 128))), run(network, photograph((128, 128))))


def version_2(original: nn.Module, points: int) -> dict[str, Tensor]:
    """The state dict of an RT-DETR under the names of rtdetrv2_pytorch, which also stores 1 / points per point."""
    state = {}
    for name, value in original.state_dict().items():
        for before, after in (("encoder.input_proj.0.0", "encoder.input_proj.0.conv"),
                              ("encoder.input_proj.1.0", "encoder.input_proj.1.conv"),
                              ("encoder.input_proj.2.0", "encoder.input_proj.2.conv"),
                              ("encoder.input_proj.0.1", "encoder.input_proj.0.norm"),
                              ("encoder.input_proj.1.1", "encoder.input_proj.1.norm"),
                              ("encoder.input_proj.2.1", "encoder.input_proj.2.norm"),
                              ("enc_output.0", "enc_output.proj"), ("enc_output.1", "enc_output.norm")):  # fmt: skip
            name = name.replace(before, after)
        state[name] = value
        if name.endswith("sampling_offsets.bias"):
            scale = name.replace("sampling_offsets.bias", "num_points_scale")
            state[scale] = torch.full((3 * points,), 1 / points)
    return state


@pytest.mark.parametrize("size", [(128, 128), (96, 192), (192, 96)], ids=["square", "wide", "tall"])
@pytest.mark.parametrize("points", [1, 4], ids=["sp1", "four points"])
@pytest.mark.parametrize("discrete", [True, False], ids=["dsp", "bilinear"])
def test_an_original_checkpoint_of_version_2_gives_the_outputs_of_the_original(
    tmp_path: Path, size: tuple[int, int], points: int, discrete: bool, caplog: pytest.LogCaptureFixture
) -> None:
    theirs, ours = ORIGINALS["basic blocks, half-width fusion, as R18"]
    original = shuffled(Original(**theirs, **TINY_ORIGINAL, points=points, discrete=discrete))
    torch.save({"ema": {"module": version_2(original, points)}}, tmp_path / "v2.pth")
    arguments = {"decoder_n_points": points, **({"decoder_method": "discrete"} if discrete else {})}
    fields = {**TINY_MODEL, **ours, "architecture": "rtdetr_v2", "args": arguments}
    with caplog.at_level(logging.INFO, "taoq"):
        built = build_model(spec(fields, size, 5), str(tmp_path / "v2.pth"))
    assert_same(run(built, photograph(size)), run(original, photograph(size)))
    said = (
        "model.args.decoder_method: default (bilinear sampling) is assumed, because the file does not say it;"
        " *_dsp networks have discrete"
    )
    assert (said in caplog.messages) is not discrete


def test_the_outputs_may_be_those_of_an_earlier_decoder_layer() -> None:
    built = build_model(spec({**SMALL_MODEL, "eval_idx": 1}), str(SMALL))
    with torch.inference_mode():
        whole = transformers_small()(photograph((160, 160)))
    expected = (whole.intermediate_logits[:, 1], whole.intermediate_reference_points[:, 1])
    assert_same(run(built, photograph((160, 160))), expected)


def test_constants_are_finite_float32_and_fusing_leaves_no_norm_of_a_convolution() -> None:
    built = build_model(spec(SMALL_MODEL), str(SMALL))
    assert isinstance(built, Detector)
    for tensor in (*built.buffers(), *built.parameters()):
        assert tensor.isfinite().all()
        assert tensor.abs().max() < 1e3
        assert tensor.dtype in (torch.float32, torch.int64)
    assert not [name for name, module in built.named_modules() if "BatchNorm" in type(module).__name__]
    assert not [name for name in built.state_dict() if ".bottlenecks." in name and ".conv1." in name]


def test_every_layer_with_a_weight_has_the_name_of_the_original_code() -> None:
    built = build_model(spec(SMALL_MODEL), str(SMALL))
    names = {original_name(name.removesuffix(".weight")) for name, _ in built.named_parameters() if "weight" in name}
    assert {name.partition(".")[0] for name in names} == {"backbone", "encoder", "decoder"}
    for name in (
        "backbone.res_layers.1.blocks.0.short.conv.conv", "encoder.fpn_blocks.0.bottlenecks.2.conv",
        "encoder.encoder.0.layers.0.linear1", "decoder.dec_score_head.2", "decoder.enc_bbox_head.layers.0",
        "decoder.decoder.layers.1.cross_attn.sampling_offsets", "decoder.decoder.layers.0.self_attn.out_proj",
    ):  # fmt: skip
        assert name in names


def test_a_config_that_differs_says_what_to_write() -> None:
    with pytest.raises(SpecError) as error:
        build_model(spec({**SMALL_MODEL, "hidden_dim": 128, "dec_layers": 6}), str(SMALL))
    config = SMALL / "config.json"
    assert str(error.value).splitlines() == [
        f"model.hidden_dim: {config} has encoder_hidden_dim 96, the spec makes it 128",
        "hint: write model.hidden_dim: 96",
        f"model.dec_layers: {config} has decoder_layers 3, the spec makes it 6",
        "hint: write model.dec_layers: 3",
    ]


@pytest.mark.parametrize(
    ("model", "millions"),
    [
        ({"backbone": "resnet_18", "expansion": 0.5, "dec_layers": 3}, 20),
        ({"backbone": "resnet_34", "expansion": 0.5, "dec_layers": 4}, 31),
        ({"expansion": 0.5, "eval_idx": 2}, 36),
        ({}, 42),
        (
            {"backbone": "resnet_101", "hidden_dim": 384, "dim_feedforward": 2048,
             "args": {"d_model": 256, "decoder_ffn_dim": 1024}},
            76,
        ),
    ],
    ids=["R18", "R34", "R50-m", "R50", "R101"],
)  # fmt: skip
def test_the_fields_in_the_docs_make_the_published_networks(model: dict[str, Any], millions: int) -> None:
    """Table 2 of the paper, in millions of parameters."""
    with torch.device("meta"):
        network = RTDetrForObjectDetection(make_config(spec(model, classes=80)))
    assert sum(parameter.numel() for parameter in network.parameters()) // 1_000_000 == millions
