import itertools

import pytest
import torch
import torch.nn.functional as F

from hf_ihb.arguments import AugmentationArguments
from hf_ihb.views import Augmenter, Views, as_float, class_targets

FILL = (0.1, 0.2, 0.3)
EVERYTHING = AugmentationArguments(
    random_crop_padding=2, horizontal_flip=0.5, cutout_size=3, mixup_alpha=0.8, cutmix_alpha=1.0, mix_probability=0.8
)
SETTINGS = {
    "nothing": AugmentationArguments(),
    "geometry": AugmentationArguments(random_crop_padding=2, horizontal_flip=0.5),
    "cutout": AugmentationArguments(cutout_size=3),
    "mixup": AugmentationArguments(mixup_alpha=0.8),
    "cutmix": AugmentationArguments(cutmix_alpha=1.0),
    "everything": EVERYTHING,
}


@pytest.fixture
def split(generator):
    images = torch.randint(256, (64, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return images, torch.arange(64) % 10


def make_augmenter(split, args, seed=0):
    images, labels = split
    return Augmenter(args, seed, FILL, lambda index: (images[index], labels[index]), len(images))


def augment(split, args, index, epoch=0, seed=0):
    index = torch.as_tensor(index)
    return make_augmenter(split, args, seed)(split[0][index], index, epoch)


def assert_equal_views(first, second):
    for name in ("stored", "augmented", "affine", "own_share"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert (first.partner_labels is None) == (second.partner_labels is None)
    if first.partner_labels is not None:
        assert torch.equal(first.partner_labels, second.partner_labels)


def concatenated(parts):
    partners = None if parts[0].partner_labels is None else torch.cat([p.partner_labels for p in parts])
    names = ("stored", "augmented", "affine", "own_share")
    return Views(*(torch.cat([getattr(p, name) for p in parts]) for name in names), partners)


@pytest.mark.parametrize("args", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("sizes", [[1] * 64, [7, 50, 7], [32, 32]])
def test_views_do_not_depend_on_how_the_split_is_batched(split, args, sizes):
    whole = augment(split, args, torch.arange(64), epoch=3)
    parts = [augment(split, args, index, epoch=3) for index in torch.arange(64).split(sizes)]
    assert_equal_views(concatenated(parts), whole)


@pytest.mark.parametrize("args", SETTINGS.values(), ids=SETTINGS)
def test_views_follow_their_image_through_a_permutation(split, args, generator):
    order = torch.randperm(64, generator=generator)
    whole, shuffled = augment(split, args, torch.arange(64)), augment(split, args, order)
    partners = None if whole.partner_labels is None else whole.partner_labels[order]
    expected = Views(whole.stored[order], whole.augmented[order], whole.affine[order], whole.own_share[order], partners)
    assert_equal_views(shuffled, expected)


def test_an_epoch_finished_in_other_batch_sizes_shows_the_same_images(split, generator):
    order, shown = torch.randperm(64, generator=generator), make_augmenter(split, EVERYTHING)
    uninterrupted = [shown(split[0][index], index, 5) for index in order.split(8)]
    resumed = make_augmenter(split, EVERYTHING)
    parts = [shown(split[0][i], i, 5) for i in order[:24].split(8)]
    parts += [resumed(split[0][i], i, 5) for i in order[24:].split(5)]
    assert_equal_views(concatenated(parts), concatenated(uninterrupted))


@pytest.mark.parametrize("name", ["geometry", "cutout", "mixup", "cutmix", "everything"])
def test_views_change_with_epoch_and_with_seed(split, name):
    index = torch.arange(64)
    views = [augment(split, SETTINGS[name], index, *setting) for setting in ((0, 0), (1, 0), (0, 1))]
    for a, b in itertools.combinations(views, 2):
        assert (a.augmented != b.augmented).flatten(1).any(dim=1).float().mean() > 0.5


def test_without_augmentation_the_stored_image_is_shown(split):
    views = augment(split, AugmentationArguments(), torch.arange(64))
    assert torch.equal(views.augmented, split[0].float() / 255)
    assert torch.equal(views.stored, views.augmented)
    assert torch.equal(views.affine, torch.eye(2, 3).expand(64, 2, 3))
    assert torch.equal(views.unmixed, torch.ones(64))
    assert views.partner_labels is None


def test_the_affine_leads_from_the_view_back_to_the_stored_image(split):
    views = augment(split, SETTINGS["geometry"], torch.arange(64))
    grid = F.affine_grid(views.affine, views.stored.shape, align_corners=False)
    expected = F.grid_sample(views.stored, grid, padding_mode="zeros", align_corners=False)
    torch.testing.assert_close(views.augmented, expected, rtol=0, atol=1e-5)


def test_crops_and_flips_are_uniform():
    images, count = torch.zeros(1, 1, 8, 8, dtype=torch.uint8), 20_000
    args = AugmentationArguments(random_crop_padding=2, horizontal_flip=0.3)
    augmenter = Augmenter(args, 0, (0.0,), lambda index: (images, index), count)
    affine = augmenter(images.expand(count, -1, -1, -1), torch.arange(count), 0).affine
    flipped = (affine[:, 0, 0] < 0).float()
    assert flipped.mean().item() == pytest.approx(0.3, abs=0.02)
    shifts = (affine[:, :, 2] * 4).round()
    for axis in (0, 1):
        assert {int(v) for v in shifts[:, axis].unique()} == {-2, -1, 0, 1, 2}
        for value in range(-2, 3):
            assert (shifts[:, axis] == value).float().mean().item() == pytest.approx(0.2, abs=0.02)
    correlation = torch.corrcoef(torch.stack((flipped, shifts[:, 0], shifts[:, 1])))
    assert (correlation - torch.eye(3)).abs().max() < 0.04


def test_cutout_leaves_the_mean_colour_and_nothing_else(split):
    views = augment(split, SETTINGS["cutout"], torch.arange(64))
    changed = (views.augmented != views.stored).any(dim=1)
    fill = torch.tensor(FILL)[:, None].expand(3, int(changed.sum()))
    assert torch.equal(views.augmented.transpose(0, 1)[:, changed], fill)
    assert changed.flatten(1).sum(dim=1).min() >= 1
    assert changed.flatten(1).sum(dim=1).max() <= 9


def test_where_the_cutout_lies_has_nothing_to_do_with_the_crop():
    images, count = torch.zeros(1, 1, 16, 16, dtype=torch.uint8), 5_000
    args = AugmentationArguments(random_crop_padding=4, horizontal_flip=0.5, cutout_size=4)
    augmenter = Augmenter(args, 0, (1.0,), lambda index: (images, index), count)
    views = augmenter(images.expand(count, -1, -1, -1), torch.arange(count), 0)
    covered, places = views.augmented[:, 0], torch.arange(16.0)
    rows, columns = ((covered.sum(dim=d) * places).sum(dim=1) / covered.sum(dim=(1, 2)) for d in (2, 1))
    geometry = (views.affine[:, 0, 0], views.affine[:, 0, 2], views.affine[:, 1, 2])
    correlation = torch.corrcoef(torch.stack((rows, columns, *geometry)))
    assert (correlation - torch.eye(5)).abs().max() < 5 / count**0.5


@pytest.mark.parametrize("name", ["mixup", "cutmix", "both"])
def test_the_own_share_is_the_share_of_the_image_that_is_its_own(name):
    args = {"both": AugmentationArguments(mixup_alpha=0.8, cutmix_alpha=1.0, mix_probability=0.7)}.get(name)
    args = args or SETTINGS[name]
    labels = torch.arange(200)
    images = labels.to(torch.uint8)[:, None, None, None].expand(-1, 1, 16, 16).contiguous()
    augmenter = Augmenter(args, 0, (0.0,), lambda index: (images[index], labels[index]), 200)
    views = augmenter(images, labels, 0)
    own, partner = labels.double() / 255, views.partner_labels.double() / 255
    differ = own != partner
    shown = views.augmented.double().mean(dim=(1, 2, 3))
    share = (shown - partner)[differ] / (own - partner)[differ]
    torch.testing.assert_close(views.own_share[differ].double(), share, rtol=0, atol=1e-3)
    assert differ.float().mean() > 0.9
    assert views.own_share.unique().numel() > 20


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_partners_come_from_the_whole_split_and_are_augmented_like_their_own_view(split, name):
    labels = torch.arange(64)
    geometry = {"random_crop_padding": 2, "horizontal_flip": 0.5, "cutout_size": 3}
    alpha = {"mixup": {"mixup_alpha": 0.8}, "cutmix": {"cutmix_alpha": 1.0}}[name]
    index = torch.arange(16)
    mixed = augment((split[0], labels), AugmentationArguments(**geometry, **alpha), index, epoch=2)
    alone = augment((split[0], labels), AugmentationArguments(**geometry), labels, epoch=2).augmented
    assert (mixed.partner_labels >= 16).any()
    own, other = alone[:16], alone[mixed.partner_labels]
    if name == "mixup":
        share = mixed.own_share[:, None, None, None]
        torch.testing.assert_close(mixed.augmented, share * own + (1 - share) * other)
    else:
        is_own, is_other = mixed.augmented == own, mixed.augmented == other
        assert (is_own | is_other).all()
        assert not is_own.all()
        assert not is_other.all()


def test_the_unmixed_are_exactly_those_that_show_their_own_view(split):
    geometry, labels = {"random_crop_padding": 2, "horizontal_flip": 0.5}, torch.arange(64)
    args = AugmentationArguments(**geometry, mixup_alpha=0.8, cutmix_alpha=1.0, mix_probability=0.5)
    mixed = augment((split[0], labels), args, labels)
    alone = augment(split, AugmentationArguments(**geometry), labels)
    same = (mixed.augmented == alone.augmented).flatten(1).all(dim=1)
    others = mixed.partner_labels != labels
    assert torch.equal(mixed.unmixed[others], same[others].float())
    assert 16 < mixed.unmixed.sum() < 48
    assert torch.equal(mixed.affine, alone.affine)


def test_mixing_with_probability_zero_touches_nothing(split):
    geometry = {"random_crop_padding": 2, "horizontal_flip": 0.5, "cutout_size": 3}
    args = AugmentationArguments(**geometry, mixup_alpha=0.8, cutmix_alpha=1.0, mix_probability=0.0)
    assert_equal_views(
        augment(split, args, torch.arange(64)), augment(split, AugmentationArguments(**geometry), torch.arange(64))
    )


@pytest.mark.parametrize(("probability", "kinds"), [(0.0, {"mixup"}), (1.0, {"cutmix"}), (0.5, {"mixup", "cutmix"})])
def test_the_switch_chooses_between_mixup_and_cutmix(split, probability, kinds):
    labels = torch.arange(64)
    args = AugmentationArguments(mixup_alpha=1.0, cutmix_alpha=1.0, mix_switch_probability=probability)
    views = augment((split[0], labels), args, labels)
    own_pixels = (views.augmented == views.stored).all(dim=1).flatten(1).float().mean(dim=1)
    cut = (own_pixels - views.own_share).abs() < 1e-6  # under MixUp next to no pixel stays as it was
    found = {"cutmix" if is_cut else "mixup" for is_cut in cut[views.partner_labels != labels].tolist()}
    assert found == kinds


def test_targets_are_smoothed_then_mixed(split):
    labels = torch.tensor([0, 2, 1])
    views = Views(
        *[torch.zeros(0)] * 3, own_share=torch.tensor([1.0, 0.25, 0.6]), partner_labels=torch.tensor([3, 0, 1])
    )
    found = class_targets(labels, 4, 0.2, views)
    low, high = 0.05, 0.85  # 0.2 / 4, and 1 - 0.2 more
    expected = torch.tensor(
        [
            [high, low, low, low],
            [0.25 * low + 0.75 * high, low, 0.25 * high + 0.75 * low, low],
            [low, high, low, low],
        ]
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(3))


def test_targets_without_partners_are_the_smoothed_labels():
    labels, still = torch.tensor([0, 2]), Views(*[torch.zeros(0)] * 3, own_share=torch.ones(2))
    for views in (None, still):
        torch.testing.assert_close(class_targets(labels, 3, 0.0, views), torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]))


def test_class_probabilities_are_taken_as_they_are():
    given = torch.tensor([[0.2, 0.8], [0.5, 0.5]], dtype=torch.float64)
    assert torch.equal(class_targets(given, 2, 0.1, None), given.float())


def test_pixels_become_floats_between_zero_and_one():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(as_float(levels), levels.float() / 255)
