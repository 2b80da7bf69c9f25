import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_ihb.functional.attention import (
    AttentionStatistics,
    attention_distance,
    attention_entropy,
    attention_map,
    attention_statistics,
    cls_dispersion,
    effective_number,
    legacy_map_entropy,
    special_token_mass,
    uniform_attention_distance,
)

GRID = (8, 8)
SINGLE = {
    "distance": attention_distance,
    "entropy": attention_entropy,
    "effective_number": effective_number,
    "special_token_mass": special_token_mass,
    "cls_dispersion": cls_dispersion,
    "legacy_map_entropy": legacy_map_entropy,
}


def places(grid):
    return [(r, c) for r in range(grid[0]) for c in range(grid[1])]


def from_weights(weight, grid=GRID):
    """``(1, 1, N, N)`` map whose rows are proportional to ``weight(query place, key place)``."""
    rows = torch.tensor([[float(weight(q, k)) for k in places(grid)] for q in places(grid)], dtype=torch.float64)
    return (rows / rows.sum(dim=-1, keepdim=True))[None, None]


def window(size):
    return lambda q, k: max(abs(q[0] - k[0]), abs(q[1] - k[1])) <= size // 2


def gaussian(sigma):
    return lambda q, k: math.exp(-(math.dist(q, k) ** 2) / (2 * sigma**2))


def random_attention(grid, prefix, batch=2, heads=3, dtype=torch.float64, scale=3.0):
    tokens = prefix + grid[0] * grid[1]
    return (scale * torch.randn(batch, heads, tokens, tokens, dtype=dtype)).softmax(dim=-1)


def with_prefix(patches, prefix, share):
    """Adds prefix tokens that get `share` of every row and look at everything alike."""
    count = patches.shape[-1] + prefix
    attention = patches.new_full((*patches.shape[:2], count, count), 1 / count)
    attention[:, :, prefix:, :prefix] = share / prefix
    attention[:, :, prefix:, prefix:] = (1 - share) * patches
    return attention


# ---- Distance: closed forms ----


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (lambda q, k: q == k, 0.0),
        (lambda q, k: 1, 4.136482711405379),
        (lambda q, k: q != k, 4.202141167141972),
        (lambda q, k: k == (q[0], 7 - q[1]), 4.0),
        (lambda q, k: k == (7 - q[0], q[1]), 4.0),
        (lambda q, k: k == (q[0], (q[1] + 1) % 8), 1.75),
        (lambda q, k: k == (7 - q[0], 7 - q[1]), 6.086890469045404),
        (lambda q, k: k == (q[1], q[0]), 3.7123106012293743),
        (lambda q, k: k == (0, 0), 5.472010659674722),
        (window(3), 1.0211771728019903),
        (window(5), 1.7464495724544147),
        (window(7), 2.4074406687809438),
        (lambda q, k: (q == k) + 1 / 64, 2.0682413557026895),  # half identity, half uniform
    ],
)
def test_distance_of_known_maps(weight, expected):
    found = attention_distance(from_weights(weight), GRID, 0)
    assert found.shape == (1, 1)
    assert found.item() == pytest.approx(expected, rel=1e-13, abs=0)


@pytest.mark.parametrize(("sigma", "expected"), [(1, 1.1045), (2, 2.1321), (3, 2.8845), (4, 3.3390)])
def test_distance_of_gaussian_windows(sigma, expected):
    assert attention_distance(from_weights(gaussian(sigma)), GRID, 0).item() == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        (2, 0.8535533905932737),
        (4, 2.0080149693800875),
        (7, 3.609465441775511),
        (8, 4.136482711405379),
        (14, 7.280764193235396),
        (16, 8.326075240517376),
    ],
)
def test_uniform_distance_of_square_grids(side, expected):
    assert uniform_attention_distance((side, side)) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (3, 5), (5, 3), (7, 7)])
