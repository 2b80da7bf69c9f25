import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import beta as beta_distribution
from scipy.stats import ks_2samp
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from hf_ihb.augment.ops import (
    ERASING_TRIES,
    beta_from_uniform,
    box_mask,
    crop_flip,
    cutmix_weight,
    cutout,
    erase,
    erasing_rectangles,
    mix,
    rectangle_mask,
    smoothed_one_hot,
)
from hf_ihb.functional.geometry import identity_affine
from hf_ihb.functional.random import counter_uniforms


def crop_parameters(generator, batch, padding):
    top = torch.randint(2 * padding + 1, (batch,), generator=generator)
    left = torch.randint(2 * padding + 1, (batch,), generator=generator)
    return top, left, torch.rand(batch, generator=generator) < 0.5


def brute_box(y, x, box_height, box_width, height, width):
    covered = np.zeros((height, width), dtype=bool)
    for row in range(height):
        for column in range(width):
            in_rows = y - box_height // 2 <= row < y + box_height // 2
            covered[row, column] = in_rows and x - box_width // 2 <= column < x + box_width // 2
    return torch.from_numpy(covered)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64])
@pytest.mark.parametrize(("height", "width", "padding"), [(8, 8, 2), (32, 32, 4), (5, 9, 3), (4, 6, 0), (3, 3, 7)])
def test_crop_flip_equals_torchvision_for_each_sample(generator, dtype, height, width, padding):
    images = torch.randint(1, 256, (24, 3, height, width), generator=generator).to(dtype)
    top, left, flip = crop_parameters(generator, 24, padding)
    views, _ = crop_flip(images, torch.stack((top, left), dim=1), flip, padding)
    assert views.dtype == dtype
    for image, view, t, l, mirrored in zip(images, views, top.tolist(), left.tolist(), flip.tolist(), strict=True):  # noqa: E741
        expected = tv.crop(tv.pad(image, [padding] * 4), t, l, height, width)
        assert torch.equal(view, tv.horizontal_flip(expected) if mirrored else expected)


@pytest.mark.parametrize(("height", "width", "padding"), [(8, 8, 2), (32, 32, 4), (6, 10, 3)])
def test_the_affine_of_crop_flip_resamples_the_same_view(generator, height, width, padding):
    images = torch.rand(32, 3, height, width, generator=generator, dtype=torch.float64)
    top, left, flip = crop_parameters(generator, 32, padding)
    views, affine = crop_flip(images, torch.stack((top, left), dim=1), flip, padding)
    grid = F.affine_grid(affine.double(), images.shape, align_corners=False)
    sampled = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    torch.testing.assert_close(sampled, views, rtol=0, atol=1e-5)


def test_an_image_that_stays_where_it_is_has_the_identity_affine(generator):
    images = torch.rand(3, 1, 6, 6, generator=generator)
    views, affine = crop_flip(images, torch.full((3, 2), 2), torch.zeros(3, dtype=torch.bool), 2)
    assert torch.equal(views, images)
    assert torch.equal(affine, identity_affine(3))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 11)])
def test_box_mask_equals_loops_over_pixels(generator, height, width):
    batch = 40
    y, x = (torch.randint(n, (batch,), generator=generator) for n in (height, width))
    tall, wide = (torch.randint(n + 4, (batch,), generator=generator) for n in (height, width))
    masks = box_mask(torch.stack((y, x), dim=1), torch.stack((tall, wide), dim=1), height, width)
    assert masks.shape == (batch, 1, height, width)
    for mask, *box in zip(masks[:, 0], *(v.tolist() for v in (y, x, tall, wide)), strict=True):
        assert torch.equal(mask, brute_box(*box, height, width))


