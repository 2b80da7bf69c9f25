from collections import Counter

import pytest
import torch
from scipy.stats import chisquare
from torchvision.transforms import v2

from hf_ihb.augment.policies import (
    CIFAR10_PAIRS,
    Operation,
    apply_operation,
    apply_operations,
    autoaugment_cifar10,
    magnitude_table,
    operation_affine,
    randaugment,
    trivialaugment_wide,
)
from hf_ihb.functional.geometry import affine_matrix, warp
from hf_ihb.functional.random import counter_uniforms
from tests.functional.test_geometry import away_from_ties

CPU = torch.device("cpu")
NAMES = {  # torchvision's names
    "Identity": Operation.IDENTITY, "ShearX": Operation.SHEAR_X, "ShearY": Operation.SHEAR_Y,
    "TranslateX": Operation.TRANSLATE_X, "TranslateY": Operation.TRANSLATE_Y, "Rotate": Operation.ROTATE,
    "Brightness": Operation.BRIGHTNESS, "Color": Operation.COLOR, "Contrast": Operation.CONTRAST,
    "Sharpness": Operation.SHARPNESS, "Posterize": Operation.POSTERIZE, "Solarize": Operation.SOLARIZE,
    "AutoContrast": Operation.AUTO_CONTRAST, "Equalize": Operation.EQUALIZE, "Invert": Operation.INVERT,
}  # fmt: skip
TITLES = {operation: name for name, operation in NAMES.items()}
GEOMETRIC = range(Operation.SHEAR_X, Operation.ROTATE + 1)
FUSED = {Operation.COLOR, Operation.CONTRAST, Operation.SHARPNESS}  # torchvision rounds once where we round twice
SPACES = {
    "randaugment": ("standard", 31, v2.RandAugment),
    "autoaugment": ("standard", 10, v2.AutoAugment),
    "trivialaugment": ("wide", 31, v2.TrivialAugmentWide),
}
CIFAR10 = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)._policies


def their_magnitudes(transform, name, bins, size):
    values = transform._AUGMENTATION_SPACE[name][0](bins, *size)
    return torch.zeros(bins) if values is None else values.float()


@pytest.mark.parametrize("size", [(32, 32), (28, 17)])
@pytest.mark.parametrize("name", SPACES)
def test_magnitudes_are_those_of_torchvision(name, size):
    space, bins, transform = SPACES[name]
    table = magnitude_table(space, bins, size, CPU)
    assert table.shape == (len(Operation), bins)
    for title in transform._AUGMENTATION_SPACE:
        assert torch.equal(table[NAMES[title]], their_magnitudes(transform, title, bins, size)), title


@pytest.mark.parametrize(
    ("shape", "interpolation"), [((3, 8, 8), "nearest"), ((3, 12, 9), "bilinear"), ((1, 8, 8), "bilinear")]
)
@pytest.mark.parametrize("name", SPACES)
def test_every_operation_at_every_magnitude_and_sign_equals_torchvision(generator, name, shape, interpolation):
    _, bins, transform = SPACES[name]
    cases = [
        (title, sign * magnitude)
        for title, (_, signed) in transform._AUGMENTATION_SPACE.items()
        for magnitude in their_magnitudes(transform, title, bins, shape[1:]).unique().tolist()
        for sign in ((1, -1) if signed else (1,))
    ]
    images = torch.randint(256, (len(cases), *shape), generator=generator, dtype=torch.uint8)
    operation = torch.tensor([NAMES[title] for title, _ in cases])
    found, affine = apply_operation(images, operation, torch.tensor([m for _, m in cases]), interpolation)
    decided = away_from_ties(images, affine, interpolation)
    apply, fill = transform()._apply_image_or_video_transform, {torch.Tensor: None}
    mode, differing = v2.InterpolationMode(interpolation), 0
    for i, (title, magnitude) in enumerate(cases):
        expected = apply(images[i], title, magnitude, interpolation=mode, fill=fill)
        difference = (found[i].int() - expected.int()).abs()
        if NAMES[title] in GEOMETRIC:
            difference *= decided[i]
        assert difference.max() <= int(NAMES[title] in FUSED), (title, magnitude)
        differing += int((difference > 0).sum())
    assert differing < 5e-3 * images.numel()  # a fraction that is the edge of a level, not a level lost
    assert decided[operation > Operation.ROTATE].float().mean() > 0.99
    assert decided.float().mean() > 0.95


def test_invert_is_the_operation_torchvision_has_for_it(generator):
    images = torch.randint(256, (2, 3, 8, 8), generator=generator, dtype=torch.uint8)
    inverted, _ = apply_operation(images, torch.tensor([Operation.INVERT] * 2), torch.zeros(2), "nearest")
    assert torch.equal(inverted, 255 - images)


