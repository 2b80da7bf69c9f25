import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_ihb.functional.augment import identity_affine
from hf_ihb.functional.logits import hard_distillation_loss, kd_divergence
from hf_ihb.functional.similarity import center_positions, gram_distance, linear_cka
from hf_ihb.functional.tokens import resample_tokens, token_cosine_distance
from hf_ihb.losses import (
    TokenPair,
    cka_loss,
    logit_distillation_loss,
    structural_losses,
    task_loss,
    warmup_factor,
)

ALL = {"cka": True, "gram": True, "token": True}


def random_pair(generator, batch=32, tokens=9, student_width=6, teacher_width=8):
    def randn(width):
        return torch.randn(batch, tokens, width, generator=generator)

    mask = torch.rand(batch, tokens, generator=generator) < 0.8
    return TokenPair(randn(student_width), randn(teacher_width), mask, randn(teacher_width), randn(teacher_width))


def rows(pair, index):
    return TokenPair(*(x[index] for x in pair))


@pytest.mark.parametrize("kind", ["linear", "step"])
def test_a_weight_without_warmup_is_full_from_the_start(kind):
    assert warmup_factor(0.0, 0.0, kind) == 1.0


def test_a_linear_warmup_rises_in_proportion_and_stays():
    assert [warmup_factor(e, 4.0, "linear") for e in (0, 1, 2.5, 4, 9)] == [0, 0.25, 0.625, 1, 1]


def test_a_step_warmup_is_zero_until_its_end():
    assert [warmup_factor(e, 4.0, "step") for e in (0, 1, 3.999, 4, 9)] == [0, 0, 0, 1, 1]


def test_the_task_loss_is_the_mean_cross_entropy_of_all_heads(generator):
    heads = [torch.randn(8, 5, generator=generator) for _ in range(2)]
    labels = torch.randint(5, (8,), generator=generator)
    found = task_loss(heads, F.one_hot(labels, 5).float())
    torch.testing.assert_close(found, sum(F.cross_entropy(logits, labels) for logits in heads) / 2)
    soft = torch.rand(8, 5, generator=generator).softmax(-1)
    expected = -(soft * heads[0].log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(task_loss(heads[:1], soft), expected)
    assert task_loss([heads[0].bfloat16()], soft).dtype == torch.float32


def test_logit_distillation_is_soft_or_hard_as_asked(generator):
    student, teacher = torch.randn(2, 8, 5, generator=generator)
    assert torch.equal(logit_distillation_loss(student, teacher, "soft", 3.0), kd_divergence(student, teacher, 3.0))
    assert torch.equal(logit_distillation_loss(student, teacher, "hard", 3.0), hard_distillation_loss(student, teacher))


def test_structural_losses_are_the_means_over_images_and_layers(generator):
    pairs, weight = [random_pair(generator) for _ in range(3)], torch.ones(32)
    found = structural_losses(pairs, weight, **ALL)
    expected = {"cka_loss": [], "gram_loss": [], "token_loss": []}
    for pair in pairs:
        for i in range(32):
            s, t, mask, projected, standardized = (x[i] for x in pair)
            expected["cka_loss"].append(1 - linear_cka(s[mask], t[mask], "debiased"))
            expected["gram_loss"].append(gram_distance(s[mask], t[mask]))
            expected["token_loss"].append(token_cosine_distance(projected[mask][None], standardized[mask][None])[0])
    assert found.pop("cka_undefined") == 0
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], torch.stack(values).mean())


@pytest.mark.parametrize("name", ["cka", "gram", "token"])
def test_only_the_losses_asked_for_are_computed(generator, name):
    pair = random_pair(generator, batch=4)
    if name != "token":
        pair = pair._replace(projected=None, standardized=None)
    found = structural_losses([pair], torch.ones(4), **{n: n == name for n in ALL})
    assert set(found) - {"cka_undefined"} == {f"{name}_loss"}


