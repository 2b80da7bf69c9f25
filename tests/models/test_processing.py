import pytest
import torch

from hf_ihb.models.processing import PixelFormat, pixel_format, student_processor

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.5)


@pytest.fixture
def images(generator):
    return torch.rand(4, 3, 6, 8, generator=generator)


@pytest.mark.parametrize("size", [None, (12, 10)])
def test_a_grey_image_is_three_equal_channels_to_a_colour_model(images, size):
    pixels = PixelFormat(MEAN, STD, size)
    grey = images[:, :1]
    found = pixels.apply(grey)
    assert found.shape == (4, 3, *(size or (6, 8)))
    assert torch.equal(found, pixels.apply(grey.expand(-1, 3, -1, -1)))


def test_a_colour_image_is_its_mean_to_a_grey_model(images):
    found = PixelFormat((0.4,), (0.2,), None).apply(images)
    torch.testing.assert_close(found, (images.mean(1, keepdim=True) - 0.4) / 0.2)
    grey = images[:, :1]
    torch.testing.assert_close(PixelFormat((0.4,), (0.2,), None).apply(grey), (grey - 0.4) / 0.2)


def test_a_processor_with_equal_means_normalises_grey_images(images):
    grey = images[:, :1]
    found = pixel_format(student_processor([0.4] * 3, [0.2] * 3, (6, 8))).apply(grey)
    torch.testing.assert_close(found, ((grey - 0.4) / 0.2).expand(-1, 3, -1, -1))


def test_each_channel_has_its_own_mean_and_deviation(images):
    found = PixelFormat(MEAN, STD, None).apply(images)
    for channel in range(3):
        torch.testing.assert_close(found[:, channel], (images[:, channel] - MEAN[channel]) / STD[channel])
