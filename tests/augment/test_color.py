import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy.stats import chisquare, kstest
from torchvision.transforms.v2 import functional as tv

from hf_ihb.augment import color
from hf_ihb.functional.random import counter_uniforms

SHAPES = [(3, 8, 8), (1, 28, 28), (3, 5, 9), (1, 8, 8), (3, 32, 32)]
FACTORS = torch.linspace(0, 2, 24)

# ours, torchvision's for one image, parameters, largest difference in grey levels
OPERATIONS = {
    "brightness": (color.adjust_brightness, tv.adjust_brightness, FACTORS, 0),
    "contrast": (color.adjust_contrast, tv.adjust_contrast, FACTORS, 1),
    "saturation": (color.adjust_saturation, tv.adjust_saturation, FACTORS, 1),
    "sharpness": (color.adjust_sharpness, tv.adjust_sharpness, FACTORS, 1),
    "hue": (color.adjust_hue, tv.adjust_hue, torch.linspace(-0.5, 0.5, 24), 1),
    "posterize": (color.posterize, lambda image, bits: tv.posterize(image, int(bits)), torch.arange(24) % 9, 0),
    "solarize": (color.solarize, tv.solarize, torch.linspace(0, 255, 24), 0),
    "autocontrast": (lambda images, _: color.autocontrast(images), lambda image, _: tv.autocontrast(image), FACTORS, 0),
    "equalize": (lambda images, _: color.equalize(images), lambda image, _: tv.equalize(image), FACTORS, 0),
    "invert": (lambda images, _: color.invert(images), lambda image, _: tv.invert(image), FACTORS, 0),
}  # fmt: skip


def pictures(shape, generator):
    """24 images: noise, narrow ranges, few colours, slopes, one colour, black, white."""
    channels, height, width = shape
    noise = torch.randint(256, (12, *shape), generator=generator)
    narrow = torch.randint(90, 110, (3, *shape), generator=generator)
    few = 51 * torch.randint(6, (3, *shape), generator=generator)
    slope = torch.linspace(0, 255, height * width).view(1, height, width).expand(3, channels, -1, -1).clone()
    slope[1] = slope[1].flip(0, 2)
    slope[2, 0] = slope[2, 0].flip(1)
    flat = torch.tensor([0, 255, 17])[:, None, None, None].expand(-1, *shape)
    return torch.cat((noise, narrow, few, slope.long(), flat)).to(torch.uint8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_equals_torchvision_for_each_sample(generator, name, shape):
    ours, theirs, parameters, tolerance = OPERATIONS[name]
    images = pictures(shape, generator)
    for shift in (0, 7):  # two parameters for each image
        drawn = parameters.roll(shift)
        found = ours(images, drawn)
        expected = torch.stack([theirs(image, value) for image, value in zip(images, drawn.tolist(), strict=True)])
        assert found.dtype == torch.uint8
        difference = (found.int() - expected.int()).abs()
        assert difference.max() <= tolerance
        assert (difference > 0).float().mean() < 2e-3  # a fraction that is an edge of a level, not a level lost


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["posterize", "equalize", "invert", "solarize"])
def test_a_whole_number_operation_equals_pil(generator, name, shape):
    images = pictures(shape, generator)
    ours, theirs = {
        "posterize": (color.posterize(images, torch.full((24,), 3)), lambda image: ImageOps.posterize(image, 3)),
        "solarize": (color.solarize(images, torch.full((24,), 100.0)), lambda image: ImageOps.solarize(image, 100)),
        "equalize": (color.equalize(images), ImageOps.equalize),
        "invert": (color.invert(images), ImageOps.invert),
    }[name]
    for image, found in zip(images, ours, strict=True):
        expected = theirs(Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()))
        np.testing.assert_array_equal(found.permute(1, 2, 0).squeeze(2).numpy(), np.asarray(expected))


