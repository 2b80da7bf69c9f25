"""What runs in every step asks the device for nothing: on a pretended GPU, where any question is an error.

Fake tensors have shapes and devices and no values: `.item()`, a shape that depends on values or an `if` on a tensor
raises. Copies between host and device are caught beside that: from ordinary memory they wait as well.
"""

import functools
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_ihb.augment import Augmenter, class_targets, ops, policies
from hf_ihb.augment.color import equalize, fixed_shapes
from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.functional import constants, geometry, gram, tokens
from hf_ihb.functional.gram import gram_width, unpack_gram
from hf_ihb.functional.logits import task_loss
from hf_ihb.functional.resampling import Resampler
from hf_ihb.functional.tokens import pool_tokens, resampling_matrix, standardize_tokens
from hf_ihb.methods.base import TokenPair
from hf_ihb.models.processing import PixelFormat
from hf_ihb.trainer.cache_rows import Code
from hf_ihb.trainer.compiling import compiled
from hf_ihb.trainer.score_rows import ScoreRow
from hf_ihb.trainer.teacher_dropping import kept_teachers
from hf_ihb.trainer.view_rows import ViewRow
from tests.augment.test_augmenter import SETTINGS
from tests.methods.steps import logit_loss, losses

GPU = torch.device("cuda:0")
TABLES = (
    constants.constant,
    geometry.pixel_centers,
    ops._beta_quantiles,
    policies.magnitude_table,
    gram._upper,
    gram._places,
    tokens._token_centers,
    tokens._area_weights,
)