@pytest.mark.parametrize("size", [0, 1, 2, 5, 8, 40])
def test_cutout_replaces_exactly_the_clipped_square_by_the_fill(generator, size):
    images = torch.rand(20, 3, 8, 12, generator=generator)
    y, x = torch.randint(8, (20,), generator=generator), torch.randint(12, (20,), generator=generator)
    fill = torch.tensor([2.0, 3.0, 4.0])
    result = cutout(images, torch.stack((y, x), dim=1), size, fill)
    for i in range(20):
        covered = brute_box(int(y[i]), int(x[i]), size, size, 8, 12)
        expected = images[i].clone()
        expected[:, covered] = fill[:, None].expand(-1, int(covered.sum()))
        assert torch.equal(result[i], expected)


def test_an_even_cutout_inside_the_image_covers_its_side_squared():
    covered = cutout(torch.zeros(1, 1, 9, 9), torch.tensor([[4, 4]]), 4, torch.ones(1)).sum()
    assert covered == 16


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 11)])
def test_rectangle_mask_equals_slicing(generator, height, width):
    top, left = (torch.randint(-3, n + 3, (40,), generator=generator) for n in (height, width))
    tall, wide = (torch.randint(n + 4, (40,), generator=generator) for n in (height, width))
    masks = rectangle_mask(torch.stack((top, left), dim=1), torch.stack((tall, wide), dim=1), height, width)
    for mask, t, l, h, w in zip(masks[:, 0], *(v.tolist() for v in (top, left, tall, wide)), strict=True):  # noqa: E741
        expected = torch.zeros(height, width, dtype=torch.bool)
        expected[max(t, 0) : max(t + h, 0), max(l, 0) : max(l + w, 0)] = True
        assert torch.equal(mask, expected)


def erasing_loop(u, height, width):
    """One try after the other, in Python floats."""
    for k in range(ERASING_TRIES):
        pixels = height * width * (0.02 + 0.31 * u[2 + k])
        ratio = math.exp(math.log(0.3) + (math.log(3.3) - math.log(0.3)) * u[2 + ERASING_TRIES + k])
        tall, wide = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if tall < height and wide < width:
            return int(u[0] * (height - tall + 1)), int(u[1] * (width - wide + 1)), tall, wide
    return None


@pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 8), (4, 40), (1, 9)])
def test_tries_drawn_at_once_equal_a_loop_that_rejects(generator, height, width):
    u = torch.rand(400, 2 + 2 * ERASING_TRIES, generator=generator)
    found = torch.cat(erasing_rectangles(u, height, width), dim=1).tolist()
    expected = [erasing_loop(row, height, width) for row in u.tolist()]
    differing = sum(f[2:] != [0, 0] if e is None else f != list(e) for f, e in zip(found, expected, strict=True))
    assert differing <= 2  # sides that lie on a half to seven digits
    assert any(e is None for e in expected) == (height != width)  # then it is nothing that is erased


@pytest.mark.parametrize(("height", "width"), [(32, 32), (12, 40)])
def test_erased_rectangles_are_distributed_as_torchvisions(height, width):
    u = counter_uniforms(0, 0, torch.arange(3000), 7, 2 + 2 * ERASING_TRIES)
    ours = torch.cat(erasing_rectangles(u, height, width), dim=1)
    transform, image = v2.RandomErasing(), torch.zeros(3, height, width)
    drawn = [transform.make_params([image]) for _ in range(3000)]
    theirs = torch.tensor([[d["i"], d["j"], d["h"], d["w"]] for d in drawn if d["v"] is not None])
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    for a, b in zip((*ours.T, ours[:, 2] * ours[:, 3]), (*theirs.T, theirs[:, 2] * theirs[:, 3]), strict=True):
        assert ks_2samp(a.numpy(), b.numpy()).pvalue > 1e-3


