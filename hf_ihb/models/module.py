"""The module that is trained: student and student-side heads as one."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hf_ihb.models.features import extract_features


@dataclass
class StudentOutput(ModelOutput):
    """What losses need of a student.

    Attributes:
        logits: ``(B, K)`` what the saved model returns; the mean of both heads where there are two.
        cls_logits: ``(B, K)`` of the cls head, None with one head.
        distillation_logits: ``(B, K)`` of the distillation head, None with one head.
        features: Patch tokens ``(B, N, D)`` of the chosen layers.
        projected: The same, mapped to the teacher's width by the student-side heads.
    """

    logits: Tensor | None = None
    cls_logits: Tensor | None = None
    distillation_logits: Tensor | None = None
    features: tuple[Tensor, ...] | None = None
    projected: tuple[Tensor, ...] | None = None

    @property
    def heads(self) -> list[Tensor]:
        """Logits of each head that inference uses."""
        return [self.logits] if self.cls_logits is None else [self.cls_logits, self.distillation_logits]


class StudentModule(PreTrainedModel):
    """Student and student-side heads as one module, so that wrapping, clipping and compiling see one model.

    Args:
        student: Any image classifier of transformers; it is saved, alone, in its own format.
        layers: 0-based blocks whose patch tokens the forward returns.
        projections: For each layer a linear map to the teacher's width, or none.
    """

    base_model_prefix = "student"
    main_input_name = "pixel_values"
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(
        self, student: PreTrainedModel, layers: Sequence[int] = (), projections: Sequence[nn.Module] = ()
    ) -> None:
        super().__init__(student.config)
        self.student = student
        self.layers = tuple(layers)
        self.projections = nn.ModuleList(projections)
        self._no_split_modules = getattr(student, "_no_split_modules", None)

    def forward(self, pixel_values: Tensor) -> StudentOutput:
        """``(B, C, H, W)`` normalised images -> everything the losses need."""
        outputs, maps = extract_features(self.student, pixel_values, self.layers)
        features = tuple(m.patch_tokens for m in maps)
        projected = tuple(project(x) for project, x in zip(self.projections, features, strict=False))
        return StudentOutput(
            logits=outputs.logits,
            cls_logits=getattr(outputs, "cls_logits", None),
            distillation_logits=getattr(outputs, "distillation_logits", None),
            features=features or None,
            projected=projected or None,
        )
