import itertools

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare, kstest

import hf_ihb.augment.augmenter
from hf_ihb.augment import Augmenter, Stream, class_targets, color, ops, policies
from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.functional import geometry
from hf_ihb.functional.random import counter_uniforms, stream_words, uniforms
from hf_ihb.step import Views, as_float

FILL = (0.1, 0.2, 0.3)
PARTS = {
    "geometry": {"random_crop_padding": 2, "horizontal_flip": 0.5},
    "affine": {"rotation_degrees": 20.0, "translate_fraction": 0.2, "scale_jitter": 0.2, "shear_degrees": 15.0},
    "jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    "randaugment": {"auto_augment": "randaugment", "interpolation": "nearest"},
    "autoaugment": {"auto_augment": "autoaugment_cifar10"},
    "trivialaugment": {"auto_augment": "trivialaugment_wide"},
    "cutout": {"cutout_size": 3},
    "erasing": {"random_erasing": 0.7},
    "mixup": {"mixup_alpha": 0.8},
    "cutmix": {"cutmix_alpha": 1.0},
}
EVERYTHING = AugmentationArguments(
    **PARTS["geometry"], **PARTS["affine"], **PARTS["jitter"], **PARTS["trivialaugment"], **PARTS["cutout"],
    **PARTS["erasing"], **PARTS["mixup"], **PARTS["cutmix"], mix_probability=0.8,
)  # fmt: skip
SETTINGS = {
    "nothing": AugmentationArguments(),
    **{name: AugmentationArguments(**keys) for name, keys in PARTS.items()},
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
    expected = Views(whole.images[order], whole.seen[order], whole.affine[order], whole.own_share[order], partners)
    assert_equal_views(shuffled, expected)


def test_an_epoch_finished_in_other_batch_sizes_shows_the_same_images(split, generator):
    order, shown = torch.randperm(64, generator=generator), make_augmenter(split, EVERYTHING)
    uninterrupted = [shown(split[0][index], index, 5) for index in order.split(8)]
    resumed = make_augmenter(split, EVERYTHING)
    parts = [shown(split[0][i], i, 5) for i in order[:24].split(8)]
    parts += [resumed(split[0][i], i, 5) for i in order[24:].split(5)]
    assert_equal_views(concatenated(parts), concatenated(uninterrupted))


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "nothing"])
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


def test_streams_keep_their_numbers():
    """A run that was begun with one version is finished with another: what a stream draws must not change."""
    expected = ["GEOMETRY", "CUTOUT", "MIX_PARTNER", "MIX", "AFFINE", "COLOR_JITTER", "POLICY", "ERASING"]
    expected += ["TEACHER_DROPPING"]
    assert [stream.name for stream in sorted(Stream)] == expected
    assert [stream.value for stream in sorted(Stream)] == list(range(9))


def drawn_numbers(monkeypatch, split, args):
    """What each stream gave for the first batch of an epoch, by stream and images."""
    drawn = {}

    def recorded(seed, epoch, index, counts):
        words = stream_words(seed, epoch, index, counts)
        for stream, numbers in words.items():
            drawn.update({(stream, image): row for image, row in zip(index.tolist(), numbers, strict=True)})
        return words

    def as_uniforms(*given):
        return {stream: uniforms(words) for stream, words in recorded(*given).items()}

    with monkeypatch.context() as patch:
        patch.setattr(hf_ihb.augment.augmenter, "stream_words", recorded)
        patch.setattr(hf_ihb.augment.augmenter, "stream_uniforms", as_uniforms)
        augment(split, args, torch.arange(16), epoch=2)
    return drawn


@pytest.mark.parametrize("name", PARTS)
def test_an_operation_draws_the_same_numbers_alone_and_among_all_others(monkeypatch, split, name):
    keys = {**EVERYTHING.__dict__, **PARTS[name]}
    together = drawn_numbers(monkeypatch, split, AugmentationArguments(**keys))
    alone = drawn_numbers(monkeypatch, split, AugmentationArguments(**PARTS[name]))
    assert alone
    for place, numbers in alone.items():
        assert torch.equal(together[place], numbers)


