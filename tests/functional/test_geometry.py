import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as tv

from hf_ihb.augment.ops import crop_flip
from hf_ihb.augment.policies import Operation, apply_operations
from hf_ihb.functional.geometry import affine_matrix, compose_affines, identity_affine, warp
from hf_ihb.functional.tokens import resample_tokens

SIZES = [(8, 8), (28, 28), (7, 12)]


def draw_parameters(generator, batch, size):
    """Everything at once: rotation, whole and broken shifts, scale, two shears, a centre of its own."""

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(batch, *shape, generator=generator)

    shift = uniform(-0.3, 0.3, 2) * torch.tensor([size[1], size[0]])
    shift[: batch // 2].round_()
    return {
        "degrees": uniform(-180, 180),
        "translate": shift,
        "scale": uniform(0.5, 2),
        "slope": uniform(-1, 1, 2),
        "center": uniform(-4, 4, 2),
    }


def torchvision_arguments(parameters, i, size):
    return {
        "angle": parameters["degrees"][i].item(),
        "translate": parameters["translate"][i].tolist(),
        "scale": parameters["scale"][i].item(),
        "shear": torch.rad2deg(parameters["slope"][i].atan()).tolist(),
        "center": [c + s / 2 for c, s in zip(parameters["center"][i].tolist(), reversed(size), strict=True)],
    }


def source_pixels(affine, size):
    """Where each output pixel looks, in pixel numbers, in float64: ``(B, H, W)`` x and y."""
    height, width = size
    y, x = np.meshgrid((2 * np.arange(height) + 1) / height - 1, (2 * np.arange(width) + 1) / width - 1, indexing="ij")
    source = np.einsum("brc,chw->brhw", affine.double().numpy(), np.stack((x, y, np.ones_like(x))))
    return (torch.from_numpy((source[:, k] + 1) * n / 2 - 0.5) for k, n in ((0, width), (1, height)))


def away_from_ties(images, affine, interpolation):
    """``(B, C, H, W)`` bool: rounding alone does not choose between two pixels ('nearest') or levels ('bilinear')."""
    if interpolation == "nearest":
        values = torch.stack(tuple(source_pixels(affine, images.shape[-2:])), dim=1)
        return (((values % 1) - 0.5).abs() > 1e-3).all(dim=1, keepdim=True).expand(images.shape)
    grid = F.affine_grid(affine.double(), images.shape, align_corners=False)
    values = F.grid_sample(images.double(), grid, align_corners=False)
    return ((values % 1) - 0.5).abs() > 1e-2


@pytest.mark.parametrize("size", SIZES)
def test_the_affine_is_the_inverse_of_shear_scale_rotate_and_shift(generator, size):
    parameters = draw_parameters(generator, 20, size)
    affine = affine_matrix(size, **parameters)
    to_pixels = np.diag([size[1] / 2, size[0] / 2, 1])
    for i in range(20):
        degrees, (tx, ty), scale, (kx, ky), (cx, cy) = (v[i].double().numpy() for v in parameters.values())
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        steps = [
            [[1, 0, -cx], [0, 1, -cy], [0, 0, 1]],
            [[1, -kx, 0], [0, 1, 0], [0, 0, 1]],
            [[1, 0, 0], [-ky, 1, 0], [0, 0, 1]],
            [[scale, 0, 0], [0, scale, 0], [0, 0, 1]],
            [[c, -s, 0], [s, c, 0], [0, 0, 1]],
            [[1, 0, cx + tx], [0, 1, cy + ty], [0, 0, 1]],
        ]
        forward = np.linalg.multi_dot([np.array(step, dtype=float) for step in reversed(steps)])
        expected = np.linalg.inv(to_pixels) @ np.linalg.inv(forward) @ to_pixels
        np.testing.assert_allclose(affine[i].numpy(), expected[:2], atol=2e-5)


@pytest.mark.parametrize(("interpolation", "fill"), [("nearest", None), ("nearest", 200), ("bilinear", None)])
@pytest.mark.parametrize(("channels", "size"), [(3, (8, 8)), (1, (28, 28)), (1, (7, 12)), (3, (12, 7))])
def test_a_warp_equals_torchvision_for_each_sample_except_on_ties(generator, channels, size, interpolation, fill):
    images = torch.randint(256, (16, channels, *size), generator=generator, dtype=torch.uint8)
    parameters = draw_parameters(generator, 16, size)
    affine = affine_matrix(size, **parameters)
    warped, decided = warp(images, affine, interpolation, fill or 0), away_from_ties(images, affine, interpolation)
    assert decided.float().mean() > 0.95
    mode = tv.InterpolationMode(interpolation)
    for i, image in enumerate(images):
        expected = tv.affine(image, **torchvision_arguments(parameters, i, size), interpolation=mode, fill=fill)
        assert torch.equal(warped[i][decided[i]], expected[decided[i]])
        assert (warped[i].int() - expected.int()).abs().max() <= 1 or interpolation == "nearest"


def test_a_bilinear_warp_blends_the_border_into_the_fill(generator):
    images = torch.randint(256, (10, 3, 8, 9), generator=generator, dtype=torch.uint8)
    affine = affine_matrix((8, 9), **draw_parameters(generator, 10, (8, 9)))
    grid = F.affine_grid(affine.double(), images.shape, align_corners=False)
    share = F.grid_sample(torch.ones(10, 1, 8, 9).double(), grid, align_corners=False)
    expected = F.grid_sample(images.double(), grid, align_corners=False) + (1 - share) * 77
    assert (warp(images, affine, "bilinear", 77) - expected).abs().max() < 0.5 + 1e-3


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("size", SIZES)
def test_whole_shifts_and_quarter_turns_move_pixels_unchanged(generator, interpolation, size):
    images = torch.randint(256, (9, 3, *size), generator=generator, dtype=torch.uint8)
    still = torch.zeros(9)
    shift = torch.tensor([[dx, dy] for dx in (-3, 0, 2) for dy in (-1, 0, 5)]).float()
    shifted = warp(images, affine_matrix(size, degrees=still, translate=shift), interpolation)
    for image, moved, (dx, dy) in zip(images, shifted, shift.int().tolist(), strict=True):
        padded = F.pad(image, (8, 8, 8, 8))
        assert torch.equal(moved, padded[:, 8 - dy : 8 - dy + size[0], 8 - dx : 8 - dx + size[1]])
    half = warp(images, affine_matrix(size, degrees=still + 180, translate=torch.zeros(9, 2)), interpolation)
    assert torch.equal(half, images.flip(2, 3))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_a_warp_does_not_depend_on_the_rest_of_the_batch(generator, interpolation):
    images = torch.randint(256, (17, 3, 9, 11), generator=generator, dtype=torch.uint8)
    parameters = draw_parameters(generator, 17, (9, 11))
    whole = warp(images, affine_matrix((9, 11), **parameters), interpolation)
    for i in range(17):
        affine = affine_matrix((9, 11), **{name: value[i : i + 1] for name, value in parameters.items()})
        assert torch.equal(warp(images[i : i + 1], affine, interpolation)[0], whole[i])


def test_composing_affines_is_multiplying_their_matrices(generator):
    first, then = torch.randn(2, 10, 2, 3, generator=generator)
    bottom = torch.tensor([0.0, 0.0, 1.0]).expand(10, 1, 3)
    expected = torch.cat((first, bottom), dim=1) @ torch.cat((then, bottom), dim=1)
    torch.testing.assert_close(compose_affines(first, then), expected[:, :2])
    assert torch.equal(compose_affines(identity_affine(10), then), then)
    assert torch.equal(compose_affines(first, identity_affine(10)), first)


def test_two_views_in_a_row_are_one_view_by_the_composed_affine(generator):
    """Whole shifts and flips lose nothing but what the first one moves out of the image."""
    images = 1 + torch.rand(30, 3, 12, 16, generator=generator, dtype=torch.float64)
    draws, flips = torch.randint(5, (2, 2, 30), generator=generator), torch.rand(2, 30, generator=generator) < 0.5
    view, first = crop_flip(images, draws[0].T, flips[0], 2)
    view, then = crop_flip(view, draws[1].T, flips[1], 2)
    grid = F.affine_grid(compose_affines(first, then).double(), images.shape, align_corners=False)
    expected = F.grid_sample(images, grid, align_corners=False)
    kept = view != 0
    assert kept.float().mean() > 0.6
    torch.testing.assert_close(view[kept], expected[kept], rtol=0, atol=1e-5)


def test_tokens_of_a_view_are_the_tokens_of_the_stored_image_moved_by_the_affine(generator):
    """Flips and shifts by whole patches through crop, flip and a policy; a patch's token is its mean colour."""
    patch, grid, batch = 4, (6, 8), 64
    size = (patch * grid[0], patch * grid[1])
    images = torch.randint(1, 256, (batch, 3, *size), generator=generator, dtype=torch.uint8)

    def embed(pictures):
        return F.avg_pool2d(pictures.float(), patch).flatten(2).mT

    top, left = patch * torch.randint(3, (2, batch), generator=generator)
    flip = torch.rand(batch, generator=generator) < 0.5
    views, affine = crop_flip(images, torch.stack((top, left), dim=1), flip, patch)
    operation = torch.randint(Operation.TRANSLATE_X, Operation.TRANSLATE_Y + 1, (batch, 2), generator=generator)
    shift = patch * torch.randint(-1, 2, (batch, 2), generator=generator).float()
    views, moved = apply_operations(views, operation, shift, "bilinear")
    tokens, inside = resample_tokens(embed(images), grid, compose_affines(affine, moved))
    shown = (F.max_pool2d(views.float(), patch).amin(dim=1) > 0).flatten(1)
    assert ((inside == 1) & shown).float().mean() > 0.6
    assert inside[shown].min() == 1
    torch.testing.assert_close(embed(views)[shown], tokens[shown], rtol=0, atol=1e-2)
