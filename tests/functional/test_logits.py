import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_ihb.functional.logits import hard_distillation_loss, kd_divergence, tilted_divergence


@pytest.fixture
def logits(generator):
    return 3 * torch.randn(2, 16, 10, generator=generator, dtype=torch.float64)


def brute_force_kd(student, teacher, temperature):
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p = np.exp(np.array(t) / temperature - np.logaddexp.reduce(np.array(t) / temperature))
        q = np.exp(np.array(s) / temperature - np.logaddexp.reduce(np.array(s) / temperature))
        total += sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kd_equals_the_divergence_written_out(logits, temperature):
    expected = brute_force_kd(*logits, temperature)
    assert kd_divergence(*logits, temperature).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 100.0, 1e4])
def test_kd_keeps_its_digits_in_float32_at_any_temperature(generator, scale, temperature):
    logits = scale * torch.randn(2, 16, 100, generator=generator)
    student, exact = logits[0].clone().requires_grad_(), logits[0].double().requires_grad_()
    shares = (logits[1].double() / temperature).log_softmax(-1)
    other = (exact / temperature).log_softmax(-1)
    expected = temperature**2 * (shares.exp() * (shares - other)).sum(-1).mean()
    loss = kd_divergence(student, logits[1], temperature)
    gradients = torch.autograd.grad(loss, student)[0], torch.autograd.grad(expected, exact)[0]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)  # float64 itself has no more at 1e4
    assert (gradients[0] - gradients[1]).norm() < 2e-5 * gradients[1].norm()


def test_tilting_divides_what_scores_differ_by_into_mean_and_divergence(generator):
    log_p = (3 * torch.randn(9, 7, generator=generator, dtype=torch.float64)).log_softmax(-1)
    for scale in (1e-3, 1.0, 1e3):
        difference = scale * torch.randn(9, 7, generator=generator, dtype=torch.float64)
        mean, divergence = tilted_divergence(log_p, difference)
        torch.testing.assert_close(mean, (log_p.exp() * difference).sum(-1))
        torch.testing.assert_close(mean + divergence, (log_p + difference).logsumexp(-1))
    difference.requires_grad_()
    assert torch.autograd.gradcheck(lambda d: tilted_divergence(log_p, d)[1], 1e-3 * difference)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_is_zero_for_logits_that_differ_by_a_constant_per_row(logits, temperature):
    shift = torch.randn(16, 1, dtype=torch.float64)
    assert kd_divergence(logits[0] + shift, logits[0], temperature).item() == pytest.approx(0, abs=1e-12)
    assert kd_divergence(*logits, temperature) > 1e-2


def test_kd_tends_to_half_the_mean_squared_difference_of_centred_logits(logits):
    centered = logits - logits.mean(dim=-1, keepdim=True)
    limit = (centered[0] - centered[1]).square().sum(dim=-1).mean() / (2 * logits.shape[-1])
    gaps = [abs(kd_divergence(*logits, t).item() / limit.item() - 1) for t in (1e2, 1e3, 1e4)]
    assert gaps[2] < 1e-3
    assert gaps[2] < gaps[1] / 5 < gaps[0] / 25  # first order in 1 / T


def test_kd_at_temperature_t_is_t_squared_times_that_of_logits_over_t(logits):
    torch.testing.assert_close(kd_divergence(*logits, 3.0), 9 * kd_divergence(*(logits / 3), 1.0))


def test_kd_is_the_mean_over_the_batch(logits):
    single = [kd_divergence(s[None], t[None], 2.0) for s, t in zip(*logits, strict=True)]
    torch.testing.assert_close(kd_divergence(*logits, 2.0), torch.stack(single).mean())


def test_kd_has_the_gradient_of_cross_entropy_to_the_teacher(logits):
    student = logits[0].clone().requires_grad_()
    kd_divergence(student, logits[1], 2.0).backward()
    expected = 2 * ((student.detach() / 2).softmax(-1) - (logits[1] / 2).softmax(-1)) / 16
    torch.testing.assert_close(student.grad, expected)


def test_hard_distillation_is_cross_entropy_to_the_teachers_decision(logits):
    log_probabilities = logits[0].log_softmax(-1)
    expected = -sum(log_probabilities[i, int(logits[1][i].argmax())] for i in range(16)) / 16
    torch.testing.assert_close(hard_distillation_loss(*logits), expected)
    torch.testing.assert_close(hard_distillation_loss(logits[0], 100 * logits[1]), expected)


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e3])
def test_losses_and_gradients_are_finite_for_huge_logits_and_any_temperature(temperature):
    teacher = 1e4 * torch.eye(8)
    for student in (-teacher, torch.zeros(8, 8), teacher.clone()):
        student.requires_grad_()
        loss = kd_divergence(student, teacher, temperature) + hard_distillation_loss(student, teacher)
        loss.backward()
        assert torch.isfinite(loss)
        assert loss >= 0
        assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("teacher", [torch.zeros(4, 5), F.one_hot(torch.arange(4), 5).float()])
def test_degenerate_teachers_leave_loss_and_gradient_finite(teacher):
    student = torch.zeros(4, 5, requires_grad=True)
    loss = kd_divergence(student, teacher, 1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("loss", [lambda s, t: kd_divergence(s, t, 1.0), hard_distillation_loss])
@pytest.mark.parametrize(("student", "teacher"), [((4, 10), (4, 11)), ((4, 10), (3, 10)), ((4, 2, 5), (4, 2, 5))])
def test_logits_that_do_not_match_are_refused_with_both_shapes(loss, student, teacher):
    with pytest.raises(ValueError, match="got ") as error:
        loss(torch.zeros(student), torch.zeros(teacher))
    assert f"{student} and {teacher}" in str(error.value)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(logits, temperature):
    with pytest.raises(ValueError, match=f"got {temperature}"):
        kd_divergence(*logits, temperature)


@pytest.mark.parametrize("loss", [lambda s, t: kd_divergence(s, t, 2.0), hard_distillation_loss])
def test_losses_stay_in_float32_under_bf16_autocast(logits, loss):
    student, teacher = logits.float()
    expected = loss(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(student, teacher)
        rounded = loss(student.bfloat16(), teacher.bfloat16())
    assert found.dtype == rounded.dtype == torch.float32
    assert torch.equal(found, expected)
    torch.testing.assert_close(rounded, loss(student.bfloat16().float(), teacher.bfloat16().float()))


def test_losses_keep_float64(logits):
    assert kd_divergence(*logits, 1.0).dtype == hard_distillation_loss(*logits).dtype == torch.float64