@pytest.mark.parametrize("channels", [1, 3])
def test_operations_come_in_the_order_of_the_published_pipeline(generator, channels):
    images = torch.randint(256, (40, channels, 8, 8), generator=generator, dtype=torch.uint8)
    index, fill = torch.arange(40), torch.tensor(FILL[:channels])
    keys = {
        k: v
        for name in ("geometry", "affine", "jitter", "randaugment", "cutout", "erasing")
        for k, v in PARTS[name].items()
    }
    views = Augmenter(AugmentationArguments(**keys), 5, tuple(fill), None, 40)(images, index, 3)

    def draw(stream, count):
        return counter_uniforms(5, 3, index, stream, count)

    u = draw(Stream.GEOMETRY, 3)
    place = (u[:, :2] * 5).long()
    expected, first = ops.crop_flip(images, place, u[:, 2] < 0.5, 2)
    u = 2 * draw(Stream.AFFINE, 5) - 1
    slope = torch.stack((torch.tan(torch.deg2rad(15 * u[:, 4])), torch.zeros(40)), dim=1)
    then = geometry.affine_matrix(
        (8, 8), degrees=20 * u[:, 0], translate=(0.2 * 8 * u[:, 1:3]).round(), scale=1 + 0.2 * u[:, 3], slope=slope
    )
    expected = geometry.warp(expected, then, "nearest")
    amounts = (0.4, 0.4, 0.4, 0.1)
    expected = color.color_jitter(expected, *color.jitter_draws(draw(Stream.COLOR_JITTER, 8), amounts), amounts)
    operations = policies.randaugment(draw(Stream.POLICY, 4).unflatten(1, (2, 2)), 9, (8, 8))
    expected, last = policies.apply_operations(expected, *operations, "nearest")
    u = draw(Stream.CUTOUT, 2)
    expected = ops.cutout(as_float(expected), (u * 8).long(), 3, fill)
    u = draw(Stream.ERASING, 23)
    erased = ops.erase(expected, *ops.erasing_rectangles(u[:, 1:], 8, 8), fill)
    expected = torch.where((u[:, 0] < 0.7)[:, None, None, None], erased, expected)

    torch.testing.assert_close(views.augmented, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        views.affine, geometry.compose_affines(geometry.compose_affines(first, then), last), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("policy", ["randaugment", "autoaugment_cifar10", "trivialaugment_wide"])
def test_the_composed_affine_leads_from_the_last_view_to_the_stored_image(policy):
    """A smooth image survives being resampled up to five times, so one resampling by the affine shows the same."""
    y, x = torch.meshgrid(*[torch.linspace(0, 1, 40)] * 2, indexing="ij")
    image = torch.stack((40 + 180 * x, 220 - 180 * y, 130 + 60 * torch.sin(3 * x + 2 * y))).round().to(torch.uint8)
    images = image.expand(96, -1, -1, -1)
    keys = {"random_crop_padding": 4, "horizontal_flip": 0.5, "rotation_degrees": 15.0, "translate_fraction": 0.1}
    args = AugmentationArguments(**keys, scale_jitter=0.2, shear_degrees=10.0, auto_augment=policy)
    augmenter = Augmenter(args, 0, (0.0,) * 3, None, 96)
    count = augmenter._numbers()[Stream.POLICY]
    operations, _ = augmenter._policy(counter_uniforms(0, 0, torch.arange(96), Stream.POLICY, count), 40, 40)
    only_moved = (operations <= policies.Operation.ROTATE).all(dim=1)
    assert only_moved.sum() >= 8
    views = augmenter(images, torch.arange(96), 0)
    grid = F.affine_grid(views.affine, images.shape, align_corners=False)
    inside = F.grid_sample(torch.ones(96, 1, 40, 40), grid, align_corners=False) > 0.999
    valid = augmenter(torch.full_like(images, 255), torch.arange(96), 0).augmented == 1  # white without zeros mixed in
    kept = (inside & valid)[only_moved]
    expected = F.grid_sample(views.stored, grid, align_corners=False)
    difference = (views.augmented - expected).abs()[only_moved][kept]
    assert kept.float().mean() > 0.4
    assert difference.max() < 3 / 255
    assert difference.mean() < 1 / 255


def recovered(affine):
    """Degrees, shift in pixels of an 8 x 8 image, scale and degrees of horizontal shear: the affine's parameters."""
    forward = torch.linalg.inv(affine[:, :, :2].double())
    degrees = torch.rad2deg(torch.atan2(forward[:, 1, 0], forward[:, 0, 0]))
    scale = torch.linalg.det(forward).sqrt()
    shear = torch.rad2deg(-(forward[:, :, 0] * forward[:, :, 1]).sum(dim=1).div(scale**2).atan())
    shift = 4 * (forward @ -affine[:, :, 2:].double())[..., 0]
    return degrees, shift, scale, shear


def test_affine_parameters_are_uniform_in_their_ranges_and_independent():
    count, images = 6_000, torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    args = AugmentationArguments(rotation_degrees=30.0, translate_fraction=0.25, scale_jitter=0.4, shear_degrees=20.0)
    augmenter = Augmenter(args, 0, (0.0,), None, count)
    affine = augmenter(images.expand(count, -1, -1, -1), torch.arange(count), 0).affine
    degrees, shift, scale, shear = recovered(affine)
    for values, low, high in ((degrees, -30, 30), (scale, 0.6, 1.4), (shear, -20, 20)):
        assert kstest(values.numpy(), "uniform", (low, high - low)).pvalue > 1e-3
    for axis in (0, 1):  # uniform between -2 and 2, rounded
        values, counts = shift[:, axis].round().unique(return_counts=True)
        assert values.tolist() == [-2, -1, 0, 1, 2]
        assert chisquare(counts, count * torch.tensor([1, 2, 2, 2, 1]) / 8).pvalue > 1e-3
    assert (shift - shift.round()).abs().max() < 1e-4
    correlation = torch.corrcoef(torch.stack((degrees, *shift.T, scale, shear)))
    assert (correlation - torch.eye(5)).abs().max() < 5 / count**0.5


@pytest.mark.parametrize("key", ["rotation_degrees", "translate_fraction", "scale_jitter", "shear_degrees"])
def test_one_part_of_the_affine_leaves_the_others_alone(key):
    args = AugmentationArguments(**{key: 0.5})
    augmenter = Augmenter(args, 0, (0.0,), None, 50)
    affine = augmenter(torch.zeros(50, 1, 8, 8, dtype=torch.uint8), torch.arange(50), 0).affine
    degrees, shift, scale, shear = recovered(affine)
    still = {
        "rotation_degrees": degrees.abs(), "translate_fraction": shift.abs().amax(dim=1),
        "scale_jitter": (scale - 1).abs(), "shear_degrees": shear.abs(),
    }  # fmt: skip
    assert still.pop(key).max() > 0.3
    assert all(value.max() < 1e-4 for value in still.values())


def test_erasing_leaves_the_mean_colour_as_often_as_asked(split):
    augmenter = make_augmenter(split, AugmentationArguments(random_erasing=0.3))
    index = torch.arange(64)
    views = [augmenter(split[0], index, epoch) for epoch in range(30)]
    changed = torch.cat([(v.augmented != v.stored).any(dim=1) for v in views])
    pixels = torch.cat([v.augmented for v in views]).transpose(0, 1)[:, changed]
    assert torch.equal(pixels, torch.tensor(FILL)[:, None].expand_as(pixels))
    assert changed.flatten(1).any(dim=1).float().mean().item() == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 28])
