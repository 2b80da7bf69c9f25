"""Images that are evaluated go through a model's image processor once, from what is encoded."""

import pytest
import torch
from transformers import BitImageProcessor, DeiTImageProcessor

from hf_ihb.config.data import DataArguments
from hf_ihb.data import ImageSplit, StreamedSplit, load_image_split, open_image_data
from hf_ihb.data.decoded_cache import DecodedCache
from hf_ihb.errors import DataError
from hf_ihb.evaluation import evaluate_model
from hf_ihb.models.geometry import WholeImage
from hf_ihb.models.pretrained import Pretrained
from hf_ihb.models.processing import pixel_format
from hf_ihb.models.student import ModelArguments, build_student
from tests.image_sets import NAMES, picture, write

SIDE = {"height": 8, "width": 8}
WAYS = ({"decode": "once"}, {"decode": "once", "decoded_memory_fraction": 0.0}, {"decode": "stream"})


@pytest.fixture
def crop():
    return DeiTImageProcessor(size={"height": 12, "width": 12}, crop_size=SIDE)


@pytest.fixture
def images():
    return [picture(seed, (9 + seed % 4, 14 - seed % 3)) for seed in range(12)]


@pytest.fixture
def arguments(tmp_path, images):
    train = [(picture(100 + i, (10, 11)), i % 3) for i in range(30)]
    name = write(tmp_path / "set", train=train, test=[(image, i % 3) for i, image in enumerate(images)])

    def make(**way):
        return DataArguments(name, image_size=10, decoded_cache_dir=str(tmp_path / "decoded"), **way)

    return make


def cropped(processor, images):
    made = processor(images, return_tensors="pt", do_rescale=False, do_normalize=False)["pixel_values"]
    return made.to(torch.uint8)


@pytest.mark.parametrize("way", WAYS, ids=["memory", "file", "stream"])
def test_a_split_that_is_evaluated_is_what_the_processor_makes(arguments, images, crop, way):
    geometry, expected = pixel_format(crop).geometry, cropped(crop, images)
    source = open_image_data(arguments(**way))
    data, (split, _) = source.decoded(geometry), load_image_split(arguments(**way), "test", geometry)
    for found in (data.test, split, source.decoded().test.through(geometry)):
        assert (found.geometry, found.image_size) == (geometry, (8, 8))
        assert torch.equal(found.__getitems__(range(12))["pixel_values"], expected)
        assert found.through(pixel_format(crop).geometry) is found
        assert torch.equal(found.select(torch.tensor([4, 2])).__getitems__([1])["pixel_values"], expected[2:3])
    assert (data.train.geometry, data.validation.geometry) == (None, geometry)
    assert data.train.image_size == (10, 10)  # whole images, as they are trained on
    assert source.decoded().test.image_size == (10, 10)


def test_images_that_came_as_pixels_are_what_they_are(crop):
    split = ImageSplit(torch.zeros(3, 3, 9, 9, dtype=torch.uint8), torch.arange(3), NAMES)
    assert split.through(pixel_format(crop).geometry) is split
    assert split.geometry is None


def test_images_that_a_processor_leaves_at_several_sizes_are_refused_by_row(arguments):
    keeps_shape = BitImageProcessor(size={"shortest_edge": 8}, do_center_crop=False)
    with pytest.raises(DataError, match=r"split 'test', row 1: expected 8 x 12 px .* as of row 0, found 8 x 10"):
        load_image_split(arguments(), "test", pixel_format(keeps_shape).geometry)


def test_grey_images_keep_one_channel(encode, crop):
    grey = [picture(seed, (9 + seed % 4, 14), "L") for seed in range(6)]
    found = encode(grey, mode="L").through(pixel_format(crop).geometry)
    assert found.shape == (6, 1, 8, 8)
    assert torch.equal(found.decode(range(6)), cropped(crop, [image.convert("RGB") for image in grey])[:, :1])


def test_what_they_went_through_is_part_of_what_they_are(encode, images, crop, tmp_path):
    plain = encode(images, size=(8, 8))
    other = DeiTImageProcessor(size={"height": 14, "width": 14}, crop_size=SIDE)
    geometries = [
        pixel_format(crop).geometry,
        pixel_format(other).geometry,
        WholeImage((8, 8)),
        WholeImage((8, 8), "bilinear"),
    ]
    sets = [plain, *(plain.through(geometry) for geometry in geometries)]
    assert {split.size for split in sets} == {(8, 8)}
    assert len({split.fingerprint() for split in sets}) == len({DecodedCache(tmp_path, s).folder for s in sets}) == 5
    assert plain.through(geometries[0]).fingerprint() == sets[1].fingerprint()


def test_each_model_is_shown_the_images_in_its_own_way(arguments, images, crop):
    """Model and baseline of one evaluation crop in two ways, and a stream is read in threads."""
    model, own = build_student(ModelArguments(architecture="resnet18_cifar_w16"), NAMES, (8, 8), [0.5] * 3, [0.2] * 3)
    small, large = pixel_format(own), pixel_format(crop)
    split, _ = load_image_split(arguments(), "test", small.geometry)
    subjects = [Pretrained(model.eval(), pixels, "tiny", None) for pixels in (small, large)]
    seen = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    evaluate_model(subjects[0], split, baseline=subjects[1], device="cpu")
    handle.remove()
    for found, processor in zip(seen, (own, crop), strict=True):
        torch.testing.assert_close(found, processor(images, return_tensors="pt")["pixel_values"], rtol=0, atol=1e-5)
    assert isinstance(split.through(large.geometry), StreamedSplit)