def test_uniform_distance_is_that_of_the_uniform_map(grid):
    found = attention_distance(from_weights(lambda q, k: 1, grid), grid, 0).item()
    assert uniform_attention_distance(grid) == pytest.approx(found, rel=1e-13, abs=0)
    pairs = [math.dist(q, k) for q in places(grid) for k in places(grid)]
    assert uniform_attention_distance(grid) == pytest.approx(math.fsum(pairs) / len(pairs), rel=1e-14, abs=0)


def test_distance_in_float32_has_its_digits():
    for side in (8, 16):  # torch.cdist would lose half of them
        attention = from_weights(lambda q, k: 1, (side, side)).float()
        expected = uniform_attention_distance((side, side))
        assert attention_distance(attention, (side, side), 0).item() == pytest.approx(expected, rel=5e-7)


def test_distance_is_linear_in_maps_without_prefix():
    one, other = random_attention(GRID, 0), random_attention(GRID, 0)
    mixed = attention_distance(0.3 * one + 0.7 * other, GRID, 0)
    expected = 0.3 * attention_distance(one, GRID, 0) + 0.7 * attention_distance(other, GRID, 0)
    torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=0)


# ---- Everything else: closed forms ----


def test_statistics_of_uniform_attention_over_66_tokens():
    attention = torch.full((1, 1, 66, 66), 1 / 66, dtype=torch.float64)
    found = {name: value.item() for name, value in attention_statistics(attention, GRID, 2)._asdict().items()}
    expected = {
        "distance": 4.136482711405379,
        "entropy": 4.1588830833596715,
        "effective_number": 64.0,
        "special_token_mass": 2 / 66,
        "cls_dispersion": 10.5,
        "legacy_map_entropy": 4.1588830833596715,
    }
    assert found == pytest.approx(expected, rel=1e-13)


def test_identity_is_focused_though_its_mean_row_is_not():
    identity = torch.eye(64)[None, None]
    assert attention_entropy(identity, GRID, 0).item() == 0
    assert effective_number(identity, GRID, 0).item() == 1
    assert legacy_map_entropy(identity, GRID, 0).item() == pytest.approx(math.log(64), rel=1e-6)


def test_effective_number_is_a_mean_over_queries_of_numbers():
    attention = torch.eye(64, dtype=torch.float64)
    attention[:32] = 1 / 64
    assert effective_number(attention[None, None], GRID, 0).item() == pytest.approx(32.5, rel=1e-13)
    assert attention_entropy(attention[None, None], GRID, 0).item() == pytest.approx(math.log(64) / 2, rel=1e-13)


def test_map_entropy_is_never_below_the_entropy_of_rows():
    attention = random_attention(GRID, 2)
    difference = legacy_map_entropy(attention, GRID, 2) - attention_entropy(attention, GRID, 2)
    assert (difference > 0.1).all()


@pytest.mark.parametrize("grid", [(8, 8), (3, 5), (1, 4)])
def test_cls_dispersion_of_known_maps(grid):
    tokens = 1 + grid[0] * grid[1]
    attention = torch.zeros(3, 1, tokens, tokens, dtype=torch.float64)
    attention[0, 0, 0, 1:] = 0.5 / (tokens - 1)  # uniform; the other half on itself
    attention[1, 0, 0, 3] = 1
    attention[2, 0, 0, [1, -1]] = 0.25  # opposite corners
    expected = [(grid[0] ** 2 + grid[1] ** 2 - 2) / 12, 0, ((grid[0] - 1) ** 2 + (grid[1] - 1) ** 2) / 4]
    assert cls_dispersion(attention, grid, 1).flatten().tolist() == pytest.approx(expected, rel=1e-13)


# ---- Brute force ----


