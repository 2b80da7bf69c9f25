"""The module that is trained: student and student-side heads as one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hf_ihb.models.features import extract_features, final_norm
from hf_ihb.models.heads import PairedHeads


@dataclass
class StudentOutput(ModelOutput):
    """What losses need of a student.

    Attributes:
        logits: ``(B, K)`` what the saved model returns; the mean of both heads where it averages them.
        cls_logits: ``(B, K)`` of the cls head, None with one head.
        distillation_logits: ``(B, K)`` of the distillation head (the student's or a student-side one), likewise.
        heads: ``(B, K)`` of each head that inference uses.
        features: Patch tokens ``(B, N, D)`` of the chosen layers.
        projected: The same, mapped to the teacher's width by the student-side heads.
        paired: For each loss and layer what `PairedHeads` made of the tokens of student and teacher.
        final_tokens: Patch tokens ``(B, N, D)`` of the last block, after the student's final norm.
    """

    logits: Tensor | None = None
    cls_logits: Tensor | None = None
    distillation_logits: Tensor | None = None
    heads: tuple[Tensor, ...] | None = None
    features: tuple[Tensor, ...] | None = None
    projected: tuple[Tensor, ...] | None = None
    paired: dict[str, tuple[tuple[Tensor, Tensor], ...]] | None = None
    final_tokens: Tensor | None = None


def block_classes(model: nn.Module) -> list[str]:
    """Class names of the blocks a model repeats, which sharding makes its units.

    Read off the model: the names that a class of transformers has for them are those of its own parts, and a model that
    was made of others, or comes from timm, does not have them.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) > 1]
    kinds = [{type(block) for block in blocks} for blocks in lists]
    alike = {kind.pop() for kind in kinds if len(kind) == 1}
    return sorted(kind.__name__ for kind in alike if not kind.__module__.startswith("torch.nn"))


class StudentModule(PreTrainedModel):
    """Student and student-side heads as one module, so that wrapping, clipping and compiling see one model.

    Args:
        student: Any image classifier of transformers; it is saved, alone, in its own format.
        layers: 0-based blocks whose patch tokens the forward returns.
        projections: For each layer a linear map to the teacher's width, or none.
        paired_heads: The published study's heads on both sides, or none.
        final_layer: 0-based index of the last block where its normed tokens are wanted.
        distillation_head: Classifier of the distillation token after `final_layer`, for a DeiT that has none on it.
    """

    base_model_prefix = "student"
    main_input_name = "pixel_values"
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(
        self,
        student: PreTrainedModel,
        layers: Sequence[int] = (),
        projections: Sequence[nn.Module] = (),
        paired_heads: PairedHeads | None = None,
        final_layer: int | None = None,
        distillation_head: nn.Module | None = None,
    ) -> None:
        super().__init__(student.config)
        self.student = student
        self.layers = tuple(layers)
        self.projections = nn.ModuleList(projections)
        self.paired_heads, self.final_layer = paired_heads, final_layer
        self.distillation_head = distillation_head
        self._no_split_modules = block_classes(student)

    def get_input_embeddings(self) -> None:
        """None: FSDP asks for a table of words, and transformers raises where a CNN has none."""

    def forward(
        self, pixel_values: Tensor, teacher_tokens: Mapping[str, Sequence[Tensor]] | None = None
    ) -> StudentOutput:
        """Everything the losses need.

        Args:
            pixel_values: ``(B, C, H, W)``, normalised.
            teacher_tokens: For each loss the teacher's patch tokens ``(B, N, D_t)`` of each layer, for `paired_heads`.
        """
        # weights may be half precision without an autocast around them, as DeepSpeed keeps them; most CNNs then take
        # no other pixels
        pixel_values = pixel_values.to(self.student.dtype)
        layers = self.layers if self.final_layer is None else (*self.layers, self.final_layer)
        outputs, maps = extract_features(self.student, pixel_values, layers)
        features = tuple(m.patch_tokens for m in maps[: len(self.layers)])
        projected = tuple(project(x) for project, x in zip(self.projections, features, strict=False))
        final = None
        if self.final_layer is not None:
            norm = final_norm(self.student)
            final = maps[-1].tokens if norm is None else norm(maps[-1].tokens)
        cls_logits, distillation_logits, heads = self._heads(outputs, final)
        return StudentOutput(
            logits=outputs.logits,
            cls_logits=cls_logits,
            distillation_logits=distillation_logits,
            heads=heads,
            features=features or None,
            projected=projected or None,
            paired=None if teacher_tokens is None else self.paired_heads(features, teacher_tokens),
            final_tokens=None if final is None else final[:, maps[-1].num_prefix_tokens :],
        )

    def _heads(
        self, outputs: ModelOutput, final: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, ...]]:
        """Logits of the cls head, of the distillation head, and of those that inference uses."""
        if self.distillation_head is not None:
            return outputs.logits, self.distillation_head(final[:, 1]), (outputs.logits,)
        cls_logits = getattr(outputs, "cls_logits", None)
        if cls_logits is None:
            return None, None, (outputs.logits,)
        both = (cls_logits, outputs.distillation_logits)
        used = {"cls": both[:1], "distillation": both[1:]}.get(getattr(self.config, "inference_head", "average"), both)
        return *both, used
