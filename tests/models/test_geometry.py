"""What is read off an image processor is what it does: equality with the processor itself, picture by picture."""

import functools

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessor,
    ConvNextImageProcessor,
    ConvNextImageProcessorPil,
    DeiTImageProcessor,
    DonutImageProcessor,
    EfficientNetImageProcessor,
    LevitImageProcessor,
    MobileNetV2ImageProcessor,
    MobileViTImageProcessor,
    PoolFormerImageProcessor,
    Siglip2ImageProcessor,
    ViTImageProcessor,
    ViTImageProcessorPil,
)
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from hf_ihb.errors import ModelLoadError
from hf_ihb.models.geometry import ProcessorGeometry, WholeImage
from hf_ihb.models.processing import PixelFormat, pixel_format, student_processor, timm_processor, whole_image_processor

MEAN, STD = [0.49, 0.48, 0.45], [0.2, 0.3, 0.25]
NORMALIZED = {"image_mean": MEAN, "image_std": STD}
SIDE = {"height": 32, "width": 32}


def timm(**changed):
    config = {"input_size": [3, 32, 32], "mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_pct": 0.875}
    return TimmWrapperImageProcessor(config | changed)


PROCESSORS = {
    "whole": lambda: student_processor(MEAN, STD, (32, 24)),
    "bilinear": lambda: ViTImageProcessor(size=SIDE, resample=2, **NORMALIZED),
    "nearest": lambda: ViTImageProcessor(size=SIDE, resample=0),
    "in Pillow": lambda: ViTImageProcessorPil(size=SIDE, resample=3),
    "crop": lambda: DeiTImageProcessor(size={"height": 36, "width": 36}, crop_size=SIDE, **NORMALIZED),
    "crop larger than the image": lambda: DeiTImageProcessor(do_resize=False, crop_size={"height": 64, "width": 64}),
    "shorter edge, crop": lambda: BitImageProcessor(size={"shortest_edge": 40}, crop_size=SIDE, **NORMALIZED),
    "shorter edge": lambda: BitImageProcessor(size={"shortest_edge": 40}, do_center_crop=False),
    "crop_pct": lambda: ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.8, **NORMALIZED),
    "crop_pct in Pillow": lambda: ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=0.8),
    "squeezed when large": lambda: ConvNextImageProcessor(size={"shortest_edge": 384}),
    "LeViT's own ratio": lambda: LevitImageProcessor(size={"shortest_edge": 40}, crop_size=SIDE),
    "PoolFormer's own ratio": lambda: PoolFormerImageProcessor(size={"shortest_edge": 40}, crop_size=SIDE),
    "offset, normalised twice": lambda: EfficientNetImageProcessor(
        size=SIDE, rescale_factor=1 / 127.5, rescale_offset=True, include_top=True, **NORMALIZED
    ),
    "another factor": lambda: ViTImageProcessor(size=SIDE, rescale_factor=1 / 127.5, image_mean=[1.0] * 3),
    "levels as they are": lambda: ViTImageProcessor(size=SIDE, do_rescale=False, do_normalize=False),
    "BGR": lambda: MobileViTImageProcessor(size={"shortest_edge": 40}, crop_size=SIDE),
    "no resize": lambda: MobileNetV2ImageProcessor(do_resize=False, do_center_crop=False, **NORMALIZED),
    "nothing": lambda: MobileNetV2ImageProcessor(
        do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False
    ),
    "timm, crop": timm,
    "timm, squashed": lambda: timm(crop_mode="squash"),
    "timm, with a border": lambda: timm(crop_mode="border", crop_pct=1.0),
    "timm, not square": lambda: timm(input_size=[3, 32, 24], interpolation="bilinear"),
}
SHAPES = [(40, 28), (25, 47), (32, 32)]  # none of those that the processor is asked with


def picture(shape, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8))


def seen(processor, image):
    return processor([image], return_tensors="pt")["pixel_values"].float()


@functools.cache
def format_of(name):
    return pixel_format(PROCESSORS[name]())


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1)).item()


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_picture_goes_through_what_the_processor_does(name):
    processor = PROCESSORS[name]()
    pixels = format_of(name)
    for seed, shape in enumerate(SHAPES):
        image = picture(shape, seed)
        expected = seen(processor, image)
        stored = pixels.geometry.of_picture(image)[None]
        assert stored.dtype == torch.uint8
        assert relative(pixels.apply(stored, pixels.geometry), expected) < 1e-5
        assert pixels.size is None or tuple(expected.shape[-2:]) == pixels.size


