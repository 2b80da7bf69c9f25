import math

import pytest
import torch
import torch.nn.functional as F

from hf_ihb.augment.ops import crop_flip
from hf_ihb.functional.geometry import identity_affine
from hf_ihb.functional.tokens import (
    correlation_divergence,
    pool_tokens,
    resample_tokens,
    resampling_matrix,
    standardize_tokens,
    token_cosine_distance,
)


def random_affine(generator, batch):
    return identity_affine(batch) + 0.3 * torch.randn(batch, 2, 3, generator=generator)


def crop_parameters(generator, batch, padding, step=1):
    top, left = step * torch.randint(2 * padding // step + 1, (2, batch), generator=generator)
    return top, left, torch.rand(batch, generator=generator) < 0.5


def as_tokens(maps):
    return maps.flatten(2).mT


@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (8, 8), (16, 16), (2, 8)])
def test_the_identity_changes_no_bit(generator, grid):
    tokens = torch.randn(4, grid[0] * grid[1], 6, generator=generator)
    resampled, inside = resample_tokens(tokens, grid, identity_affine(4))
    assert torch.equal(resampled, tokens)
    assert inside.all()


@pytest.mark.parametrize("grid", [(7, 7), (3, 5), (14, 14)])
def test_the_identity_on_a_grid_that_is_no_power_of_two_changes_nothing_but_rounding(generator, grid):
    tokens = torch.randn(4, grid[0] * grid[1], 6, generator=generator)
    resampled, inside = resample_tokens(tokens, grid, identity_affine(4))
    torch.testing.assert_close(resampled, tokens, rtol=0, atol=1e-5)
    assert inside.all()


@pytest.mark.parametrize(("grid", "output_grid"), [((8, 8), (8, 8)), ((7, 7), (8, 8)), ((4, 6), (5, 9))])
def test_resampling_equals_grid_sample_with_a_repeated_border(generator, grid, output_grid):
    maps, affine = torch.randn(16, 5, *grid, generator=generator), random_affine(generator, 16)
    coordinates = F.affine_grid(affine, (16, 5, *output_grid), align_corners=False)
    expected = F.grid_sample(maps, coordinates, mode="bilinear", padding_mode="border", align_corners=False)
    resampled, inside = resample_tokens(as_tokens(maps), grid, affine, output_grid)
    torch.testing.assert_close(resampled, as_tokens(expected), rtol=0, atol=1e-5)
    # an image of ones on a background of zeros, seen closely, and averaged over each token
    fine = F.affine_grid(affine, (16, 1, 64 * output_grid[0], 64 * output_grid[1]), align_corners=False)
    share = F.avg_pool2d((fine.abs() <= 1).all(dim=-1).float()[:, None], 64)
    assert (inside - share.flatten(1)).abs().max() < 0.04


@pytest.mark.parametrize(
    ("grid", "output_grid"), [((16, 16), (7, 7)), ((5, 8), (3, 5)), ((9, 4), (2, 7)), ((8, 8), (7, 8))]
)
def test_a_finer_grid_is_averaged_by_the_area_of_each_token(generator, grid, output_grid):
    maps = torch.randn(3, 4, *grid, generator=generator)
    pooled_grid = tuple(min(pair) for pair in zip(grid, output_grid, strict=True))
    # each cell as so many pixels that the larger ones are made of whole pixels too
    pixels = maps.repeat_interleave(pooled_grid[0], dim=2).repeat_interleave(pooled_grid[1], dim=3)
    expected = F.avg_pool2d(pixels, grid)
    pooled, found_grid = pool_tokens(as_tokens(maps), grid, output_grid)
    assert found_grid == pooled_grid
    torch.testing.assert_close(pooled, as_tokens(expected), rtol=0, atol=1e-5)
    tokens = as_tokens(maps).requires_grad_()
    (use,) = torch.autograd.grad(resample_tokens(tokens, grid, identity_affine(3), pooled_grid)[0].sum(), tokens)
    torch.testing.assert_close(use, torch.full_like(use, math.prod(pooled_grid) / math.prod(grid)))  # all alike


