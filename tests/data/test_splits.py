import numpy as np
import pytest
import torch

from hf_ihb.data import ImageSplit, collate_images
from tests.image_sets import NAMES


@pytest.fixture
def split(generator):
    images = torch.randint(256, (40, 3, 5, 7), generator=generator, dtype=torch.uint8)
    return ImageSplit(images, torch.arange(40) % 3, NAMES)


def test_a_batch_equals_its_items(split):
    indices = [3, 0, 39, 3]
    batch, items = collate_images(split.__getitems__(indices)), [split[i] for i in indices]
    assert batch.pop("rows").tolist() == indices
    assert batch.pop("split") == split.key
    assert batch.keys() == items[0].keys() == {"pixel_values", "labels", "index"}
    for i, item in enumerate(items):
        assert torch.equal(batch["pixel_values"][i], item["pixel_values"])
        assert batch["labels"][i] == item["labels"]
        assert batch["index"][i] == item["index"] == indices[i]
    stacked = collate_images(items)
    assert all(torch.equal(stacked[name], batch[name]) for name in batch)


def test_a_data_loader_gives_whole_batches(split):
    loader = torch.utils.data.DataLoader(split, 16, collate_fn=collate_images)
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in loader]), split.images)
    assert torch.equal(torch.cat([batch["index"] for batch in loader]), torch.arange(40))


def test_selected_rows_are_numbered_anew(split):
    part = split.select(np.array([5, 2]))
    assert [part[i]["index"] for i in range(2)] == [0, 1]
    assert torch.equal(part.images, split.images[[5, 2]])
    assert part.label_names == NAMES


def test_statistics_equal_numpy(split):
    mean, std = split.statistics()
    pixels = split.images.numpy() / 255
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 2, 3)), atol=5.1e-5)
    np.testing.assert_allclose(std, pixels.std(axis=(0, 2, 3)), atol=5.1e-5)


def test_the_deviation_of_a_constant_channel_can_be_divided_by():
    constant = ImageSplit(torch.full((4, 3, 2, 2), 7, dtype=torch.uint8), torch.zeros(4, dtype=torch.long), ["a"])
    assert min(constant.statistics()[1]) > 0
