"""The module that is trained: student and student-side heads as one."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.integrations import PeftAdapterMixin
from transformers.utils import ModelOutput, logging

from hf_ihb.checkpoint import student_state
from hf_ihb.errors import ModelLoadError
from hf_ihb.models.attention import AttentionGeometry, attention_geometry, attention_seen
from hf_ihb.models.features import FeatureMap, apply_final_norm, extract_features
from hf_ihb.models.images import take_images
from hf_ihb.step import StudentOutput, TeacherOutputs

logger = logging.get_logger(__name__)


def block_classes(model: nn.Module) -> list[str]:
    """Class names of the blocks a model repeats, which sharding makes its units.

    Read off the model: the names that a class of transformers has for them are those of its own parts, and a model that
    was made of others, or comes from timm, does not have them.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) > 1]
    kinds = [{type(block) for block in blocks} for blocks in lists]
    alike = {kind.pop() for kind in kinds if len(kind) == 1}
    return sorted(kind.__name__ for kind in alike if not kind.__module__.startswith("torch.nn"))


def _refuse_adapters(self: nn.Module, *args: Any, **kwargs: Any) -> None:
    """There are no adapters.

    Raises:
        ModelLoadError: Always.
    """
    raise ModelLoadError(
        "adapters of PEFT: expected a student whose own weights are trained, found an "
        "adapter; merge it into the student's weights before it is given to a trainer"
    )


@torch.enable_grad()
def freeze_unused(module: "StudentModule", pixel_values: Tensor) -> list[str]:
    """Freezes what no output depends on (mask tokens, poolers): it is never trained, and DDP would wait for it.

    One image goes through forward and backward, in eval mode; nothing is added to ``.grad``.

    Args:
        module: That is trained.
        pixel_values: ``(1, C, H, W)``, of any content.

    Returns:
        Names of the parameters that were frozen.
    """
    modes = {part: part.training for part in module.modules()}
    used = {name: p for name, p in module.named_parameters() if p.requires_grad and not name.startswith("heads.")}
    if not used:
        return []
    try:
        output = module.eval()(pixel_values=pixel_values.to(next(iter(used.values())).device))
        total = sum(part.float().sum() for part in tree_leaves(dict(output)) if isinstance(part, Tensor))
        gradients = torch.autograd.grad(total, list(used.values()), allow_unused=True)
    except (RuntimeError, ValueError) as error:
        logger.warning_once(
            f"{type(module.student).__name__}: could not be tried on {tuple(pixel_values.shape)} pixels, so that "
            f"parameters it does not use are not looked for: {' '.join(str(error).split())[:200]}"
        )
        return []
    finally:
        for part, mode in modes.items():
            part.training = mode
    unused = [name for name, gradient in zip(used, gradients, strict=True) if gradient is None]
    for name in unused:
        used[name].requires_grad_(False)
    if unused:
        logger.warning_once(
            f"{type(module.student).__name__}: not trained, since no output depends on it: "
            + ", ".join(name.removeprefix("student.") for name in unused)
        )
    return unused


class StudentModule(PreTrainedModel):
    """Student and student-side heads as one module, so that wrapping, clipping and compiling see one model.

    Args:
        student: Any image classifier of transformers; it is saved, alone, in its own format.
        layers: 0-based blocks whose patch tokens the forward returns.
        heads: The student-side head of each method that has one, by its name.
        final_layer: 0-based index of the last block where its normed tokens are wanted.
        distillation_head: Classifier of the distillation token after `final_layer`, for a DeiT that has none on it.
        attention: Whether the forward returns attention maps.

    Raises:
        ModelLoadError: If the student has an adapter of PEFT, of whose weights only a part is the student's own.
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
        if getattr(student, "_hf_peft_config_loaded", False):
            _refuse_adapters(student)
        super().__init__(student.config)
        self.student = take_images(student)
        self.layers, self.final_layer, self.attention = tuple(layers), final_layer, attention
        self.heads = nn.ModuleDict(dict(heads or {}))
        self.distillation_head = distillation_head
        self._no_split_modules = block_classes(student)
        self._counts: dict[bool, int] = {}
        self._geometries: dict[tuple[int, int], AttentionGeometry] = {}

    def get_input_embeddings(self) -> None:
        """None: FSDP asks for a table of words, and transformers raises where a CNN has none."""

    # ---- What is saved is the student, whoever asks ----

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Saves the plain student, as its own `save_pretrained` does; a `state_dict` may be this module's."""
        if state_dict is not None and not state_dict.keys() <= self.student.state_dict().keys():
            state_dict = student_state(state_dict)
        return self.student.save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Pushes the plain student, as its own `push_to_hub` does; a trainer's pushes card and evidence too."""
        return self.student.push_to_hub(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> None:
        """There is nothing to read: what is saved is a plain student.

        Raises:
            ModelLoadError: Always.
        """
        raise ModelLoadError(
            f"{cls.__name__}: expected a student to be loaded, which is all that is saved; take "
            "AutoModelForImageClassification.from_pretrained"
        )

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters; counted once, though `Trainer` asks in every step.

        Args:
            only_trainable: Without those that are frozen.
            exclude_embeddings: Without tables of words, of which there are none.
        """
        if only_trainable not in self._counts:
            self._counts[only_trainable] = super().num_parameters(only_trainable, exclude_embeddings)
        return self._counts[only_trainable]

    @property
    def class_heads(self) -> dict[str, nn.Module]:
        """The classifiers on the cls and on the distillation token, where there are two."""
        if self.distillation_head is not None:
            return {"cls": self.student.classifier, "distillation": self.distillation_head}
        if hasattr(self.student, "distillation_classifier"):
            return {"cls": self.student.cls_classifier, "distillation": self.student.distillation_classifier}
        return {}

    @property
    def inference_heads(self) -> tuple[str, ...]:
        """Which of `class_heads` inference uses."""
        if self.distillation_head is not None:
            return ("cls",)
        chosen = getattr(self.config, "inference_head", "average")
        return tuple(name for name in self.class_heads if chosen in (name, "average"))

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
        attentions: list[Tensor] = []
        with self._attention_to(attentions, pixel_values) if self.attention else nullcontext():
            outputs, maps = extract_features(self.student, pixel_values, layers)
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
            attentions=tuple(attentions) or None,
        )

    def _attention_to(self, attentions: list[Tensor], pixel_values: Tensor) -> AbstractContextManager:
        """Inside, the student's attention maps go into a list."""
        size = pixel_values.shape[-2:]
        if size not in self._geometries:  # read off parameters, which a wrapper may shard later
            self._geometries[size] = attention_geometry(self.student, pixel_values)
        return attention_seen(self.student, self._geometries[size], lambda _, attention: attentions.append(attention))

    def _final_tokens(self, feature_map: FeatureMap) -> Tensor:
        return (apply_final_norm(self.student, feature_map) or feature_map).tokens

    def _class_scores(
        self, outputs: ModelOutput, final: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, ...]]:
        """Logits of the cls head, of the distillation head, and of those that inference uses."""
        if self.distillation_head is not None:
            return outputs.logits, self.distillation_head(final[:, 1]), (outputs.logits,)
        cls_logits = getattr(outputs, "cls_logits", None)
        if cls_logits is None:
            return None, None, (outputs.logits,)
        both = {"cls": cls_logits, "distillation": outputs.distillation_logits}
        return *both.values(), tuple(both[name] for name in self.inference_heads)


for _name, _method in vars(PeftAdapterMixin).items():
    if callable(_method) and not _name.startswith("_"):
        setattr(StudentModule, _name, _refuse_adapters)