@pytest.mark.parametrize("name", SETTINGS)
def test_small_and_grey_images_are_augmented_within_their_range(generator, name, channels, size):
    images = torch.randint(256, (32, channels, size, size), generator=generator, dtype=torch.uint8)
    fill = (0.5,) * channels
    augmenter = Augmenter(SETTINGS[name], 0, fill, lambda index: (images[index], index), 32)
    views = augmenter(images, torch.arange(32), 0)
    assert views.augmented.shape == images.shape
    assert views.augmented.min() >= 0
    assert views.augmented.max() <= 1
    assert torch.isfinite(views.affine).all()


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


def test_class_probabilities_are_mixed_like_hard_labels():
    hard, partners, share = torch.tensor([0, 2, 1]), torch.tensor([3, 0, 1]), torch.tensor([1.0, 0.25, 0.6])
    found = [
        class_targets(labels, 4, 0.0, Views(*[torch.zeros(0)] * 3, own_share=share, partner_labels=others))
        for labels, others in ((hard, partners), (torch.eye(4)[hard], torch.eye(4)[partners]))
    ]
    assert torch.equal(found[0], found[1])


def test_pixels_become_floats_between_zero_and_one():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(as_float(levels), levels.float() / 255)


def test_partners_from_the_batch_are_the_next_images_as_they_are_seen(split):
    images, labels = split
    args = AugmentationArguments(horizontal_flip=0.5, mixup_alpha=0.8)
    augmenter = Augmenter(args, 0, FILL, None, 64)
    mixed = augmenter(images, torch.arange(64), 2, labels)
    alone = augment(split, AugmentationArguments(horizontal_flip=0.5), torch.arange(64), epoch=2).augmented
    share = mixed.own_share[:, None, None, None]
    torch.testing.assert_close(mixed.augmented, share * alone + (1 - share) * alone.roll(-1, 0))
    assert torch.equal(mixed.partner_labels, labels.roll(-1, 0))
    with pytest.raises(ValueError, match="expected its labels"):
        augmenter(images, torch.arange(64), 2)


def test_an_epoch_may_be_a_tensor(split):
    images, _ = split
    augmenter = make_augmenter(split, EVERYTHING)
    assert_equal_views(augmenter(images, torch.arange(64), torch.tensor(7)), augmenter(images, torch.arange(64), 7))


def test_partners_that_are_brought_along_are_those_that_would_be_fetched(split):
    index, augmenter = torch.arange(5, 25), make_augmenter(split, EVERYTHING)
    expected = augmenter(split[0][index], index, 3)
    rows = augmenter.partners_of(index, 3)
    brought = Augmenter(EVERYTHING, 0, FILL, None, len(split[0]))
    assert_equal_views(brought(split[0][index], index, 3, None, (rows, split[0][rows], split[1][rows])), expected)