def test_only_what_moves_pixels_has_an_affine():
    operation = torch.arange(len(Operation))
    affine = operation_affine(operation, torch.full((len(Operation),), 2.0), (16, 24))
    moved = (affine != torch.eye(2, 3)).flatten(1).any(dim=1)
    assert moved.nonzero()[:, 0].tolist() == list(GEOMETRIC)


def test_operations_follow_one_another_and_so_do_their_affines(generator):
    images = torch.randint(256, (60, 3, 8, 10), generator=generator, dtype=torch.uint8)
    operation, magnitude = randaugment(torch.rand(60, 3, 2, generator=generator), 20, (8, 10))
    found, affine = apply_operations(images, operation, magnitude, "bilinear")
    expected, matrix = images, torch.eye(3).expand(60, 3, 3)
    for k in range(3):
        expected, moved = apply_operation(expected, operation[:, k], magnitude[:, k], "bilinear")
        matrix = matrix @ torch.cat((moved, torch.tensor([[[0.0, 0, 1]]]).expand(60, 1, 3)), dim=1)
    assert torch.equal(found, expected)
    torch.testing.assert_close(affine, matrix[:, :2])


@pytest.mark.parametrize("channels", [1, 3])
def test_operations_do_not_depend_on_the_rest_of_the_batch(generator, channels):
    images = torch.randint(256, (90, channels, 7, 9), generator=generator, dtype=torch.uint8)
    operation, magnitude = trivialaugment_wide(torch.rand(90, 3, generator=generator), (7, 9))
    whole, affine = apply_operations(images, operation, magnitude, "bilinear")
    for size in (1, 13):
        parts = [
            apply_operations(*(v[i : i + size] for v in (images, operation, magnitude)), "bilinear")
            for i in range(0, 90, size)
        ]
        assert torch.equal(torch.cat([views for views, _ in parts]), whole)
        assert torch.equal(torch.cat([moved for _, moved in parts]), affine)


def outcomes(operation, magnitude):
    """How often each (operation, magnitude) or pair of them was drawn."""
    drawn = torch.stack((operation.double(), magnitude.double()), dim=2).flatten(1) + 0.0  # -0 is 0
    rows, counts = drawn.unique(dim=0, return_counts=True)
    return Counter(dict(zip(map(tuple, rows.tolist()), counts.tolist(), strict=True)))


def assert_drawn_as(found, expected):
    """A chi-square test of the outcomes' probabilities; nothing else may occur. Rare outcomes count together."""
    assert set(found) <= set(expected)
    assert sum(expected.values()) == pytest.approx(1)
    total = sum(found.values())
    common = {outcome: total * p for outcome, p in expected.items() if total * p >= 5}
    counts = [found[outcome] for outcome in common]
    assert chisquare(
        [*counts, total - sum(counts) + 5], [*common.values(), total - sum(common.values()) + 5]
    ).pvalue > 1e-3  # the 5 keeps the rest above zero  # fmt: skip


def signed_outcomes(transform, title, magnitude):
    signs = (1, -1) if transform._AUGMENTATION_SPACE[title][1] else (1,)
    return [((float(NAMES[title]), sign * magnitude + 0.0), 1 / len(signs)) for sign in signs]


@pytest.mark.parametrize("magnitude_bin", [0, 9, 30])
def test_randaugment_draws_what_torchvision_draws(magnitude_bin):
    expected, titles = Counter(), list(v2.RandAugment._AUGMENTATION_SPACE)
    for title in titles:
        magnitude = their_magnitudes(v2.RandAugment, title, 31, (32, 32))[magnitude_bin].item()
        for outcome, p in signed_outcomes(v2.RandAugment, title, magnitude):
            expected[outcome] += p / len(titles)
    u = counter_uniforms(0, 0, torch.arange(20_000), 6, 6).unflatten(1, (3, 2))
    operation, magnitude = randaugment(u, magnitude_bin, (32, 32))
    for k in range(3):
        assert_drawn_as(outcomes(operation[:, k : k + 1], magnitude[:, k : k + 1]), expected)
    pairs = torch.bincount(14 * operation[:, 0] + operation[:, 1], minlength=196)  # the operations are independent
    assert chisquare(pairs).pvalue > 1e-3


def test_trivialaugment_draws_what_torchvision_draws():
    expected, titles = Counter(), list(v2.TrivialAugmentWide._AUGMENTATION_SPACE)
    for title in titles:
        for magnitude in their_magnitudes(v2.TrivialAugmentWide, title, 31, (32, 32)).tolist():
            for outcome, p in signed_outcomes(v2.TrivialAugmentWide, title, magnitude):
                expected[outcome] += p / len(titles) / 31
    drawn = trivialaugment_wide(counter_uniforms(0, 0, torch.arange(60_000), 6, 3), (32, 32))
    assert_drawn_as(outcomes(*drawn), expected)


def test_the_pairs_found_on_cifar10_are_those_of_torchvision():
    ours = [[(TITLES[operation], p, k) for operation, p, k in pair] for pair in CIFAR10_PAIRS]
    assert ours == [[(title, p, k or 0) for title, p, k in pair] for pair in CIFAR10]