@pytest.mark.parametrize("name", [name for name in PROCESSORS if "timm" not in name])
def test_a_batch_of_stored_images_goes_through_what_the_processor_does(name):
    processor = PROCESSORS[name]()
    pixels = format_of(name)
    images = [picture((40, 28), seed) for seed in range(3)]
    stored = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    expected = torch.cat([seen(processor, image) for image in images])
    assert relative(pixels.apply(stored), expected) < 1e-5
    grey = stored[:, :1]
    torch.testing.assert_close(pixels.apply(grey), pixels.apply(grey.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize("name", ["crop", "crop_pct", "BGR", "another factor", "timm, crop", "whole"])
def test_mixed_images_in_floats_are_shown_like_stored_ones(name):
    pixels = format_of(name)
    smooth = torch.linspace(60, 190, 40 * 28).reshape(1, 1, 40, 28).expand(2, 3, -1, -1).round().to(torch.uint8)
    stored, floats = pixels.apply(smooth), pixels.apply(smooth.float() / 255)
    level = max(1 / (255 * s) for s in pixels.std)
    assert (stored - floats).abs().max() < 1.01 * level  # rounded once


REFUSED = {
    "'do_pad'": lambda: ViTImageProcessor(size=SIDE, do_pad=True, pad_size={"height": 40, "width": 40}),
    "'do_pad', 'do_thumbnail'": lambda: DonutImageProcessor(size=SIDE),
    "of (3, 16, 16) pixels": Siglip2ImageProcessor,
    "an error": lambda: object(),
}


@pytest.mark.parametrize("step", REFUSED)
def test_a_step_without_counterpart_is_refused_by_name(step):
    processor = REFUSED[step]()
    with pytest.raises(ModelLoadError) as caught:
        pixel_format(processor)
    assert f"image processor {type(processor).__name__}: " in str(caught.value)
    assert step in str(caught.value)
    assert "\n" not in str(caught.value)


def test_levels_that_depend_on_the_image_are_refused():
    class Equalizing(ViTImageProcessor):
        def rescale_and_normalize(self, images, *args, **kwargs):
            images = super().rescale_and_normalize(images, *args, **kwargs)
            return images - images.square()

    with pytest.raises(ModelLoadError, match=r"Equalizing: .* levels that are not scaled and shifted"):
        pixel_format(Equalizing(size=SIDE))


@pytest.mark.parametrize("name", [name for name in PROCESSORS if name not in ("nothing", "timm, with a border")])
def test_a_student_of_weights_is_shown_whole_images_with_their_levels_and_filter(name):
    processor = PROCESSORS[name]()
    theirs, made = format_of(name), whole_image_processor(processor, (28, 20))
    ours = pixel_format(made)
    assert (ours.size, ours.crops, ours.flips) == ((28, 20), False, theirs.flips)
    if "timm" not in name and name != "in Pillow":
        assert ours.geometry == WholeImage((28, 20), theirs.interpolation)
    image = picture((28, 20))  # of that size already: what remains is levels
    stored = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    assert relative(seen(made, image), theirs.apply(stored, theirs.geometry)) < 1e-5


def test_a_crop_is_told_from_whole_images():
    crops = {name: format_of(name).crops for name in PROCESSORS}
    whole = {"whole", "bilinear", "in Pillow", "squeezed when large", "offset, normalised twice", "another factor"}
    whole |= {"levels as they are", "shorter edge", "no resize", "nothing", "nearest"}
    assert {name for name, crop in crops.items() if not crop} == whole
    pixels = format_of("crop")
    assert pixels.whole().geometry == WholeImage((32, 32), pixels.interpolation)
    assert pixels.whole((20, 24)).size == (20, 24)
    assert not pixels.whole().crops


def test_a_timm_models_config_holds_what_it_can():
    made = timm_processor(PixelFormat(tuple(MEAN), tuple(STD), (24, 32), "bilinear"))
    again = TimmWrapperImageProcessor(dict(made.data_config))
    image = picture((50, 30))
    assert torch.equal(seen(made, image), seen(again, image))
    assert pixel_format(again).resembles(PixelFormat(tuple(MEAN), tuple(STD), (24, 32), "bilinear"))
    for name in ("crop", "BGR"):
        with pytest.raises(ModelLoadError, match="a timm model: expected whole images"):
            timm_processor(format_of(name))


def test_geometries_are_equal_where_their_processors_are():
    crop, other = PROCESSORS["crop"], PROCESSORS["shorter edge, crop"]
    assert ProcessorGeometry(crop()) == ProcessorGeometry(crop())
    assert hash(ProcessorGeometry(crop())) == hash(ProcessorGeometry(crop()))
    assert ProcessorGeometry(crop()) != ProcessorGeometry(other())
    assert pixel_format(crop()) == pixel_format(crop())
    descriptions = [format_of(name).description() for name in PROCESSORS]
    assert all(a != b for i, a in enumerate(descriptions) for b in descriptions[:i])
