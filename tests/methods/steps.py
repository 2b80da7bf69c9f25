"""Losses of methods on tensors that a test made, in the place of a student and a teacher."""

from dataclasses import MISSING, fields
from types import SimpleNamespace

import pytest
import torch

from hf_ihb.functional.gram import pack_gram, unpack_gram
from hf_ihb.functional.tokens import TokenMean
from hf_ihb.methods import METHODS
from hf_ihb.methods.base import TokenPair, Widths
from hf_ihb.step import Step, StudentOutput, TeacherOutputs, TeacherTokens
from hf_ihb.trainer.arguments import MethodKeys

BY_NAME = {kind.name: kind for kind in METHODS}


def method(name, **keys):
    """A method of one layer with some keys; position codes are left in unless a key asks for their removal."""
    defaults = {f.name: f.default if f.default is not MISSING else f.default_factory() for f in fields(MethodKeys)}
    return BY_NAME[name].of(SimpleNamespace(**defaults | {"center_positions": False, "student_layers": [0]} | keys))


def step_of(kind, layers, weight, **more):
    """What a student and a teacher would have to say for a method to compare some pairs of tokens."""
    teacher = [TeacherTokens(pair.teacher, pair.mask) for pair in layers]
    student = [pair.student for pair in layers]
    outputs = StudentOutput(features=tuple(student), final_tokens=student[0], method_heads={kind.name: student})
    says = TeacherOutputs(layers={kind.needs.preparation: teacher}, final=teacher[0])
    return outputs, Step(layers[0].student, teacher=says, unmixed=weight, **more)


def losses(pairs, weight, *, reduce=None, gather=None, **keys):
    """``<name>_loss`` of each method, and what it logs beside it.

    Args:
        pairs: For each method the `TokenPair`s of its layers.
        weight: ``(B,)`` share of each image.
        reduce: As in `Step`.
        gather: As in `Step`.
        **keys: Of the methods.
    """
    values = {}
    for name, layers in pairs.items():
        kind = method(name, **keys)
        loss = kind.loss(*step_of(kind, layers, weight, reduce=reduce, gather=gather))
        loss, beside = loss if isinstance(loss, tuple) else (loss, {})
        values |= beside | {f"{name}_loss": loss}
    return values


def logit_loss(name, student, teacher, labels=None, **keys):
    """The loss of a method of one head's logits ``(B, K)``."""
    loss = method(name, **keys).loss(
        StudentOutput(logits=student), Step(student, labels, teacher=TeacherOutputs(logits=teacher))
    )
    return loss[0] if isinstance(loss, tuple) else loss


def pooled_loss(name, student, teacher, weight=None, **keys):
    """The loss of a method of pooled features ``(B, D)``, as those of images of one token."""
    weight = torch.ones(len(student)) if weight is None else weight
    pair = TokenPair(student[:, None], teacher[:, None], torch.ones(len(student), 1))
    kind = method(name, **keys)
    return kind.loss(*step_of(kind, [pair], weight))


def slope(reference, x, place, by=1e-5):
    """Central difference of a function of a float64 array in one of its entries."""
    ends = []
    for sign in (1, -1):
        moved = x.copy()
        moved[place] += sign * by
        ends.append(reference(moved))
    return (ends[0] - ends[1]) / (2 * by)


def check_definition(name, reference, features, places, *, rel=1e-5, slope_rel=1e-3, slope_abs=1e-6, **keys):
    """Sees that a method of pooled features ``(B, D)`` and its gradient are those of a function of float64 arrays."""
    own, other = (x.clone() for x in features)
    loss = pooled_loss(name, own.requires_grad_(), other, **keys)
    (gradient,) = torch.autograd.grad(loss, own)
    given = [x.double().numpy() for x in features]
    assert loss.item() == pytest.approx(reference(*given), rel=rel)
    for place in places:
        expected = slope(lambda x: reference(x, given[1]), given[0], place)
        assert gradient[place].item() == pytest.approx(expected, rel=slope_rel, abs=slope_abs)


BATCH, TOKENS, WIDTH, CLASSES = 12, 9, 6, 5
WIDTHS = Widths((WIDTH,), (2 * WIDTH,), (WIDTH, 2 * WIDTH), CLASSES)


def example(kind, *, parameter=None, rows=slice(None), cached=False, device="cpu", dtype=torch.float32, head=None):
    """What a student and a teacher say of a batch of noise, for any method.

    Args:
        kind: The method.
        parameter: ``(6, 6)`` map that makes the student's tokens; the identity if None.
        rows: Share of the batch of 12.
        cached: Inner products in the place of the teacher's tokens, or their mean, where they are enough.
        device: Of everything.
        dtype: Of what the student says.
        head: The method's head; a new one, always the same, if None.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        if torch.device(device).type == "cpu":
            return torch.randn(*shape, generator=generator)
        return torch.empty(*shape, device=device)

    seen, layer, final = noise(BATCH, TOKENS, WIDTH), noise(BATCH, TOKENS, 2 * WIDTH), noise(BATCH, TOKENS, 2 * WIDTH)
    classifier, scores, masks = noise(WIDTH, CLASSES), noise(BATCH, CLASSES), noise(BATCH, TOKENS)
    attention = noise(BATCH, 2, TOKENS + 1, TOKENS + 1)
    labels = scores.argmax(-1)[rows]
    tokens = (seen if parameter is None else seen @ parameter)[rows].to(dtype)
    mask = masks[rows] > -1.3
    outputs = StudentOutput(
        logits=tokens.mean(1) @ classifier.to(dtype),
        features=(tokens,),
        final_tokens=tokens,
        attentions=(attention_of(tokens, attention[rows]),) if kind.needs.attention else None,
    )
    known = unpack_gram(pack_gram(layer[rows]), TOKENS) if cached and kind.needs.layers == "gram" else layer[rows]
    last = final[rows]
    if cached and kind.needs.final == "mean":
        shares = mask.float() / mask.sum(dim=1, keepdim=True)
        last = TokenMean(torch.einsum("bn,bnd->bd", shares, last))
    teacher = TeacherOutputs(
        logits=scores[rows],
        layers={kind.needs.preparation: [TeacherTokens(known, mask)]},
        final=TeacherTokens(last, mask),
        attentions=[(layer @ layer.mT)[rows].softmax(-1)] if kind.needs.teacher_attention else None,
    )
    if (head := head or head_of(kind, device, dtype)) is not None:
        outputs.method_heads = {kind.name: head(outputs, teacher)}
    return outputs, Step(tokens, labels, unmixed=torch.ones(len(tokens), device=device), teacher=teacher)


def attention_of(tokens, noise):
    """``(B, 2, T, T)`` maps of two heads over some tokens ``(B, N, D)`` and one before them."""
    return (noise + torch.nn.functional.pad(tokens.float() @ tokens.float().mT, (1, 0, 1, 0))[:, None]).softmax(-1)


def head_of(kind, device="cpu", dtype=torch.float32):
    """The student-side head of a method, always of the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if torch.device(device).type == "cpu":
            head = kind.head(WIDTHS)
        else:
            with torch.device(device):
                return kind.head(WIDTHS)
    return None if head is None else head.to(dtype)


def scalar(loss):
    """The loss without what is logged beside it."""
    return loss[0] if isinstance(loss, tuple) else loss


def keys_of(kind):
    """Keys that switch a method on."""
    return {"method": "logits"} if kind.shares_task else {f"{kind.name}_weight": 1.0}