@pytest.mark.parametrize("estimator", ["biased", "debiased"])
@pytest.mark.parametrize("mixed", [False, True])
def test_eight_images_four_times_are_thirty_two_images_once(generator, estimator, mixed):
    pair = random_pair(generator)
    weight = (torch.rand(32, generator=generator) < 0.5).float() if mixed else torch.ones(32)
    pair.student.requires_grad_()

    def loss(index):
        values = structural_losses([rows(pair, index)], weight[index], cka_estimator=estimator, **ALL)
        return values, torch.autograd.grad(values["cka_loss"] + values["gram_loss"], pair.student)[0]

    whole, gradient = loss(slice(None))
    parts = [loss(slice(i, i + 8)) for i in range(0, 32, 8)]
    for name, value in whole.items():
        torch.testing.assert_close(torch.stack([p[name] for p, _ in parts]).mean(), value)
    torch.testing.assert_close(sum(g for _, g in parts) / 4, gradient)


def test_centring_positions_over_the_batch_is_not_additive(generator):
    pair, weight = random_pair(generator), torch.ones(32)
    whole = structural_losses([pair], weight, center=True, **ALL)["cka_loss"]
    parts = [structural_losses([rows(pair, slice(i, i + 8))], weight[:8], center=True, **ALL) for i in range(0, 32, 8)]
    assert abs(torch.stack([p["cka_loss"] for p in parts]).mean() - whole) > 1e-4


def test_centring_removes_the_batch_mean_of_the_student_before_cka_and_gram_alone(generator):
    pair, weight = random_pair(generator), (torch.rand(32, generator=generator) < 0.6).float()
    moved = pair._replace(student=pair.student + 5 * torch.randn(9, 6, generator=generator))
    centered = pair._replace(student=center_positions(pair.student, weight))
    expected = structural_losses([centered], weight, **ALL)
    for given in (pair, moved):
        found = structural_losses([given], weight, center=True, **ALL)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scope", ["tokens", "images"])
@pytest.mark.parametrize("center", [False, True])
def test_images_without_weight_contribute_nothing_and_get_no_gradient(generator, scope, center):
    weight = torch.tensor([1.0, 0.0] * 8)
    given = random_pair(generator, batch=16)
    other = random_pair(generator, batch=16)
    changed = TokenPair(
        *(torch.where(weight.view(-1, *[1] * (a.ndim - 1)) > 0, a, b) for a, b in zip(given, other, strict=True))
    )
    results = []
    for pair in (given, changed):
        pair.student.requires_grad_()
        pair.projected.requires_grad_()
        losses = structural_losses([pair], weight, cka_scope=scope, center=center, **ALL)
        gradients = torch.autograd.grad(sum(losses.values()), (pair.student, pair.projected))
        results.append((losses, gradients))
    for name, value in results[0][0].items():
        torch.testing.assert_close(value, results[1][0][name])
    for gradient in (*results[0][1], *results[1][1]):
        assert (gradient[weight == 0] == 0).all()
        assert (gradient[weight > 0] != 0).any()


def test_a_batch_of_mixed_images_alone_is_a_loss_of_zero_without_gradient(generator):
    pair = random_pair(generator, batch=8)
    pair.student.requires_grad_()
    losses = structural_losses([pair], torch.zeros(8), center=True, **ALL)
    assert all(value == 0 for value in losses.values())
    (gradient,) = torch.autograd.grad(sum(losses.values()), pair.student)
    assert (gradient == 0).all()


def test_cka_over_images_compares_the_mean_tokens_inside(generator):
    pair, weight = random_pair(generator), torch.ones(32)
    means = [
        torch.stack([x[m].mean(0) for x, m in zip(tokens, pair.mask, strict=True)])
        for tokens in (pair.student, pair.teacher)
    ]
    loss, undefined = cka_loss(pair, weight, "images", "debiased")
    torch.testing.assert_close(loss, 1 - linear_cka(*means, "debiased"))
    assert undefined == 0
    weight[10:] = 0
    expected = 1 - linear_cka(means[0][:10], means[1][:10], "debiased")
    torch.testing.assert_close(cka_loss(pair, weight, "images", "debiased")[0], expected)


