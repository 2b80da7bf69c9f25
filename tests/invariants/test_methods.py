"""Laws that hold for every method on the list of methods, because it is on the list."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_ihb.functional import constants, gram
from hf_ihb.methods import METHODS, methods_of
from hf_ihb.trainer.arguments import DistillationTrainingArguments
from tests.invariants.test_no_waits import GPU, Copies
from tests.methods.steps import CLASSES, WIDTH, WIDTHS, attention_of, example, head_of, keys_of, method, scalar

NAMES = [kind.name for kind in METHODS]


def made(name, **keys):
    """The method switched on, at its defaults."""
    (kind,) = [k for k in METHODS if k.name == name]
    return method(name, **keys_of(kind) | {"alpha": 0.5} | keys)


def gradient_of(kind, **options):
    parameter = torch.eye(WIDTH).add(0.1).requires_grad_()
    loss = scalar(kind.loss(*example(kind, parameter=parameter, **options)))
    return loss, torch.autograd.grad(loss, parameter, allow_unused=True)[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_described_and_stands_on_something_it_names(name):
    kind = made(name)
    assert kind.name == name
    assert kind.describe()
    assert kind.summary()
    assert kind.label
    assert type(kind).__doc__
    assert set(kind.said) <= set(type(kind).__dataclass_fields__)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_method_needs_switches_the_teacher_on(name, tmp_path):
    (kind,) = [k for k in METHODS if k.name == name]
    args = DistillationTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **keys_of(kind))
    assert [m.name for m in methods_of(args)] == [name]
    needs = methods_of(args)[0].needs
    assert needs.logits or needs.layers or needs.final


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_a_scalar_in_float32_and_moves_the_student(name):
    loss, gradient = gradient_of(made(name))
    assert loss.ndim == 0
    assert loss.dtype == torch.float32
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 1e-5


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_asks_the_device_for_nothing(name, cached):
    kind = made(name)
    for table in (constants.constant, gram._upper, gram._places):
        table.cache_clear()
    with FakeTensorMode():
        head = head_of(kind, GPU)
        kind.loss(*example(kind, cached=cached, device=GPU, head=head))
        given = example(kind, cached=cached, device=GPU, head=head)
        with Copies() as copies:
            kind.loss(*given)
    for table in (constants.constant, gram._upper, gram._places):
        table.cache_clear()
    assert copies.found == []


@pytest.mark.parametrize("name", NAMES)
def test_what_a_method_says_is_enough_gives_its_loss_and_gradient(name):
    """Inner products of the teacher's tokens, or their mean, in the place of what they were taken of."""
    kind = made(name, center_positions=False)
    for found, expected in zip(gradient_of(kind, cached=True), gradient_of(kind), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_outputs_under_autocast_give_the_loss_of_float32(name):
    kind = made(name)
    expected = scalar(kind.loss(*example(kind)))
    with torch.autocast("cpu", torch.bfloat16):
        outputs, step = example(kind)
        outputs.logits = outputs.logits.bfloat16()
        outputs.features = tuple(x.bfloat16() for x in outputs.features)
        outputs.final_tokens = outputs.final_tokens.bfloat16()
        found = scalar(kind.loss(outputs, step))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=2e-2)


@pytest.mark.parametrize("name", NAMES)
def test_constant_outputs_of_either_side_give_a_finite_loss_and_gradient(name):
    kind = made(name)
    for side in ("student", "teacher", "both"):
        outputs, step = example(kind)
        constant = side != "teacher"
        outputs.features = tuple((torch.ones_like(x) if constant else x).requires_grad_() for x in outputs.features)
        outputs.final_tokens, outputs.logits = outputs.features[0], outputs.features[0][:, 0, :CLASSES]
        if kind.needs.attention:
            outputs.attentions = (attention_of(outputs.features[0], 0.0),)
        if side != "student":
            step.teacher.logits = torch.ones_like(step.teacher.logits)
            layers = step.teacher.layers
            for preparation, tokens in layers.items():
                layers[preparation] = [t._replace(tokens=torch.ones_like(t.tokens)) for t in tokens]
            if kind.needs.teacher_attention:
                step.teacher.attentions = [torch.ones_like(x) for x in step.teacher.attentions]
            step.teacher.final = step.teacher.final._replace(tokens=torch.ones_like(step.teacher.final.tokens))
        if (head := head_of(kind)) is not None:
            outputs.method_heads = {name: head(outputs, step.teacher)}
        loss = scalar(kind.loss(outputs, step))
        assert torch.isfinite(loss), side
        (gradient,) = torch.autograd.grad(loss, outputs.features, allow_unused=True)
        assert gradient is None or torch.isfinite(gradient).all(), side


@pytest.mark.parametrize("name", NAMES)
def test_scores_of_a_thousand_do_not_overflow(name):
    kind = made(name)
    outputs, step = example(kind)
    outputs.logits = (1000 * outputs.logits).requires_grad_()
    step.teacher.logits = 1000 * step.teacher.logits
    loss = scalar(kind.loss(outputs, step))
    assert torch.isfinite(loss)


@pytest.mark.parametrize("name", [name for name in NAMES if not made(name).needs.logits])
def test_a_batch_of_mixed_images_alone_teaches_nothing(name):
    kind = made(name)
    parameter = torch.eye(WIDTH).requires_grad_()
    outputs, step = example(kind, parameter=parameter)
    step.unmixed = torch.zeros_like(step.unmixed)
    loss = scalar(kind.loss(outputs, step))
    assert torch.isfinite(loss)
    (gradient,) = torch.autograd.grad(loss, parameter)
    assert (gradient == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_head_of_a_method_is_the_students_and_gets_a_gradient(name):
    kind = made(name)
    if (head := kind.head(WIDTHS)) is None:
        return
    loss = scalar(kind.loss(*example(kind, head=head)))
    gradients = torch.autograd.grad(loss, list(head.parameters()), allow_unused=True)
    assert all(gradient is not None for gradient in gradients)
