"""DeiT with the options transformers' own has no place for: a convolutional stem, LayerScale, the head it answers with.

This file imports torch and transformers alone: a saved model carries a copy of it, and loads with
``trust_remote_code=True`` where this package is not installed.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeiTConfig, DeiTModel, DeiTPreTrainedModel
from transformers import initialization as init
from transformers.models.deit.modeling_deit import (
    DeiTForImageClassificationWithTeacherOutput,
    DeiTLayer,
    DeiTPatchEmbeddings,
)
from transformers.utils.generic import can_return_tuple

INFERENCE_HEADS = ("average", "cls", "distillation")


class FlexibleDeiTConfig(DeiTConfig):
    """`DeiTConfig` with three more keys; at their defaults the model is `DeiTForImageClassificationWithTeacher`.

    Args:
        conv_stem: Two 3 x 3 convolutions at full resolution before the patches, to half the width and to the width.
        layer_scale_init_value: Value that LayerScale starts from on both residual branches; None for none.
        inference_head: What `logits` are: those of the ``"cls"`` or ``"distillation"`` head, or their ``"average"``.

    Raises:
        ValueError: If there is no such head.
    """

    model_type = "hf_ihb_deit"

    conv_stem: bool = False
    layer_scale_init_value: float | None = None
    inference_head: str = "average"

    def __post_init__(self, **kwargs):
        if self.inference_head not in INFERENCE_HEADS:
            raise ValueError(f"inference_head: expected {', '.join(INFERENCE_HEADS)}, found {self.inference_head!r}")
        super().__post_init__(**kwargs)


class FlexibleDeiTStemConv(nn.Conv2d):
    """A 3 x 3 convolution of the stem; a class of its own so that it starts unlike the patch projection."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)


class FlexibleDeiTConvStem(nn.Sequential):
    """``(B, C, H, W)`` -> ``(B, width, H, W)`` (after Xiao et al., 2021, https://arxiv.org/abs/2106.14881)."""

    def __init__(self, num_channels: int, width: int) -> None:
        half = width // 2
        first = (FlexibleDeiTStemConv(num_channels, half), nn.BatchNorm2d(half), nn.GELU())
        super().__init__(*first, FlexibleDeiTStemConv(half, width), nn.BatchNorm2d(width), nn.GELU())


class FlexibleDeiTPatchEmbeddings(DeiTPatchEmbeddings):
    """Patches of the image, or of what the stem makes of it."""

    def __init__(self, config: FlexibleDeiTConfig) -> None:
        super().__init__(config)
        self.stem = nn.Identity()
        if config.conv_stem:
            width = config.hidden_size
            self.stem = FlexibleDeiTConvStem(config.num_channels, width)
            self.projection = nn.Conv2d(width, width, kernel_size=self.patch_size, stride=self.patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> ``(B, N, D)``; a grey image may come as three equal channels."""
        channels = pixel_values.shape[1]
        if channels != self.num_channels:
            if {channels, self.num_channels} != {1, 3}:
                raise ValueError(f"expected images of {self.num_channels} channels, found {channels}")
            pixel_values = pixel_values.mean(1, keepdim=True).expand(-1, self.num_channels, -1, -1)
        return self.projection(self.stem(pixel_values)).flatten(2).transpose(1, 2)


class FlexibleDeiTLayerScale(nn.Module):
    """A learned scale of each channel (Touvron et al., 2021, https://arxiv.org/abs/2103.17239)."""

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.value = value
        self.lambda1 = nn.Parameter(torch.full((width,), value))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``(..., D)`` -> the same shape."""
        return hidden_states * self.lambda1


class FlexibleDeiTLayer(DeiTLayer):
    """`DeiTLayer` with LayerScale on both branches, before its dropout (where stochastic depth is put)."""

    def __init__(self, config: FlexibleDeiTConfig) -> None:
        super().__init__(config)
        value = config.layer_scale_init_value
        self.layer_scale1, self.layer_scale2 = (
            nn.Identity() if value is None else FlexibleDeiTLayerScale(config.hidden_size, value) for _ in range(2)
        )

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """``(B, T, D)`` -> ``(B, T, D)``."""
        branch, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        hidden_states = self.dropout(self.layer_scale1(branch)) + hidden_states
        branch = self.mlp(self.layernorm_after(hidden_states))
        return self.dropout(self.layer_scale2(branch)) + hidden_states


class FlexibleDeiTPreTrainedModel(DeiTPreTrainedModel):
    """What the model with and without heads share."""

    config_class = FlexibleDeiTConfig
    _no_split_modules = ["DeiTEmbeddings", "FlexibleDeiTLayer"]  # noqa: RUF012  transformers' own form

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As DeiT; the stem's convolutions normal by fan-out (He et al., 2015), LayerScale at its value."""
        if isinstance(module, FlexibleDeiTStemConv):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, FlexibleDeiTLayerScale):
            init.constant_(module.lambda1, module.value)
        else:
            super()._init_weights(module)


class FlexibleDeiTModel(FlexibleDeiTPreTrainedModel, DeiTModel):
    """`DeiTModel` with the stem and LayerScale of the config, without a pooler."""

    def __init__(self, config: FlexibleDeiTConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        self.embeddings.patch_embeddings = FlexibleDeiTPatchEmbeddings(config)
        self.layers = nn.ModuleList(FlexibleDeiTLayer(config) for _ in range(config.num_hidden_layers))
        self.post_init()


class FlexibleDeiTForImageClassification(FlexibleDeiTPreTrainedModel):
    """DeiT with a head on the cls token and one on the distillation token, answering as `inference_head` says."""

    def __init__(self, config: FlexibleDeiTConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.deit = FlexibleDeiTModel(config)
        self.cls_classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.distillation_classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> DeiTForImageClassificationWithTeacherOutput:
        """``(B, C, H, W)`` normalised images -> logits ``(B, K)`` of inference and of each head.

        Args:
            pixel_values: Images of `num_channels` channels; a grey image may come as three equal ones.
            **kwargs: Of `DeiTModel`: ``output_hidden_states``, ``interpolate_pos_encoding`` and so on.
        """
        outputs = self.deit(pixel_values, **kwargs)
        cls_logits = self.cls_classifier(outputs.last_hidden_state[:, 0])
        distillation_logits = self.distillation_classifier(outputs.last_hidden_state[:, 1])
        logits = {"cls": cls_logits, "distillation": distillation_logits}.get(self.config.inference_head)
        return DeiTForImageClassificationWithTeacherOutput(
            logits=(cls_logits + distillation_logits) / 2 if logits is None else logits,
            cls_logits=cls_logits,
            distillation_logits=distillation_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# what is saved names these classes and carries this file
FlexibleDeiTConfig.register_for_auto_class()
FlexibleDeiTModel.register_for_auto_class("AutoModel")
FlexibleDeiTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