@pytest.mark.parametrize("shape", [(3, 5, 9), (1, 8, 8)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_does_not_depend_on_the_rest_of_the_batch_nor_changes_its_input(generator, name, shape):
    operation, _, parameters, _ = OPERATIONS[name]
    images = pictures(shape, generator)
    before = images.clone()
    whole = operation(images, parameters)
    assert torch.equal(images, before)
    for i in range(24):
        assert torch.equal(operation(images[i : i + 1], parameters[i : i + 1])[0], whole[i])


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "sharpness", "hue"])
def test_the_middle_parameter_changes_nothing(generator, name):
    images = torch.randint(256, (40, 3, 16, 16), generator=generator, dtype=torch.uint8)
    middle = torch.full((40,), 0.0 if name == "hue" else 1.0)
    assert torch.equal(OPERATIONS[name][0](images, middle), images)


@pytest.mark.parametrize("name", ["saturation", "hue"])
def test_one_channel_has_no_colour_to_change(generator, name):
    images = torch.randint(256, (24, 1, 8, 8), generator=generator, dtype=torch.uint8)
    assert torch.equal(OPERATIONS[name][0](images, OPERATIONS[name][2]), images)


@pytest.mark.parametrize("shape", [(3, 2, 9), (3, 9, 2), (1, 1, 1)])
def test_an_image_without_inner_pixels_is_as_sharp_as_it_gets(generator, shape):
    images = torch.randint(256, (4, *shape), generator=generator, dtype=torch.uint8)
    assert torch.equal(color.adjust_sharpness(images, torch.zeros(4)), images)


def test_what_each_sample_drew_reaches_that_sample_once(generator):
    images, choice = torch.arange(50.0)[:, None], torch.randint(4, (50,), generator=generator)
    choice[choice == 2] = 3  # nobody draws 2
    called = []

    def function(drawn, part, rows):
        called.append(drawn)
        assert torch.equal(part[:, 0].long(), rows)
        return part + 100 * drawn

    assert torch.equal(color.apply_by_choice(images, choice, range(4), function)[:, 0], torch.arange(50) + 100 * choice)
    assert called == [0, 1, 3]


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 8)])
@pytest.mark.parametrize("amounts", [(0.4, 0.4, 0.4, 0.4), (0.0, 1.0, 0.0, 0.5), (0.2, 0.0, 0.0, 0.0)])
def test_jitter_equals_torchvision_in_each_samples_own_order(generator, shape, amounts):
    images = torch.randint(256, (48, *shape), generator=generator, dtype=torch.uint8)
    order, parameters = color.jitter_draws(torch.rand(48, 8, generator=generator), amounts)
    assert order.unique(dim=0).shape[0] > 12
    found = color.color_jitter(images, order, parameters, amounts)
    adjust = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    differing = 0
    for i, expected in enumerate(images):
        for k in order[i].tolist():
            expected = adjust[k](expected, parameters[i, k].item()) if amounts[k] else expected
        difference = (found[i].int() - expected.int()).abs()
        assert difference.max() <= 4  # one level an operation
        differing += int((difference > 0).sum())
    assert differing < 2e-3 * images.numel()


def test_jitter_draws_orders_and_factors_uniformly():
    amounts = (0.1, 1.0, 0.5, 0.25)
    order, parameters = color.jitter_draws(counter_uniforms(0, 0, torch.arange(24_000), 5, 8), amounts)
    codes = (order * torch.tensor([64, 16, 4, 1])).sum(dim=1)
    permutations = [64 * a + 16 * b + 4 * c + d for a, b, c, d in itertools.permutations(range(4))]
    counts = [(codes == code).sum().item() for code in permutations]
    assert sum(counts) == 24_000
    assert chisquare(counts).pvalue > 1e-3
    for values, middle, amount in zip(parameters.unbind(1), (1, 1, 1, 0), amounts, strict=True):
        assert kstest(values.double().numpy(), "uniform", (middle - amount, 2 * amount)).pvalue > 1e-3
    correlation = torch.corrcoef(torch.cat((order.float(), parameters), dim=1).T)[4:, :]
    correlation[:, 4:] -= torch.eye(4)
    assert correlation.abs().max() < 5 / 24_000**0.5