def test_undefined_cka_is_a_constant_loss_of_one_and_counted(generator):
    pair = random_pair(generator, batch=8)
    student = pair.student.clone()
    student[:2] = 1.0
    student.requires_grad_()
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    values = structural_losses([pair._replace(student=student)], weight, **ALL)
    assert values["cka_undefined"] == 1 / 8  # image 1 is constant as well, but takes no part
    (gradient,) = torch.autograd.grad(values["cka_loss"], student)
    assert (gradient[:2] == 0).all()
    assert torch.isfinite(gradient).all()
    constant = pair._replace(student=torch.ones_like(student))
    assert structural_losses([constant], torch.ones(8), **ALL)["cka_loss"] == 1
    assert cka_loss(rows(pair, slice(3)), torch.ones(3), "images", "debiased") == (1, 1)


class NoContent:
    """Student and teacher whose images have nothing in common; each repeats a position code of its own."""

    grid, batch = (4, 4), 32
    student_width, teacher_width = 24, 32

    def __init__(self, generator):
        self.generator = generator
        self.student_code, self.teacher_code = 3 * self.randn(16, 24), 3 * self.randn(16, 32)
        self.channels = torch.logspace(-1, 1, 32)
        statistics = self.teacher_tokens(1024)
        self.mean = statistics.mean(dim=0)
        self.std = (statistics - self.mean).square().mean(dim=(0, 1)).sqrt()

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def teacher_tokens(self, batch):
        return (self.teacher_code + self.randn(batch, 16, self.teacher_width)) * self.channels

    def pair(self, project, *, standardize):
        student = self.student_code + self.randn(self.batch, 16, self.student_width)
        tokens, affine = self.teacher_tokens(self.batch), identity_affine(self.batch)
        centered, mask = resample_tokens(tokens - self.mean, self.grid, affine, self.grid)
        target = centered / self.std if standardize else resample_tokens(tokens, self.grid, affine, self.grid)[0]
        return TokenPair(student, centered, mask, project(student), target)

    def optimise(self, *, standardize):
        """Every trainable parameter of the losses, for 300 steps; means over the first and the last 20."""
        project = nn.Linear(self.student_width, self.teacher_width)
        optimizer = torch.optim.AdamW(project.parameters(), lr=1e-2)
        history = []
        for _ in range(300):
            pair = self.pair(project, standardize=standardize)
            losses = structural_losses([pair], torch.ones(self.batch), center=True, **ALL)
            total = losses["cka_loss"] + losses["gram_loss"] + losses["token_loss"]
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            history.append(torch.stack((total.detach(), losses["token_loss"].detach())))
        history = torch.stack(history)
        return history[:20].mean(dim=0), history[-20:].mean(dim=0)


def test_without_shared_content_no_loss_can_be_optimised(generator):
    first, last = NoContent(generator).optimise(standardize=True)
    assert (last > 0.9 * first).all()


def test_the_same_losses_fall_where_the_teachers_position_code_is_left_in(generator):
    first, last = NoContent(generator).optimise(standardize=False)
    assert last[1] < 0.5 * first[1]
    assert last[0] < 0.9 * first[0]


def test_a_shared_position_code_scores_as_similarity_until_positions_are_centred(generator):
    setting = NoContent(generator)
    setting.student_code = setting.teacher_code[:, :24]
    pair, weight = setting.pair(nn.Linear(24, 32), standardize=True), torch.ones(setting.batch)
    only_cka = {"cka": True, "gram": False, "token": False}
    left_in = pair._replace(teacher=(pair.teacher + setting.mean) / setting.channels)
    assert structural_losses([left_in], weight, **only_cka)["cka_loss"] < 0.5
    assert structural_losses([pair], weight, center=True, **only_cka)["cka_loss"] > 0.95
