"""What a distillation method is, and the keys that several of them share."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from hf_ihb.config.fields import NON_NEGATIVE, POSITIVE, Checked, Range, is_key, key
from hf_ihb.functional.gram import TokenGram
from hf_ihb.functional.tokens import TokenMean, mean_token
from hf_ihb.methods.schedules import fade_factor, warmup_factor
from hf_ihb.step import Needs, Step, StudentOutput

_BLOCKS = "0-based block index; -1 or 'last' is the last block"


@dataclass
class SharedKeys(Checked):
    """Keys that stand for several methods at once."""

    method: Literal["logits", "structural"] | None = key(
        None, "Selects defaults alone: with 'logits' alpha is 0.5, otherwise 0."
    )
    distillation_warmup_type: Literal["linear", "step"] = key(
        "linear", "How distillation losses reach their weight over their warm-up epochs."
    )
    distillation_fade_epochs: float = key(
        0.0,
        "Epochs over which the weight of every method falls steadily to 0, up to distillation_stop_epoch or the end of "
        "training; alpha falls, too, and the labels get what it leaves.",
        within=NON_NEGATIVE,
        unit="epochs",
    )
    distillation_stop_epoch: float | None = key(
        None,
        "When every method has lost its weight and labels teach alone; never if not given.",
        within=POSITIVE,
        unit="epochs",
    )
    uncertainty_weighting: float | None = key(
        None,
        "Temperature of soft optimal uncertainty weighting: every loss, the labels' too, gets a share beside its "
        "weight, the softmax over 1 / (temperature * loss). Shares have no gradient and no parameters, and are those "
        "of the micro-batch of all processes. None if not given.",
        within=POSITIVE,
        unit="1 / nats",
    )
    distilled_heads: Literal["distillation", "both"] = key(
        "distillation",
        "Learning from class scores: 'distillation': labels teach the cls head and the teacher the distillation head; "
        "'both': both teach both.",
    )
    logit_standardization: bool = key(
        False,
        "Learning from class scores: those of student and teacher with mean 0 and deviation 1 over the classes of each "
        "image, before any temperature (published with 2), so that the student need not take on the teacher's scale.",
    )
    student_layers: list[int] = key(
        [5, 8, 11], "Student blocks whose outputs are compared.", unit=_BLOCKS, words={"last": -1}
    )
    teacher_layers: list[int] | None = key(
        None,
        "Teacher blocks (CNN: stages), one for each student block; student_layers if not given.",
        unit=_BLOCKS,
        words={"last": -1},
    )
    center_positions: bool = key(
        True,
        "Remove position codes before CKA and Gram: the mean over the training images from the teacher's tokens, the "
        "mean over the batch of all processes from the student's.",
    )
    teacher_projector: Literal["none", "trainable"] = key(
        "none",
        "'trainable': MLP heads on both sides, a pair for each layer of each of the token, CKA and Gram losses.",
        published={"trainable": "the teacher's heads are trained too, so the loss can be met without any content"},
    )
    teacher_norm: bool = key(False, "Apply the teacher's final norm to the output of every block, as DINOv2 does.")
    teacher_statistics_samples: int = key(
        1024, "Training images from which the teacher's feature statistics are taken.", within=Range(2), unit="images"
    )

    teacher_standardization: Literal["none", "phi_s"] = key(
        "none",
        "Where standardised tokens are compared channel by channel: 'none': each channel has its own scale; 'phi_s': "
        "PHI-S, a rotation after which all vary alike, and one scale. CKA and Gram are the same under both but for the "
        "scale, and are left alone.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_layers is not None and len(self.teacher_layers) != len(self.student_layers):
            raise ValueError(
                f"keys 'student_layers' and 'teacher_layers' contradict: expected as many blocks of each, found "
                f"{self.student_layers} and {self.teacher_layers}"
            )
        if not self.student_layers:
            raise ValueError("key 'student_layers': expected at least one block, found []")

    @classmethod
    def of(cls, args: Any) -> Self:
        """Takes its keys from the arguments of a run."""
        return cls(**{f.name: getattr(args, f.name) for f in fields(cls) if is_key(f)})

    @property
    def references(self) -> tuple[tuple[str, str], ...]:
        """What they stand on, for a card: what and by whom, and the arXiv id."""
        weighting = ("Uncertainty weighting: Kirchdorfer et al., 2024", "2408.07985")
        standardization = ("Logit standardisation: Sun et al., 2024", "2403.01427")
        uses = {weighting: self.uncertainty_weighting is not None, standardization: self.logit_standardization}
        return tuple(reference for reference, is_used in uses.items() if is_used)


class Widths(NamedTuple):
    """Feature widths of the layers that are compared.

    Attributes:
        student: Of each student layer.
        teacher: Of each teacher layer.
        final: Of the student's last block and of the deepest teacher layer; None where no method needs them.
        classes: Number of classes.
    """

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    final: tuple[int, int] | None = None
    classes: int = 0


@dataclass
class Method(Checked):
    """One way to learn from a teacher: its keys, what it needs, and its loss.

    A subclass is a dataclass whose fields are the keys of the method, made by `key`; ``<name>_weight`` is its weight,
    and it is on where that is above 0. ``<name>_warmup_epochs``, where there is such a key, is its warm-up.

    Attributes:
        name: Of its keys, and of what it logs, ``<name>_loss``.
        label: In tables and on cards.
        said: Keys that `describe` has said, and a card need not list.
        shares_task: Whether its weight is taken from the task loss: ``(1 - weight) * CE + weight * loss``.
        shared: Keys that stand for several methods.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    said: ClassVar[tuple[str, ...]] = ()
    shares_task: ClassVar[bool] = False
    shared: SharedKeys = field(default_factory=SharedKeys, repr=False)

    @classmethod
    def of(cls, args: Any) -> Self:
        """Takes its keys from the arguments of a run."""
        return cls(**{f.name: getattr(args, f.name) for f in fields(cls) if is_key(f)}, shared=SharedKeys.of(args))

    @property
    def references(self) -> tuple[tuple[str, str], ...]:
        """What it stands on, for a card: what and by whom, and the arXiv id."""
        return ()

    @property
    def is_on(self) -> bool:
        """Whether a run learns by it."""
        return getattr(self, f"{self.name}_weight") > 0

    @property
    def weight_key(self) -> str:
        """The key that holds its weight."""
        return f"{self.name}_weight"

    @property
    def needs(self) -> Needs:
        """What it asks of teacher and student."""
        raise NotImplementedError

    def weight(self, epoch: float, num_epochs: float) -> float:
        """Weight of its loss at a (fractional) epoch of a training."""
        shared = self.shared
        fade = fade_factor(epoch, num_epochs, shared.distillation_fade_epochs, shared.distillation_stop_epoch)
        return self.risen_weight(epoch, num_epochs) * fade

    def risen_weight(self, epoch: float, num_epochs: float) -> float:
        """Weight of its loss after its warm-up, and before any fall."""
        warmup = getattr(self, f"{self.name}_warmup_epochs", 0.0)
        factor = warmup_factor(epoch, warmup, self.shared.distillation_warmup_type)
        return getattr(self, f"{self.name}_weight") * factor

    def loss(self, student: StudentOutput, step: Step) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The unweighted loss of a micro-batch, a scalar, and scalars to log beside it where there are any."""
        raise NotImplementedError

    def head(self, widths: Widths) -> nn.Module | None:
        """Its student-side head, trained with the student and never a part of what is saved; None without one.

        The head is called as ``head(student: StudentOutput, teacher: TeacherOutputs)`` within the forward of the
        student, and what it returns is ``StudentOutput.method_heads[name]``.
        """
        return None

    def masked_pixels(self, step: Step) -> Tensor:
        """``(B, C, H, W)`` images of its own second forward, where `needs` asks for one."""
        raise NotImplementedError

    def describe(self) -> str:
        """Its term of the loss in words, for a card: fields in braces are filled with keys of the run."""
        raise NotImplementedError

    def phrase(self) -> str | None:
        """How it learns, for the first sentence of a card, as `describe`; None for a loss between layers."""
        return None

    def summary(self) -> str:
        """What a run learned by, in a few words, for a table."""
        return self.name


class TokenPair(NamedTuple):
    """Patch tokens of one layer of student and teacher as a loss compares them, at the same places.

    Attributes:
        student: ``(B, N, D_s)``.
        teacher: ``(B, N, D_t)``; the token loss needs D_t = D_s. For CKA within images and Gram also their `TokenGram`,
            for what compares mean tokens also their `TokenMean`.
        mask: ``(B, N)`` share of each token in [0, 1]: how much of what the student's shows lies inside the image.
    """

    student: Tensor
    teacher: Tensor | TokenGram | TokenMean
    mask: Tensor

    def image_means(self) -> tuple[Tensor, Tensor]:
        """``(B, D_s)`` and ``(B, D_t)`` float32 means of the tokens, by their shares; 0 where there are none."""
        known = self.teacher.mean if isinstance(self.teacher, TokenMean) else mean_token(self.teacher, self.mask)
        return mean_token(self.student, self.mask), known


def pairs_of(method: Method, student: StudentOutput, step: Step) -> list[TokenPair]:
    """Tokens of student and teacher as a method compares them, one pair a layer.

    Where the method has a head, it is what the head made of the student's tokens, or of both sides'.
    """
    layers = step.teacher.layers[method.needs.preparation]
    own = (student.method_heads or {}).get(method.name, student.features)
    both = [x if isinstance(x, tuple) else (x, y.tokens) for x, y in zip(own, layers, strict=True)]
    return [TokenPair(x, y, layer.mask) for (x, y), layer in zip(both, layers, strict=True)]


def as_one(layers: Sequence[TokenPair], weight: Tensor, *, always: bool = False) -> tuple[Sequence[TokenPair], Tensor]:
    """Layers of one shape as one batch of all their images, with its weights; others as they are.

    What is a mean over images, and then over layers, is the same: in one operation where it was one for each layer. On
    a CPU it is bytes that cost, not the number of operations, and they stay apart.

    Args:
        layers: To put together.
        weight: ``(B,)`` share of each image.
        always: On a CPU as well.
    """
    shapes = {tuple((type(x), leaf.shape, leaf.dtype) for x in pair for leaf in _tensors(x)) for pair in layers}
    apart = weight.device.type == "cpu" and not always
    if apart or len(layers) == 1 or len(shapes) > 1:
        return layers, weight
    return [TokenPair(*map(_concatenated, zip(*layers, strict=True)))], weight.repeat(len(layers))


def batch_mean(per_image: Tensor, weight: Tensor) -> Tensor:
    """Weighted sum over ``(B,)`` images over B, not over the weights' sum: 8 x 4 images stay equal to 32 x 1."""
    return (per_image * weight).sum() / len(per_image)


def _tensors(value: Tensor | TokenGram | TokenMean) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def _concatenated(values: Sequence[Tensor | TokenGram | TokenMean]) -> Tensor | TokenGram | TokenMean:
    if isinstance(values[0], Tensor):
        return torch.cat(tuple(values))
    return type(values[0])(*(torch.cat(parts) for parts in zip(*values, strict=True)))