class Copies(TorchDispatchMode):
    """Notes every operation that has tensors of two devices, or moves one."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
        # a number that became a tensor has no dimensions and travels with the launch
        if len({x.device for x in leaves if isinstance(x, torch.Tensor) and x.ndim > 0}) > 1:
            self.found.append(str(func))
        return result


@pytest.fixture
def on_gpu():
    """Runs a function on the pretended GPU twice, and lists the copies of the second time."""
    for table in TABLES:
        table.cache_clear()

    def run(function):
        with FakeTensorMode():
            function()
            with Copies() as copies:
                function()
        return copies.found

    yield run
    for table in TABLES:
        table.cache_clear()


def images(count=12):
    return torch.empty(count, 3, 32, 32, dtype=torch.uint8, device=GPU)


def labels(count=12):
    return torch.empty(count, dtype=torch.long, device=GPU)


@pytest.mark.parametrize("name", SETTINGS)
def test_augmentation_asks_the_device_for_nothing(name, on_gpu):
    def step():
        augmenter = Augmenter(SETTINGS[name], 0, (0.5,) * 3, lambda rows: (images()[rows], labels()[rows]), 12)
        views = augmenter(images(), labels(), 3)
        PixelFormat((0.5,) * 3, (0.2,) * 3, (32, 32)).apply(views.seen)
        PixelFormat((0.5,) * 3, (0.2,) * 3, (112, 112)).apply(views.images)
        class_targets(labels(), 10, 0.1, views)

    assert on_gpu(step) == []


def test_partners_from_the_batch_ask_for_nothing_either(on_gpu):
    args = AugmentationArguments(mixup_alpha=0.8, cutmix_alpha=1.0, auto_augment="autoaugment_cifar10")
    augmenter = Augmenter(args, 0, (0.5,) * 3, None, 12)
    assert on_gpu(lambda: augmenter(images(), labels(), 3, labels())) == []


LOSSES = {
    "cka": {}, "cka of images": {"cka_scope": "images"}, "pooled": {"cka_scope": "pooled"},
    "rbf": {"cka_kernel": "rbf"}, "published": {"cka_estimator": "published"}, "centred": {"center_positions": True},
}  # fmt: skip


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_structural_losses_ask_the_device_for_nothing(name, cached, on_gpu):
    def step():
        student = torch.empty(4, 16, 24, device=GPU)
        matrix, mask = resampling_matrix(torch.empty(4, 2, 3, device=GPU), (4, 4), (4, 4))
        pooled, _ = pool_tokens(torch.empty(4, 49, 24, device=GPU), (7, 7), (4, 4))
        teacher = standardize_tokens(matrix @ pooled, torch.empty(16, 24, device=GPU), 1.0)
        known = unpack_gram(torch.empty(4, gram_width(16), dtype=torch.half, device=GPU), 16).resampled(matrix)
        pair = TokenPair(student, teacher, mask)
        if cached and "images" not in name and name != "pooled":
            pair = TokenPair(student, known, mask)
        pairs = {"cka": [pair], "gram": [pair]}
        pairs |= {} if cached else {"token": [pair], "relation": [pair]}
        values = losses(pairs, torch.empty(4, device=GPU), **LOSSES[name])
        assert all(loss.ndim == 0 for loss in values.values())

    assert on_gpu(step) == []


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_logit_losses_ask_the_device_for_nothing(kind, on_gpu):
    def step():
        student, teacher = (torch.empty(4, 10, device=GPU) for _ in range(2))
        loss = logit_loss("kd", student, teacher, distillation_type=kind, temperature=2.0)
        loss += task_loss([student], class_targets(labels(4), 10, 0.1, None))

    assert on_gpu(step) == []


@pytest.mark.parametrize("classes", [10, 1000])
def test_stored_scores_of_views_ask_the_device_for_nothing(classes, on_gpu):
    row = ScoreRow(classes)
    assert on_gpu(lambda: row.unpack(row.pack(torch.empty(4, classes, device=GPU)))) == []


def test_mean_tokens_of_views_ask_the_device_for_nothing(on_gpu):
    def step():
        row = ViewRow(mean=24, code=Code(torch.empty(1, 24, device=GPU), torch.empty(24, device=GPU)))
        (mean,) = row.unpack(row.pack(None, [], torch.empty(4, 24, device=GPU)))[1]
        known, mask = Resampler(None)(mean, (7, 7), (4, 4))
        pair = TokenPair(torch.empty(4, 16, 12, device=GPU), known, mask)
        losses({name: [pair] for name in ("relation", "sp", "rkd", "pkt")}, torch.empty(4, device=GPU))

    assert on_gpu(step) == []


def test_which_teacher_is_left_out_is_asked_of_nobody(on_gpu):
    def step():
        kept = kept_teachers(torch.empty(3, device=GPU), 0.5, seed=1, step=2)
        return kept[0] * 0.5 * torch.empty((), device=GPU)

    assert on_gpu(step) == []


def test_the_check_sees_a_question_a_copy_and_a_shape_that_depends_on_values(on_gpu):
    assert on_gpu(lambda: images() + torch.ones(32).to(GPU)) != []
    assert on_gpu(lambda: images().float() * torch.tensor([1.0, 2.0], device=GPU).sum()) != []
    for question in (
        lambda: bool(images().any()),
        lambda: images().sum().item(),
        lambda: torch.bincount(labels()),
        lambda: images()[images() > 3],
    ):
        with pytest.raises(Exception, match=r"aten\."):
            on_gpu(question)


# ---- The other path: groups on the CPU, masks elsewhere ----


@pytest.fixture
def without_groups():
    def run(function):
        with fixed_shapes():
            return function()

    return run


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("name", ["randaugment", "autoaugment", "trivialaugment", "jitter", "everything"])
def test_masks_give_every_image_what_groups_give_it(name, channels, without_groups, generator):
    kinds = {
        "randaugment": {"auto_augment": "randaugment", "randaugment_num_ops": 3},
        "autoaugment": {"auto_augment": "autoaugment_cifar10"},
        "trivialaugment": {"auto_augment": "trivialaugment_wide"},
        "jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.2},
    }
    settings = kinds.get(name) or functools.reduce(lambda a, b: a | b, kinds.values())
    stored = torch.randint(256, (120, channels, 9, 8), generator=generator, dtype=torch.uint8)
    stored[:6] = torch.tensor([0, 255, 7, 128, 1, 254], dtype=torch.uint8)[:, None, None, None]  # of one level each
    augmenter = Augmenter(AugmentationArguments(**settings), 0, (0.5,) * channels, None, 120)
    grouped = augmenter(stored, torch.arange(120), 1)
    masked = without_groups(lambda: augmenter(stored, torch.arange(120), 1))
    assert torch.equal(masked.seen, grouped.seen)
    assert torch.equal(masked.affine, grouped.affine)


def test_levels_are_counted_alike(without_groups, generator):
    stored = torch.randint(256, (5, 3, 16, 16), generator=generator, dtype=torch.uint8) // 3
    assert torch.equal(without_groups(lambda: equalize(stored)), equalize(stored))


def test_a_compiled_augmentation_is_one_graph_for_all_epochs_and_equals_the_eager_one(generator):
    args = AugmentationArguments(
        random_crop_padding=4, horizontal_flip=0.5, auto_augment="trivialaugment_wide", random_erasing=0.25,
        mixup_alpha=0.8, cutmix_alpha=1.0, mix_probability=0.5,
    )  # fmt: skip
    stored = torch.randint(256, (16, 3, 32, 32), generator=generator, dtype=torch.uint8)
    classes = torch.arange(16) % 10
    augmenter = Augmenter(args, 2**40 + 3, (0.4,) * 3, lambda rows: (stored[rows], classes[rows]), 16)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    how = SimpleNamespace(torch_compile=True, torch_compile_backend=counter, torch_compile_mode=None)
    constants.constant.cache_clear()
    ops._beta_quantiles.cache_clear()
    fast = compiled(augmenter.__call__, how)
    for epoch in (0, 1, 5):
        found = fast(stored, torch.arange(16), torch.tensor(epoch), classes)
        expected = augmenter(stored, torch.arange(16), epoch)
        torch.testing.assert_close(found.seen, expected.seen, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.affine, expected.affine, rtol=0, atol=1e-6)
        assert torch.equal(found.partner_labels, expected.partner_labels)
    assert counter.frame_count == 1