def test_autoaugment_draws_what_torchvision_draws():
    expected = Counter()
    for pair in CIFAR10:
        possible = [((), 1 / len(CIFAR10))]
        for title, probability, magnitude_bin in pair:
            table = their_magnitudes(v2.AutoAugment, title, 10, (32, 32))
            magnitude = 0.0 if magnitude_bin is None else table[magnitude_bin].item()
            steps = [((0.0, 0.0), 1 - probability)]
            steps += [(step, probability * p) for step, p in signed_outcomes(v2.AutoAugment, title, magnitude)]
            possible = [(done + step, q * p) for done, q in possible for step, p in steps if p]
        for outcome, p in possible:
            expected[outcome] += p
    operation, magnitude = autoaugment_cifar10(counter_uniforms(0, 0, torch.arange(60_000), 6, 5), (32, 32))
    magnitude = torch.where(operation == Operation.IDENTITY, 0, magnitude)
    assert_drawn_as(outcomes(operation, magnitude), expected)


class Fed:
    """Stands in for `torch.randint` and `torch.rand` while torchvision draws."""

    def __init__(self, monkeypatch, integers, uniforms):
        self.integers, self.uniforms = list(integers), list(uniforms)
        monkeypatch.setattr(torch, "randint", lambda high, size: torch.tensor(int(self.integers.pop(0) * high)))
        monkeypatch.setattr(torch, "rand", lambda size: torch.tensor(self.uniforms.pop(0)))


def signed(transform, drawn):
    titles = list(transform._AUGMENTATION_SPACE)
    return transform._AUGMENTATION_SPACE[titles[int(drawn * len(titles))]][1]


def feed_randaugment(u):
    return u[0::2], [sign for drawn, sign in zip(u[0::2], u[1::2], strict=True) if signed(v2.RandAugment, drawn)]


def feed_trivialaugment(u):
    title = list(v2.TrivialAugmentWide._AUGMENTATION_SPACE)[int(u[0] * 14)]
    strong = v2.TrivialAugmentWide._AUGMENTATION_SPACE[title][0](31, 8, 8) is not None
    return u[:2] if strong else u[:1], u[2:] if signed(v2.TrivialAugmentWide, u[0]) else []


def feed_autoaugment(u):
    uniforms = []
    for (title, probability, _), applied, sign in zip(CIFAR10[int(u[0] * 25)], u[1:3], u[3:], strict=True):
        uniforms.append(applied)
        if applied < probability and v2.AutoAugment._AUGMENTATION_SPACE[title][1]:
            uniforms.append(sign)
    return u[:1], uniforms


WHOLE = {
    "randaugment": (4, lambda u, s: randaugment(u.unflatten(1, (2, 2)), 9, s), feed_randaugment, v2.RandAugment),
    "autoaugment": (5, autoaugment_cifar10, feed_autoaugment,
                    lambda **kwargs: v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, **kwargs)),
    "trivialaugment": (3, trivialaugment_wide, feed_trivialaugment, v2.TrivialAugmentWide),
}  # fmt: skip


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_policy_equals_torchvision_fed_with_the_same_draws(monkeypatch, generator, name, interpolation):
    count, draw, feed, make = WHOLE[name]
    images = torch.randint(256, (200, 3, 12, 12), generator=generator, dtype=torch.uint8)
    uniforms = counter_uniforms(3, 1, torch.arange(200), 6, count)
    found, _ = apply_operations(images, *draw(uniforms, (12, 12)), interpolation)
    transform, equal, close = make(interpolation=v2.InterpolationMode(interpolation)), 0, 0
    for image, ours, u in zip(images, found, uniforms.tolist(), strict=True):
        fed = Fed(monkeypatch, *feed(u))
        theirs = transform(image)
        assert not fed.integers
        assert not fed.uniforms
        differing = (theirs != ours).float().mean().item()
        equal, close = equal + (differing == 0), close + (differing < 0.03)
    # a tie of 'nearest' moves a pixel, a level at an edge changes one, and equalize after it a few more
    assert equal >= 160
    assert close >= 190


@pytest.mark.parametrize("degrees", [0.0, 30.0, -30.0])
def test_a_rotation_turns_counterclockwise_like_torchvisions_rotate(degrees):
    image = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    image[..., 4, 6:] = 255
    turned, _ = apply_operation(image, torch.tensor([Operation.ROTATE]), torch.tensor([degrees]), "bilinear")
    clockwise = affine_matrix((9, 9), degrees=torch.tensor([-degrees]), translate=torch.zeros(1, 2))
    assert torch.equal(turned, warp(image, clockwise, "bilinear"))
    upper, lower = turned[..., :4, :].sum(), turned[..., 5:, :].sum()
    assert (upper > lower) == (degrees > 0)
