"""A student trains at a size its network takes, and the image processor that is read back says what training did."""

import pytest
import torch
from transformers import (
    AutoImageProcessor,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    MobileNetV2ImageProcessor,
    MobileViTConfig,
    MobileViTForImageClassification,
    MobileViTImageProcessor,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTImageProcessorPil,
)
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from hf_ihb.config.model import ModelArguments
from hf_ihb.errors import ModelLoadError
from hf_ihb.models.geometry import WholeImage
from hf_ihb.models.inputs import format_for, processor_beside, takes
from hf_ihb.models.processing import PixelFormat, pixel_format
from hf_ihb.models.student import build_student

NAMES = ["a", "b", "c"]
LABELS = {"num_labels": 3}
SIDE = {"height": 32, "width": 32}
ANY, MEAN, STD = (20, 24), [0.4] * 3, [0.2] * 3


def vit():
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **shape, **LABELS))


def mobilenet():
    return MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.1, **LABELS))


def mobilevit():
    shape = {"hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 8], "num_attention_heads": 2}
    return MobileViTForImageClassification(MobileViTConfig(image_size=64, **shape, **LABELS))


def timm(**config):
    given = {"input_size": [3, 32, 32], "mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_pct": 0.875}
    config = TimmWrapperConfig(architecture="resnet18_cifar_w16", pretrained_cfg=given | config, **LABELS)
    return TimmWrapperForImageClassification(config)


def test_a_network_takes_what_it_runs_on_whatever_its_config_names():
    network, fixed = mobilenet().train(), vit()
    assert takes(network, ANY)  # its config names 224 px
    assert network.training
    assert takes(fixed, (32, 32))
    assert not takes(fixed, ANY)


# Model, its image processor, data's size -> size and levels of the training.
STARTS = {
    "any size": (mobilenet, lambda: MobileNetV2ImageProcessor(size={"shortest_edge": 36}, crop_size=SIDE), (32, 32)),
    "no resize": (mobilenet, lambda: MobileNetV2ImageProcessor(do_resize=False, do_center_crop=False), ANY),
    "BGR": (mobilevit, lambda: MobileViTImageProcessor(size={"shortest_edge": 40}, crop_size=SIDE), (32, 32)),
    "crop": (vit, lambda: DeiTImageProcessor(size={"height": 36, "width": 36}, crop_size=SIDE), (32, 32)),
    "crop_pct": (mobilenet, lambda: ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.8), (32, 32)),
    "levels as they are": (vit, lambda: ViTImageProcessor(size=SIDE, do_rescale=False, resample=2), (32, 32)),
    "another size than the network's": (vit, ViTImageProcessor, (32, 32)),
}


@pytest.mark.parametrize("start", STARTS)
def test_a_student_of_weights_trains_and_is_saved_at_one_size_with_their_levels(start, tmp_path):
    make, processor, size = STARTS[start]
    make().save_pretrained(tmp_path / "from")
    (own := processor()).save_pretrained(tmp_path / "from")
    args = ModelArguments(model_name_or_path=str(tmp_path / "from"))
    student, kept = build_student(args, NAMES, ANY, MEAN, STD)
    kept.save_pretrained(tmp_path / "to")
    theirs, again = pixel_format(own), pixel_format(AutoImageProcessor.from_pretrained(tmp_path / "to"))
    assert again == format_for(student, kept)
    assert (again.size, again.geometry) == (size, WholeImage(size, theirs.interpolation))
    assert (again.flips, again.mean, again.std) == (theirs.flips, theirs.mean, theirs.std)
    student(pixel_values=torch.zeros(1, 3, *size))  # as `pipeline` calls it


def test_a_timm_student_is_read_back_with_what_its_training_did(tmp_path):
    timm().save_pretrained(tmp_path / "from")
    args = ModelArguments(model_name_or_path=str(tmp_path / "from"))
    student, kept = build_student(args, NAMES, ANY, MEAN, STD)
    student.save_pretrained(tmp_path / "to")
    again = AutoImageProcessor.from_pretrained(tmp_path / "to")
    assert pixel_format(again) == pixel_format(kept)
    assert not pixel_format(again).crops


@pytest.mark.parametrize("other", ["ViT's", "timm's"])
def test_a_timm_model_keeps_another_processor_in_its_config(other, tmp_path):
    model = timm()
    if other == "ViT's":
        chosen = ViTImageProcessor(size={"height": 24, "width": 20}, image_mean=[0.1] * 3, image_std=[0.3] * 3)
    else:
        chosen = TimmWrapperImageProcessor({"input_size": [3, 24, 20], "mean": [0.1] * 3, "std": [0.3] * 3})
    made = processor_beside(model, chosen)
    model.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert pixel_format(again) == pixel_format(made)
    assert (pixel_format(again).mean, pixel_format(again).std) == ((0.1,) * 3, (0.3,) * 3)
    assert pixel_format(again).size == (24, 20)
    with pytest.raises(ModelLoadError, match="a timm model: expected whole images"):
        processor_beside(model, DeiTImageProcessor(size={"height": 36, "width": 36}, crop_size=SIDE))


def test_a_processor_is_the_one_that_will_be_read_back():
    """One that resizes in Pillow is saved under a name that torchvision's is read by."""
    chosen = ViTImageProcessorPil(size=SIDE, image_mean=MEAN, image_std=STD, resample=3)
    assert pixel_format(processor_beside(vit(), chosen)) == PixelFormat(tuple(MEAN), tuple(STD), (32, 32))
    kept = ViTImageProcessor(size=SIDE)
    assert processor_beside(vit(), kept) is kept
    assert processor_beside(vit(), None) is None


def test_a_processor_of_another_size_than_the_networks_is_refused():
    with pytest.raises(ModelLoadError, match=r"ViTImageProcessor: expected images of 32 x 32 px, .* found 48 x 48 px"):
        format_for(vit(), ViTImageProcessor(size={"height": 48, "width": 48}))
