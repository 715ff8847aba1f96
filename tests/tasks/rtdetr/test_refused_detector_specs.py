"""Fields of a detector's spec that do not fit are refused in two lines, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.commands import Refusal, edit_json, unchanged
from support.damage import Damage


def keep_four_categories(data: dict[str, Any]) -> None:
    data.update(categories=data["categories"][:4], annotations=[])


def fault(override: str, text: str, hint: str) -> list[str]:
    """The two lines about a field that an override set."""
    return [f"override {override}: {text}", f"hint: {hint}"]


@pytest.mark.parametrize(
    ("action", "override", "text", "hint"),
    [
        pytest.param(
            "evaluate",
            "model.eval_idx=3",
            "model.eval_idx: 3 is not a layer of 3",
            "write -1 for the last layer",
            id="a decoder layer after the last",
        ),
        pytest.param(
            "evaluate",
            "model.eval_idx=-4",
            "model.eval_idx: -4 is not a layer of 3",
            "write -1 for the last layer",
            id="a decoder layer before the first",
        ),
        pytest.param(
            "evaluate",
            "model.num_select=301",
            "model.num_select: 301 is more than 30 queries x 10 classes",
            "write at most 300",
            id="num_select above queries x classes",
        ),
        pytest.param(
            "quantize",
            "model.backbone=resnet_52",
            "model.backbone: unknown value 'resnet_52'",
            "did you mean 'resnet_50' or 'resnet_34' or 'resnet_18'?",
            id="unknown backbone",
        ),
        pytest.param(
            "quantize",
            "model.backbone=convnext_tiny",
            "model.backbone: is convnext_tiny, and model is a folder of Hugging Face, whose network has a ResNet-vd",
            "give a checkpoint of TAO, or write one of resnet_18, resnet_34, resnet_50, resnet_101",
            id="backbone of TAO with a folder of transformers",
        ),
        pytest.param(
            "quantize",
            "model.resnet=plain",
            "model.resnet: is plain, and model is a folder of Hugging Face, whose network has a ResNet-vd",
            "leave it out",
            id="ResNet of TAO with a folder of transformers",
        ),
        pytest.param(
            "quantize",
            "model.backbone=edgenext_small_bn_hs",
            "model.backbone: taoq does not build edgenext_small_bn_hs:"
            " no library that it uses has EdgeNeXt with batch norms",
            "the nearest one that it builds is edgenext_small",
            id="backbone of TAO that no library has",
        ),
        pytest.param(
            "quantize",
            "model.backbone_args={depth: 3}",
            "model.backbone_args.depth: RTDetrResNetConfig has no argument 'depth'",
            "did you mean 'depths'?",
            id="unknown argument of the backbone",
        ),
        pytest.param(
            "quantize",
            "model.args={decoder_point: 3}",
            "model.args.decoder_point: RTDetrConfig has no argument 'decoder_point'",
            "did you mean 'decoder_n_points' or 'decoder_ffn_dim' or 'decoder_in_channels'?",
            id="unknown argument of the config",
        ),
        pytest.param(
            "quantize",
            "model.args={num_queries: 3}",
            "model.args.num_queries: is what model.num_queries says",
            "write model.num_queries instead",
            id="argument that a field says",
        ),
        pytest.param(
            "quantize",
            "model.return_interm_indices=[1,2,5]",
            "model.return_interm_indices: [1, 2, 5] are not stages of the backbone",
            "write numbers from 0 to 3, [1, 2, 3]",
            id="stage that the backbone does not have",
        ),
        pytest.param(
            "quantize",
            "model.frozen_fm.enabled=true",
            "model.frozen_fm.enabled: no library has TAO's frozen foundation model",
            "use a network without it",
            id="frozen foundation model",
        ),
    ],
)
def test_a_field_of_the_network_is_refused(refusal: Refusal, action: str, override: str, text: str, hint: str) -> None:
    assert refusal(action, override) == (2, fault(override, text, hint))


def test_all_faults_are_listed(refusal: Refusal) -> None:
    assert refusal("quantize", "model.eval_idx=3", "model.depth_mult=2") == (
        2,
        [
            *fault("model.eval_idx=3", "model.eval_idx: 3 is not a layer of 3", "write -1 for the last layer"),
            *fault(
                "model.depth_mult=2",
                "model.depth_mult: 2: transformers' fusion blocks have three RepVGG blocks, which is depth_mult 1",
                "write 1, which all published RT-DETR networks have",
            ),
        ],
    )


@pytest.mark.parametrize(
    ("action", "override", "text", "hint"),
    [
        pytest.param(
            "evaluate",
            "dataset.augmentation.eval_spatial_size=[150,160]",
            "dataset.augmentation.eval_spatial_size: [150, 160] does not fit the strides [8, 16, 32]:"
            " both must be multiples of 32",
            "write [160, 160]",
            id="size that the strides do not allow",
        ),
        pytest.param(
            "evaluate",
            "dataset.augmentation.eval_spatial_size=[160]",
            "dataset.augmentation.eval_spatial_size: [160] is not a height and a width",
            "write two numbers, [640, 640]",
            id="size of one number",
        ),
        pytest.param(
            "evaluate",
            "dataset.eval_class_ids=[]",
            "dataset.eval_class_ids: empty: nothing would be evaluated",
            "name category ids, or leave the field out to evaluate all",
            id="no category to evaluate",
        ),
        pytest.param(
            "evaluate",
            "dataset.eval_class_ids=[3, 99]",
            "dataset.eval_class_ids: [99] are no category ids of val.json",
            "its ids are [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]",
            id="unknown category to evaluate",
        ),
        pytest.param(
            "evaluate",
            "dataset.test_data_sources.json_file=''",
            "dataset.test_data_sources.json_file: missing: evaluate needs annotated images",
            "name a COCO json, and the folder of its images in image_dir",
            id="no annotations",
        ),
        pytest.param(
            "evaluate",
            "dataset.test_data_sources.image_dir=''",
            "dataset.test_data_sources.image_dir: missing: where are the images?",
            "name the folder of the images",
            id="no folder of annotated images",
        ),
        pytest.param(
            "quantize",
            "dataset.quant_calibration_data_sources.image_dir=''",
            "dataset.quant_calibration_data_sources.image_dir: missing:"
            " static_ptq with activations needs calibration images",
            "name a folder of a few hundred images like those the model will see",
            id="no calibration images",
        ),
        pytest.param(
            "inference",
            "dataset.infer_data_sources.image_dir=[]",
            "dataset.infer_data_sources.image_dir: missing: inference needs images",
            "name a list of folders of images",
            id="no folders for inference",
        ),
        pytest.param(
            "inference",
            "inference.color_map={'9': redd}",
            "inference.color_map.9: unknown colour 'redd'",
            "write a name (red) or #rrggbb",
            id="unknown colour",
        ),
        pytest.param(
            "quantize",
            "quantize.layers.0.module_name=encoder.lateral",
            "quantize.layers[0].module_name: pattern 'encoder.lateral' matches no layer",
            "did you mean 'encoder.lateral_convs.1.conv' or 'encoder.lateral_convs.0.conv'"
            " or 'model.encoder.lateral_convs.1.conv'?",
            id="pattern that matches nothing",
        ),
    ],
)
def test_a_field_of_the_work_is_refused(refusal: Refusal, action: str, override: str, text: str, hint: str) -> None:
    assert refusal(action, override) == (2, fault(override, text, hint))


@pytest.mark.parametrize(
    ("overrides", "text", "hint"),
    [
        (
            ("dataset.num_classes=4",),
            "dataset.num_classes: is 4; val.json has 10 categories with ids up to 10",
            "write 10, or 11 if the network was trained with TAO's largest id + 1; or list the category id of each"
            " output in dataset.category_ids",
        ),
        (
            ("dataset.num_classes=11", "dataset.remap_mscoco_category=true"),
            "dataset.num_classes: is 11; val.json has 10 categories with ids up to 10",
            "write 10, or dataset.remap_mscoco_category: false if the outputs are category ids",
        ),
    ],
    ids=["neither the categories nor the largest id + 1", "the largest id + 1, but remapped"],
)
def test_a_number_of_classes_that_does_not_fit_the_annotations_is_refused(
    refusal: Refusal, overrides: tuple[str, ...], text: str, hint: str
) -> None:
    assert refusal("evaluate", *overrides) == (1, fault(overrides[0], text, hint))


@pytest.mark.parametrize(
    ("damage", "classes", "ids"),
    [(lambda: edit_json(Path("val.json"), keep_four_categories), 4, "null"), (unchanged, 11, "as_ids")],
    ids=["as many as the annotations", "the largest id of the annotations + 1"],
)
def test_a_number_of_classes_that_fits_the_annotations_alone_is_refused(
    refusal: Refusal, damage: Damage, classes: int, ids: str
) -> None:
    damage()
    assert refusal("evaluate", f"dataset.num_classes={classes}", f"dataset.category_ids={ids}") == (
        2,
        fault(
            f"dataset.num_classes={classes}",
            f"dataset.num_classes: model/config.json has num_labels 10, the spec makes it {classes}",
            "write dataset.num_classes: 10",
        ),
    )


@pytest.mark.parametrize(
    ("file", "text", "hint"),
    [
        ("nowhere.txt", "nowhere.txt cannot be read", "give a text file, one class a line"),
        ("names.txt", "names.txt names 2 classes, dataset.num_classes is 10", "write one line per class"),
    ],
    ids=["no file", "two names"],
)
def test_a_classmap_that_does_not_fit_is_refused(refusal: Refusal, file: str, text: str, hint: str) -> None:
    Path("names.txt").write_text("a\nb\n")
    override = f"dataset.infer_data_sources.classmap={file}"
    assert refusal("inference", override) == (
        1,
        fault(override, f"dataset.infer_data_sources.classmap: {text}", hint),
    )