def test_erasing_replaces_exactly_the_rectangle_by_the_fill(generator):
    images, fill = torch.rand(30, 3, 12, 16, generator=generator), torch.tensor([2.0, 3.0, 4.0])
    rectangles = erasing_rectangles(torch.rand(30, 2 + 2 * ERASING_TRIES, generator=generator), 12, 16)
    found = erase(images, *rectangles, fill)
    for image, result, (top, left, tall, wide) in zip(
        images, found, torch.cat(rectangles, dim=1).tolist(), strict=True
    ):
        assert torch.equal(result, tv.erase(image, top, left, tall, wide, fill[:, None, None]))


def test_cutmix_share_is_the_share_of_pixels_that_stay(generator):
    batch, height, width = 60, 9, 14
    lam = torch.rand(batch, generator=generator)
    y, x = torch.randint(height, (batch,), generator=generator), torch.randint(width, (batch,), generator=generator)
    weight, share = cutmix_weight(lam, torch.stack((y, x), dim=1), height, width)
    assert weight.shape == (batch, 1, height, width)
    for i in range(batch):
        side = math.sqrt(1 - lam[i].item())
        pasted = brute_box(int(y[i]), int(x[i]), int(height * side), int(width * side), height, width)
        assert torch.equal(weight[i, 0], (~pasted).float())
        assert share[i].item() == pytest.approx(1 - pasted.float().mean().item(), abs=1e-6)


@pytest.mark.parametrize(("lam", "share"), [(1.0, 1.0), (0.0, 0.0), (0.75, 0.75)])
def test_an_unclipped_cutmix_box_has_its_nominal_share(lam, share):
    assert cutmix_weight(torch.tensor([lam]), torch.tensor([[8, 8]]), 16, 16)[1].item() == share


def test_beta_with_alpha_one_is_the_identity():
    u = torch.arange(0, 1, 1e-4)
    torch.testing.assert_close(beta_from_uniform(u, 1.0), u, rtol=0, atol=2**-16)


def test_beta_with_alpha_one_half_is_the_arcsine_law():
    u = torch.arange(1e-3, 0.999, 1e-4, dtype=torch.float64)
    expected = (torch.pi * u / 2).sin().square().float()
    torch.testing.assert_close(beta_from_uniform(u.float(), 0.5), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 4.0])
def test_beta_has_the_moments_of_its_distribution(alpha):
    u = (torch.arange(200_000) + 0.5) / 200_000
    values = beta_from_uniform(u, alpha).double()
    assert values.min() > 0
    assert values.max() < 1 or alpha < 0.5  # below, the last quantiles round to 1 in float32
    for power in (1, 2, 3, 4):
        expected = beta_distribution(alpha, alpha).moment(power)
        assert values.pow(power).mean().item() == pytest.approx(expected, abs=1e-4)


def test_beta_is_defined_at_the_ends_of_the_unit_interval_and_rises():
    u = torch.tensor([0.0, 2.0**-24, 0.25, 0.5, 0.75, 1 - 2.0**-24])
    values = beta_from_uniform(u, 0.8)
    assert torch.isfinite(values).all()
    assert (values.diff() >= 0).all()
    assert values[3].item() == pytest.approx(0.5, abs=1e-4)


def test_mix_is_the_convex_combination(generator):
    first, second = torch.rand(2, 5, 3, 4, 4, generator=generator)
    weight = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0])[:, None, None, None]
    mixed = mix(first, second, weight)
    assert torch.equal(mixed[0], second[0])
    assert torch.equal(mixed[4], first[4])
    expected = weight.numpy() * first.numpy() + (1 - weight.numpy()) * second.numpy()
    np.testing.assert_allclose(mixed.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_cross_entropy_of_smoothed_labels_is_that_of_label_smoothing(generator, smoothing):
    logits = torch.randn(32, 7, generator=generator)
    labels = torch.randint(7, (32,), generator=generator)
    targets = smoothed_one_hot(labels, 7, smoothing)
    torch.testing.assert_close(targets.sum(1), torch.ones(32))
    torch.testing.assert_close(
        F.cross_entropy(logits, targets), F.cross_entropy(logits, labels, label_smoothing=smoothing)
    )
