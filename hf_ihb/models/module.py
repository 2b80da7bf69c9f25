"""The module that is trained: student and student-side heads as one."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hf_ihb.models.features import FeatureMap, extract_features, final_norm
from hf_ihb.step import StudentOutput, TeacherOutputs


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
        heads: The student-side head of each method that has one, by its name.
        final_layer: 0-based index of the last block where its normed tokens are wanted.
        distillation_head: Classifier of the distillation token after `final_layer`, for a DeiT that has none on it.
        attention: Whether the forward returns attention maps.
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
        heads: Mapping[str, nn.Module] | None = None,
        final_layer: int | None = None,
        distillation_head: nn.Module | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__(student.config)
        self.student = student
        self.layers, self.final_layer, self.attention = tuple(layers), final_layer, attention
        self.heads = nn.ModuleDict(dict(heads or {}))
        self.distillation_head = distillation_head
        self._no_split_modules = block_classes(student)
        self._counts: dict[bool, int] = {}

    def get_input_embeddings(self) -> None:
        """None: FSDP asks for a table of words, and transformers raises where a CNN has none."""

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters; counted once, though `Trainer` asks in every step.

        Args:
            only_trainable: Without those that are frozen.
            exclude_embeddings: Without tables of words, of which there are none.
        """
        if only_trainable not in self._counts:
            self._counts[only_trainable] = super().num_parameters(only_trainable, exclude_embeddings)
        return self._counts[only_trainable]

    def forward(
        self,
        pixel_values: Tensor,
        teacher: TeacherOutputs | None = None,
        masked_pixel_values: Mapping[str, Tensor] | None = None,
    ) -> StudentOutput:
        """Everything the losses need.

        Args:
            pixel_values: ``(B, C, H, W)``, normalised.
            teacher: What the teacher says, for the heads of methods; they are left out without it.
            masked_pixel_values: ``(B, C, H, W)`` of another forward for each method that asks for one, by its name.
        """
        output = self._forward_student(pixel_values)
        if masked_pixel_values is not None:
            output.masked = {name: self._forward_student(pixels) for name, pixels in masked_pixel_values.items()}
        if teacher is not None and len(self.heads):
            output.method_heads = {name: head(output, teacher) for name, head in self.heads.items()}
        return output

    def _forward_student(self, pixel_values: Tensor) -> StudentOutput:
        # weights may be half precision without an autocast around them, as DeepSpeed keeps them; most CNNs then take
        # no other pixels
        pixel_values = pixel_values.to(self.student.dtype)
        layers = self.layers if self.final_layer is None else (*self.layers, self.final_layer)
        asked = {"output_attentions": True} if self.attention else {}
        outputs, maps = extract_features(self.student, pixel_values, layers, **asked)
        features = tuple(m.patch_tokens for m in maps[: len(self.layers)])
        final = None if self.final_layer is None else self._final_tokens(maps[-1])
        cls_logits, distillation_logits, heads = self._class_scores(outputs, final)
        return StudentOutput(
            logits=outputs.logits,
            cls_logits=cls_logits,
            distillation_logits=distillation_logits,
            heads=heads,
            features=features or None,
            final_tokens=None if final is None else final[:, maps[-1].num_prefix_tokens :],
            attentions=outputs.attentions if self.attention else None,
        )

    def _final_tokens(self, feature_map: FeatureMap) -> Tensor:
        norm = final_norm(self.student)
        return feature_map.tokens if norm is None else norm(feature_map.tokens)

    def _class_scores(
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