def brute_force(attention, grid, prefix):
    """Every statistic of one ``(T, T)`` map, with loops."""
    at = places(grid)
    tokens = range(prefix, prefix + len(at))

    def renormalised(query):
        return [attention[query][j] / sum(attention[query][k] for k in tokens) for j in tokens]

    def entropy(row):
        return -sum(p * math.log(p) for p in row)

    def mean(values):
        return sum(values) / len(at)

    rows, cls = [renormalised(query) for query in tokens], renormalised(0)
    center = [sum(p * place[axis] for p, place in zip(cls, at, strict=True)) for axis in (0, 1)]
    return AttentionStatistics(
        distance=mean(p * math.dist(at[i], at[j]) for i, row in enumerate(rows) for j, p in enumerate(row)),
        entropy=mean(map(entropy, rows)),
        effective_number=mean(math.exp(entropy(row)) for row in rows),
        special_token_mass=mean(sum(attention[query][:prefix]) for query in tokens),
        cls_dispersion=sum(p * math.dist(place, center) ** 2 for p, place in zip(cls, at, strict=True)),
        legacy_map_entropy=entropy([mean(column) for column in zip(*rows, strict=True)]),
    )


@pytest.mark.parametrize(("grid", "prefix"), [((3, 5), 3), ((4, 2), 1)])
def test_statistics_are_those_of_loops_on_any_grid(grid, prefix):
    attention = random_attention(grid, prefix)
    found = attention_statistics(attention, grid, prefix)
    for b in range(2):
        for h in range(3):
            expected = brute_force(attention[b, h].tolist(), grid, prefix)
            assert [value[b, h].item() for value in found] == pytest.approx(list(expected), rel=1e-11)


@pytest.mark.parametrize("name", SINGLE)
def test_each_function_is_a_field_of_the_statistics(name):
    attention = random_attention((3, 4), 2)
    together = getattr(attention_statistics(attention, (3, 4), 2), name)
    assert together.shape == (2, 3)
    assert torch.equal(SINGLE[name](attention, (3, 4), 2), together)


# ---- Laws ----