@pytest.mark.parametrize(("grid", "output_grid"), [((16, 16), (8, 8)), ((32, 32), (8, 8)), ((12, 8), (4, 8))])
def test_a_grid_finer_by_a_whole_factor_is_averaged_over_blocks(generator, grid, output_grid):
    maps = torch.randn(3, 4, *grid, generator=generator)
    factors = (grid[0] // output_grid[0], grid[1] // output_grid[1])
    pooled = F.avg_pool2d(maps, factors)
    resampled, _ = resample_tokens(as_tokens(maps), grid, identity_affine(3), output_grid)
    torch.testing.assert_close(resampled, as_tokens(pooled), rtol=0, atol=1e-6)
    affine = random_affine(generator, 3)
    moved, _ = resample_tokens(as_tokens(maps), grid, affine, output_grid)
    torch.testing.assert_close(moved, resample_tokens(as_tokens(pooled), output_grid, affine)[0])


def test_bilinear_resampling_to_half_the_grid_is_two_by_two_pooling(generator):
    maps = torch.randn(3, 4, 16, 16, generator=generator)
    bilinear = F.interpolate(maps, (8, 8), mode="bilinear", align_corners=False)
    found, inside = resample_tokens(as_tokens(maps), (16, 16), identity_affine(3), (8, 8))
    torch.testing.assert_close(found, as_tokens(bilinear), rtol=0, atol=1e-6)
    assert inside.all()
    matrix, _ = resampling_matrix(identity_affine(3), (16, 16), (8, 8))
    torch.testing.assert_close(matrix @ as_tokens(maps), as_tokens(F.avg_pool2d(maps, 2)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("teacher_grid", [8, 16, 32])
def test_tokens_of_a_shifted_and_flipped_view_match_the_resampled_tokens(generator, teacher_grid):
    images, padding = torch.rand(48, 3, 32, 32, generator=generator) + 0.1, 8
    top, left, flip = crop_parameters(generator, 48, padding, step=4)
    views, affine = crop_flip(images, torch.stack((top, left), dim=1), flip, padding)
    student = as_tokens(F.avg_pool2d(views, 4))
    teacher = as_tokens(F.avg_pool2d(images, 32 // teacher_grid))
    moved, inside = resample_tokens(teacher, (teacher_grid, teacher_grid), affine, (8, 8))
    assert 0.5 < inside.mean() < 1
    assert set(inside.flatten().tolist()) == {0.0, 1.0}  # whole tokens
    torch.testing.assert_close(moved[inside == 1], student[inside == 1], rtol=0, atol=1e-5)
    assert (student[inside == 0] == 0).all()
    still = resample_tokens(teacher, (teacher_grid, teacher_grid), identity_affine(48), (8, 8))[0]
    assert (still - student).abs().max() > 0.1


def test_tokens_of_a_shift_by_half_a_token_are_the_mean_of_neighbours(generator):
    tokens = torch.randn(1, 64, 2, generator=generator)
    affine = identity_affine(1).clone()
    affine[0, 0, 2] = 1 / 8  # half of a token's width of 2 / 8
    moved, _ = resample_tokens(tokens, (8, 8), affine)
    maps = tokens.view(8, 8, 2)
    expected = torch.cat(((maps[:, :-1] + maps[:, 1:]) / 2, maps[:, -1:]), dim=1)
    torch.testing.assert_close(moved.view(8, 8, 2), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("output_grid", [(6, 6), (8, 7)])
def test_the_gram_of_resampled_tokens_is_the_resampled_gram(generator, output_grid):
    tokens, affine = torch.randn(8, 36, 10, generator=generator), random_affine(generator, 8)
    matrix, inside = resampling_matrix(affine, (6, 6), output_grid)
    torch.testing.assert_close(matrix.sum(dim=-1), torch.ones(matrix.shape[:2]))
    assert (matrix >= 0).all()
    moved, mask = resample_tokens(tokens, (6, 6), affine, output_grid)
    assert torch.equal(mask, inside)
    gram = tokens @ tokens.mT
    torch.testing.assert_close(moved @ moved.mT, matrix @ gram @ matrix.mT, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("size", "patch", "padding"), [(32, 4, 4), (32, 2, 4), (28, 7, 6), (30, 3, 5), (28, 28, 6)])
def test_a_token_counts_by_the_share_of_its_pixels_that_are_no_padding(size, patch, padding):
    offsets = torch.arange(2 * padding + 1)
    top, left, flip = (v.flatten() for v in torch.meshgrid(offsets, offsets, torch.arange(2), indexing="ij"))
    white = torch.full((len(top), 1, size, size), 255, dtype=torch.uint8)
    views, affine = crop_flip(white, torch.stack((top, left), dim=1), flip.bool(), padding)
    grid = size // patch
    _, inside = resampling_matrix(affine, (grid, grid), (grid, grid))
    expected = F.avg_pool2d((views > 0).float(), patch).flatten(1)
    torch.testing.assert_close(inside, expected, rtol=0, atol=1e-3)
    assert torch.equal(inside == 0, expected == 0)
    assert torch.equal(inside == 1, expected == 1)


def test_tokens_that_do_not_fill_the_grid_are_refused():
    with pytest.raises(ValueError, match="a 8 x 8 grid needs 64 tokens, got 65"):
        resample_tokens(torch.zeros(2, 65, 3), (8, 8), identity_affine(2))


def test_cosine_distance_equals_loops_over_tokens(generator):
    student, teacher = torch.randn(2, 5, 7, 4, generator=generator)
    mask = torch.rand(5, 7, generator=generator) < 0.6
    mask[3] = False
    share = torch.rand(5, 7, generator=generator) * mask
    masked, weighted, whole = [], [], []
    for s, t, m, w in zip(student.tolist(), teacher.tolist(), mask.tolist(), share.tolist(), strict=True):
        cosines = [
            sum(p * q for p, q in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
            for a, b in zip(s, t, strict=True)
        ]
        kept = [c for c, keep in zip(cosines, m, strict=True) if keep]
        masked.append(1 - sum(kept) / len(kept) if kept else 1.0)
        weighted.append(1 - sum(a * c for a, c in zip(w, cosines, strict=True)) / sum(w) if kept else 1.0)
        whole.append(1 - sum(cosines) / len(cosines))
    torch.testing.assert_close(token_cosine_distance(student, teacher), torch.tensor(whole))
    torch.testing.assert_close(token_cosine_distance(student, teacher, mask=mask), torch.tensor(masked))
    torch.testing.assert_close(token_cosine_distance(student, teacher, mask=share), torch.tensor(weighted))


def test_cosine_distance_is_zero_for_positive_multiples_and_two_for_opposites(generator):
    tokens = torch.randn(3, 6, 4, generator=generator)
    torch.testing.assert_close(token_cosine_distance(5 * tokens, tokens), torch.zeros(3))
    torch.testing.assert_close(token_cosine_distance(-tokens, tokens), torch.full((3,), 2.0))


def test_cosine_distance_stays_in_float32_under_bf16_autocast(generator):
    student, teacher = torch.randn(2, 3, 6, 4, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = token_cosine_distance(student, teacher)
    assert torch.equal(found, token_cosine_distance(student, teacher))


def test_tokens_of_other_shapes_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(2, 4, 3\) and \(2, 4, 5\)"):
        token_cosine_distance(torch.zeros(2, 4, 3), torch.zeros(2, 4, 5))


def test_standardised_tokens_have_no_position_code_and_unit_channels(generator):
    scale = torch.tensor([0.01, 1.0, 100.0])
    tokens = (torch.randn(500, 4, 3, generator=generator) + 3 * torch.randn(4, 3, generator=generator)) * scale
    mean = tokens.mean(dim=0)
    std = (tokens - mean).square().mean(dim=(0, 1)).sqrt()
    standardized = standardize_tokens(tokens, mean, std)
    torch.testing.assert_close(standardized.mean(dim=0), torch.zeros(4, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(standardized.square().mean(dim=(0, 1)), torch.ones(3))
    other_scale = torch.tensor([7.0, 0.1, 2.0])
    torch.testing.assert_close(
        standardize_tokens(tokens * other_scale, mean * other_scale, std * other_scale), standardized
    )


# ---- Relations between images ----


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("temperature", [0.1, 2.0])
def test_the_relation_loss_equals_loops_over_images(generator, include_self, temperature):
    student = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    teacher = torch.randn(7, 9, generator=generator, dtype=torch.float64)
    mask = torch.tensor([True, True, False, True, True, False, True])
    kept = [i for i in range(7) if mask[i]]

    def shares(embeddings, i):
        others = [j for j in kept if include_self or j != i]
        cosines = [torch.cosine_similarity(embeddings[i], embeddings[j], dim=0).item() for j in others]
        weights = [math.exp(c / temperature) for c in cosines]
        return [w / sum(weights) for w in weights]

    rows = []
    for i in kept:
        p, q = shares(teacher, i), shares(student, i)
        rows.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    found = correlation_divergence(student, teacher, temperature, mask=mask, include_self=include_self)
    assert found.item() == pytest.approx(sum(rows) / len(rows), rel=1e-10)


def test_the_relation_loss_is_zero_for_a_rotation_and_for_any_length_of_each_embedding(generator):
    teacher = torch.randn(16, 6, generator=generator)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    lengths = torch.rand(16, 1, generator=generator) + 0.1
    assert correlation_divergence(lengths * teacher @ rotation, teacher, 0.1).item() == pytest.approx(0, abs=1e-5)
    assert correlation_divergence(teacher + 1, teacher, 0.1) > 0.01


def test_the_relation_loss_keeps_its_digits_at_high_temperatures(generator):
    student, teacher = torch.randn(2, 12, 6, generator=generator)
    for temperature in (1.0, 1e3):
        exact = correlation_divergence(student.double(), teacher.double(), temperature).item()
        assert correlation_divergence(student, teacher, temperature).item() == pytest.approx(exact, rel=1e-5)


def test_an_images_similarity_to_itself_hides_the_others(generator):
    student, teacher = torch.randn(2, 32, 64, generator=generator)
    hidden = correlation_divergence(student, teacher, 0.1, include_self=True)
    assert hidden < 0.1 * correlation_divergence(student, teacher, 0.1)


@pytest.mark.parametrize("kept", [0, 1, 2, 5])
@pytest.mark.parametrize("include_self", [False, True])
def test_images_that_take_no_part_in_relations_get_no_gradient(generator, kept, include_self):
    student = torch.randn(5, 4, generator=generator).requires_grad_()
    mask = torch.arange(5) < kept
    loss = correlation_divergence(
        student, torch.randn(5, 3, generator=generator), 0.1, mask=mask, include_self=include_self
    )
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.isfinite(gradient).all()
    assert (gradient[kept:] == 0).all()
    needed = 2 if include_self else 3  # a softmax over one image says nothing
    assert (loss == 0) == (kept < needed)


def test_the_gradient_of_the_relation_loss_equals_finite_differences(generator):
    student = torch.randn(6, 4, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    mask = torch.arange(6) != 2
    assert torch.autograd.gradcheck(lambda s: correlation_divergence(s, teacher, 0.5, mask=mask), student)


def test_the_relation_loss_stays_in_float32_under_bf16_autocast(generator):
    student, teacher = torch.randn(2, 8, 4, generator=generator)
    expected = correlation_divergence(student, teacher, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(correlation_divergence(student, teacher, 0.1), expected)
        assert correlation_divergence(student.bfloat16(), teacher.bfloat16(), 0.1).dtype == torch.float32


def test_embeddings_that_are_not_paired_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(5, 3\)"):
        correlation_divergence(torch.zeros(4, 3), torch.zeros(5, 3), 0.1)
