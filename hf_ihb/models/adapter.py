"""Any `torch.nn.Module` as a teacher: its forward, its pixels and the names of its blocks."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from hf_ihb.errors import TeacherMismatchError
from hf_ihb.models.processing import PixelFormat
from hf_ihb.models.teacher import Teacher


class ImageModule(PreTrainedModel):
    """A module that takes normalised ``(B, C, H, W)`` pixels, seen as a model of transformers.

    Args:
        module: Returns class scores ``(B, K)``, or anything where only its blocks are learned from.
        blocks: Paths of the modules whose outputs are its blocks', in order; those that timm knows if None.
        label_names: Its classes in the order of its scores.
        name: What errors call it; its class if None.

    Raises:
        TeacherMismatchError: If there is no such module, or no blocks are known.
    """

    main_input_name = "pixel_values"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(
        self,
        module: nn.Module,
        blocks: Sequence[str] | None = None,
        label_names: Sequence[str] = (),
        name: str | None = None,
    ) -> None:
        kind = type(module).__name__
        config = PreTrainedConfig(id2label=dict(enumerate(label_names)), name_or_path=name or kind)
        config.module_class, config.blocks = kind, None if blocks is None else list(blocks)
        super().__init__(config)
        known = dict(module.named_modules())
        if blocks is None and not hasattr(module, "forward_intermediates"):
            raise TeacherMismatchError(f"teacher '{name or kind}': expected names of its blocks, found none")
        if unknown := [path for path in blocks or () if path not in known]:
            nearest = ", ".join(path for path in known if path and path.count(".") <= unknown[0].count("."))
            raise TeacherMismatchError(
                f"teacher '{name or kind}': expected names of its modules ({nearest[:200]}), found '{unknown[0]}'"
            )
        self.block_names = None if blocks is None else tuple(blocks)
        # the name under which transformers' wrapper has it, so that both are read alike
        self.add_module("module" if blocks is not None else "timm_model", module)

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> ImageClassifierOutputWithNoAttention:
        """Class scores, and the outputs of the blocks where they are asked for."""
        if self.block_names is None:
            if not output_hidden_states:
                return ImageClassifierOutputWithNoAttention(logits=self.timm_model(pixel_values))
            last, states = self.timm_model.forward_intermediates(pixel_values)
            return ImageClassifierOutputWithNoAttention(
                logits=self.timm_model.forward_head(last), hidden_states=tuple(states)
            )
        seen: dict[str, Tensor] = {}

        def see(path: str) -> Any:
            def hook(module: nn.Module, args: tuple, output: Any) -> None:
                seen[path] = output[0] if isinstance(output, tuple | list) else output

            return hook

        paths = self.block_names if output_hidden_states else ()
        handles = [self.module.get_submodule(path).register_forward_hook(see(path)) for path in paths]
        try:
            output = self.module(pixel_values)
        finally:
            for handle in handles:
                handle.remove()
        if missing := [path for path in paths if path not in seen]:
            raise ValueError(f"expected its module '{missing[0]}' to run, found that it does not")
        output = getattr(output, "logits", output)
        return ImageClassifierOutputWithNoAttention(logits=output, hidden_states=tuple(seen[p] for p in paths) or None)


def teacher_from_module(
    module: nn.Module,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    size: tuple[int, int] | None = None,
    blocks: Sequence[str] | None = None,
    label_names: Sequence[str] | None = None,
    name: str | None = None,
) -> Teacher:
    """A plain module, a torchvision model or an object of timm as a teacher; it is frozen in place.

    Args:
        module: Takes normalised ``(B, C, H, W)`` pixels and returns class scores ``(B, K)``.
        mean: Of each channel, for pixels in [0, 1].
        std: Likewise.
        size: Height and width of the images it sees, px; as they are stored if None.
        blocks: Paths of the modules whose outputs are its blocks', in order; those that timm knows if None.
        label_names: Classes in the order of its scores; needed where these are learned from.
        name: What errors call it.

    Raises:
        TeacherMismatchError: If no blocks are known, or the module does not take such images.
    """
    model = ImageModule(module, blocks, label_names or (), name)
    return Teacher(model, PixelFormat(tuple(mean), tuple(std), size))