def test_images_and_heads_are_independent():
    attention = random_attention((3, 4), 2, batch=4)
    images, heads = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 0])
    moved = attention_statistics(attention[images][:, heads], (3, 4), 2)
    for found, expected in zip(moved, attention_statistics(attention, (3, 4), 2), strict=True):
        torch.testing.assert_close(found, expected[images][:, heads], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("symmetry", ["mirror", "flip", "transpose"])
def test_symmetries_of_the_grid_change_nothing(symmetry):
    grid, prefix = (3, 4), 2
    attention = random_attention(grid, prefix)
    order = torch.arange(12).view(grid)
    order = {"mirror": order.flip(1), "flip": order.flip(0), "transpose": order.T}[symmetry]
    tokens = torch.cat((torch.arange(prefix), prefix + order.flatten()))
    moved = attention_statistics(attention[:, :, tokens][..., tokens], tuple(order.shape), prefix)
    for found, expected in zip(moved, attention_statistics(attention, grid, prefix), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_moving_patches_about_changes_distances_and_nothing_that_has_no_place():
    attention = random_attention((3, 4), 1)
    tokens = torch.cat((torch.zeros(1, dtype=torch.long), 1 + torch.randperm(12)))
    before = attention_statistics(attention, (3, 4), 1)
    after = attention_statistics(attention[:, :, tokens][..., tokens], (3, 4), 1)
    for name in ("entropy", "effective_number", "special_token_mass", "legacy_map_entropy"):
        torch.testing.assert_close(getattr(after, name), getattr(before, name), rtol=1e-12, atol=1e-14)
    assert ((after.distance - before.distance).abs() > 1e-3).all()
    assert ((after.cls_dispersion - before.cls_dispersion).abs() > 1e-3).all()


@pytest.mark.parametrize("share", [0.1, 0.9, 1 - 1e-6])
def test_what_prefix_tokens_take_is_seen_in_the_special_mass_alone(share):
    patches = random_attention((3, 4), 0)
    bare = attention_statistics(patches, (3, 4), 0)
    prefixed = attention_statistics(with_prefix(patches, 3, share), (3, 4), 3)
    torch.testing.assert_close(prefixed.special_token_mass, torch.full((2, 3), share, dtype=torch.float64))
    assert torch.equal(bare.special_token_mass, torch.zeros(2, 3, dtype=torch.float64))
    for name in ("distance", "entropy", "effective_number", "legacy_map_entropy"):
        torch.testing.assert_close(getattr(prefixed, name), getattr(bare, name), rtol=1e-9, atol=1e-10)


def test_queries_of_prefix_tokens_do_not_count():
    attention = random_attention((3, 4), 2)
    other = attention.clone()
    other[:, :, 1] = random_attention((3, 4), 2)[:, :, 1]
    for found, expected in zip(
        attention_statistics(other, (3, 4), 2), attention_statistics(attention, (3, 4), 2), strict=True
    ):
        assert torch.equal(found, expected)


# ---- Rows without mass ----


def test_rows_without_mass_on_patches_are_left_out_of_the_mean():
    grid, prefix = (2, 3), 1
    attention = random_attention(grid, prefix)
    whole = attention_statistics(attention, grid, prefix)
    empty = attention.clone()
    empty[0, 1, [2, 5]] = 0
    empty[0, 1, [2, 5], 0] = 1
    found = attention_statistics(empty, grid, prefix)
    kept = [0, 2, 3, 5]  # patches 1 and 4 are queries 2 and 5
    rows = attention[0, 1, 1:, 1:][kept]
    rows = rows / rows.sum(dim=-1, keepdim=True)
    centers = torch.tensor(places(grid), dtype=torch.float64)
    reach = (rows * torch.linalg.vector_norm(centers[kept, None] - centers, dim=-1)).sum(dim=-1)
    entropy = torch.special.entr(rows).sum(dim=-1)
    torch.testing.assert_close(found.distance[0, 1], reach.mean())
    torch.testing.assert_close(found.entropy[0, 1], entropy.mean())
    torch.testing.assert_close(found.effective_number[0, 1], entropy.exp().mean())
    torch.testing.assert_close(found.legacy_map_entropy[0, 1], torch.special.entr(rows.mean(dim=0)).sum())
    torch.testing.assert_close(found.special_token_mass[0, 1], (attention[0, 1, 1:, 0][kept].sum() + 2) / 6)
    others = torch.ones(2, 3, dtype=torch.bool)
    others[0, 1] = False
    for value, expected in zip(found, whole, strict=True):
        assert torch.equal(value[others], expected[others])


@pytest.mark.parametrize("mass", [0.0, 1e-42])
def test_a_map_without_mass_on_patches_has_no_statistics(mass):
    attention = torch.full((1, 2, 5, 5), 0.2)
    attention[0, 0, :, 1:] = mass
    attention[0, 0, :, 0] = 1
    found = attention_statistics(attention, (2, 2), 1)
    for name, value in found._asdict().items():
        assert torch.isfinite(value[0, 1])
        assert torch.isnan(value[0, 0]) or name == "special_token_mass"
    assert found.special_token_mass[0, 0] == 1
    assert torch.isnan(attention_map(attention[:, :1], (2, 2), 1)).all()


def test_little_mass_is_still_mass():
    attention = torch.full((1, 1, 5, 5), 1e-37)
    attention[..., 0] = 1
    found = attention_statistics(attention, (2, 2), 1)
    assert found.distance.item() == pytest.approx(uniform_attention_distance((2, 2)), rel=1e-5)
    assert found.entropy.item() == pytest.approx(math.log(4), rel=1e-4)
    assert found.cls_dispersion.item() == pytest.approx(0.5, rel=1e-5)


def test_nan_attention_is_not_hidden():
    attention = torch.full((1, 2, 5, 5), 0.2)
    attention[0, 0, 3] = torch.nan
    found = attention_statistics(attention, (2, 2), 1)
    for name, value in found._asdict().items():
        assert torch.isnan(value[0, 0]) or name == "cls_dispersion"
        assert torch.isfinite(value[0, 1])


# ---- Precision and memory ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_maps_are_computed_in_float32(dtype):
    attention = random_attention((3, 4), 2, dtype=torch.float32).to(dtype)
    for found, expected in zip(
        attention_statistics(attention, (3, 4), 2), attention_statistics(attention.float(), (3, 4), 2), strict=True
    ):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_changes_nothing(name, dtype):
    attention = random_attention((3, 4), 2, dtype=dtype)
    expected = SINGLE[name](attention, (3, 4), 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(SINGLE[name](attention, (3, 4), 2), expected)
        assert torch.equal(getattr(attention_statistics(attention, (3, 4), 2), name), expected)
    assert expected.dtype == dtype


class Allocations(TorchDispatchMode):
    """Counts new storages of at least some number of elements."""

    def __init__(self, tensor, least):
        super().__init__()
        self.seen, self.least, self.count = {tensor.untyped_storage().data_ptr()}, least, 0
        self.kept = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= self.least:
            storage = result.untyped_storage().data_ptr()
            self.count += storage not in self.seen
            self.seen.add(storage)
            self.kept.append(result)  # or its address could be given out again
        return result


def test_all_statistics_make_one_tensor_of_the_size_of_the_map():
    attention = random_attention(GRID, 2, batch=8, dtype=torch.float32)
    with Allocations(attention, 8 * 3 * 64 * 64) as allocations:
        attention_statistics(attention, GRID, 2)
    assert allocations.count == 1


def test_statistics_have_gradients():
    scores = torch.randn(1, 2, 7, 7, dtype=torch.float64, requires_grad=True)

    def statistics(scores):
        return tuple(attention_statistics(scores.softmax(dim=-1), (2, 3), 1))

    assert torch.autograd.gradcheck(statistics, (scores,))


# ---- Maps to look at ----


def test_the_map_of_the_cls_token_is_the_mean_of_heads_renormalised():
    attention = random_attention((2, 3), 2)
    mean = attention[:, :, 0, 2:].mean(dim=1)
    found = attention_map(attention, (2, 3), 2)
    assert found.shape == (2, 2, 3)
    torch.testing.assert_close(found.flatten(1), mean / mean.sum(dim=1, keepdim=True))


@pytest.mark.parametrize(("prefix", "has_cls"), [(0, None), (2, False)])
def test_the_map_without_a_cls_token_is_the_mean_row_of_patches(prefix, has_cls):
    attention = random_attention((2, 3), prefix)
    mean = attention[:, :, prefix:, prefix:].mean(dim=(1, 2))
    found = attention_map(attention, (2, 3), prefix, has_cls=has_cls)
    torch.testing.assert_close(found.flatten(1), mean / mean.sum(dim=1, keepdim=True))


@pytest.mark.parametrize(("prefix", "has_cls", "expected"), [(0, None, False), (2, None, True), (2, False, False)])
def test_dispersion_is_none_without_a_cls_token(prefix, has_cls, expected):
    found = attention_statistics(random_attention((2, 3), prefix), (2, 3), prefix, has_cls=has_cls)
    assert (found.cls_dispersion is not None) == expected


# ---- Errors ----


@pytest.mark.parametrize("function", [*SINGLE.values(), attention_statistics, attention_map])
@pytest.mark.parametrize(
    ("shape", "grid", "prefix"),
    [((1, 1, 66, 66), (8, 8), 1), ((1, 1, 12, 13), (3, 4), 1), ((1, 13, 13), (3, 4), 1), ((1, 1, 11, 11), (3, 4), -1)],
)
def test_a_map_of_other_tokens_is_refused(function, shape, grid, prefix):
    with pytest.raises(ValueError, match=r"(must be \(B, H, \d+, \d+\), got \(1|needs a cls token)") as error:
        function(torch.full(shape, 0.1), grid, prefix)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("grid", [(0, 4), (3, -1), (8,)])
def test_an_empty_grid_is_refused(grid):
    with pytest.raises(ValueError, match="rows, columns"):
        uniform_attention_distance(grid)
    with pytest.raises(ValueError, match="rows, columns"):
        attention_distance(torch.ones(1, 1, 1, 1), grid, 1)


def test_the_dispersion_of_no_cls_token_is_refused():
    with pytest.raises(ValueError, match="needs a cls token"):
        cls_dispersion(torch.full((1, 1, 4, 4), 0.25), (2, 2), 0)
