"""AdaptiveCNN: a residual network with squeeze-and-excitation for small images.

This file imports torch and transformers alone: a saved model carries a copy of it, and loads with
``trust_remote_code=True`` where this package is not installed.
"""

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.utils.generic import can_return_tuple


class AdaptiveCNNConfig(PreTrainedConfig):
    """Layout of an AdaptiveCNN; the defaults are those for 32 px colour images, 17,629,514 parameters with 10 classes.

    Args:
        num_channels: Channels of the images, 1 or 3.
        hidden_sizes: Width of each stage; the stem has that of the first. Every stage but the first halves the map.
        depths: Residual blocks of each stage.
        stem_pool: Halve the map after the stem.
        reduction: What squeeze-and-excitation divides a width by.
        classifier_dropout: Dropout probability between the two layers of the head.

    Raises:
        ValueError: If there is no stage, or not one depth for each width.
    """

    model_type = "adaptive_cnn"

    num_channels: int = 3
    hidden_sizes: list[int] | tuple[int, ...] = (64, 128, 256, 512)
    depths: list[int] | tuple[int, ...] = (2, 3, 3, 3)
    stem_pool: bool = False
    reduction: int = 16
    classifier_dropout: float | int = 0.3

    def __post_init__(self, **kwargs):
        # an empty layout is a classifier of the mean colour
        if not self.depths or len(self.hidden_sizes) != len(self.depths):
            raise ValueError(
                f"expected one width and one depth for each of one or more stages, found hidden_sizes="
                f"{list(self.hidden_sizes)} and depths={list(self.depths)}"
            )
        super().__post_init__(**kwargs)


class AdaptiveCNNSqueezeExcitation(nn.Module):
    """Scales channels by a gate in (0, 1) of their means (Hu et al., 2018, https://arxiv.org/abs/1709.01507)."""

    def __init__(self, width: int, reduction: int) -> None:
        super().__init__()
        squeezed = max(1, width // reduction)
        self.reduce = nn.Linear(width, squeezed, bias=False)
        self.expand = nn.Linear(squeezed, width, bias=False)

    def forward(self, hidden_state: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> the same shape."""
        gate = self.expand(self.reduce(hidden_state.mean((-2, -1))).relu()).sigmoid()
        return hidden_state * gate[:, :, None, None]


class AdaptiveCNNBlock(nn.Module):
    """Two 3 x 3 convolutions and squeeze-and-excitation beside a shortcut.

    The shortcut is the identity, or a 1 x 1 convolution where the shape changes.
    """

    def __init__(self, in_width: int, width: int, stride: int, reduction: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.squeeze_excitation = AdaptiveCNNSqueezeExcitation(width, reduction)
        self.shortcut = nn.Identity()
        if stride != 1 or in_width != width:
            self.shortcut = nn.Sequential(nn.Conv2d(in_width, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, hidden_state: Tensor) -> Tensor:
        """``(B, C_in, H, W)`` -> ``(B, C, H / stride, W / stride)``."""
        residual = self.norm1(self.conv1(hidden_state)).relu()
        residual = self.squeeze_excitation(self.norm2(self.conv2(residual)))
        return (residual + self.shortcut(hidden_state)).relu()


class AdaptiveCNNStem(nn.Module):
    """A 3 x 3 convolution at full resolution, and the pool after it where the config has one."""

    def __init__(self, config: AdaptiveCNNConfig) -> None:
        super().__init__()
        self.num_channels = config.num_channels
        self.conv = nn.Conv2d(config.num_channels, config.hidden_sizes[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(config.hidden_sizes[0])
        self.pool = nn.MaxPool2d(2) if config.stem_pool else nn.Identity()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """``(B, C, H, W)``: a grey image may come as three equal channels, and is shown to a colour model as such."""
        channels = pixel_values.shape[1]
        if channels != self.num_channels:
            if {channels, self.num_channels} != {1, 3}:
                raise ValueError(f"expected images of {self.num_channels} channels, found {channels}")
            grey = pixel_values.mean(1, keepdim=True)
            pixel_values = grey.expand(-1, self.num_channels, -1, -1)
        return self.pool(self.norm(self.conv(pixel_values)).relu())


class AdaptiveCNNPreTrainedModel(PreTrainedModel):
    """What the model with and without a head share."""

    config_class = AdaptiveCNNConfig
    base_model_prefix = "adaptive_cnn"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["AdaptiveCNNBlock"]  # noqa: RUF012  transformers' own form

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Convolutions: normal by fan-out (He et al., 2015); linear layers: torch's own uniform; norms: 1 and 0.

        The library would draw every weight from N(0, 0.02), a third of what the widest convolution needs here.
        """
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.in_features)
                init.uniform_(module.bias, -bound, bound)
        else:
            super()._init_weights(module)


class AdaptiveCNNModel(AdaptiveCNNPreTrainedModel):
    """Stem and stages, without a head."""

    def __init__(self, config: AdaptiveCNNConfig) -> None:
        super().__init__(config)
        self.stem = AdaptiveCNNStem(config)
        self.stages = nn.ModuleList()
        in_width = config.hidden_sizes[0]
        for index, (width, depth) in enumerate(zip(config.hidden_sizes, config.depths, strict=True)):
            stride = 2 if index > 0 else 1
            blocks = [AdaptiveCNNBlock(in_width, width, stride, config.reduction)]
            blocks += [AdaptiveCNNBlock(width, width, 1, config.reduction) for _ in range(depth - 1)]
            self.stages.append(nn.Sequential(*blocks))
            in_width = width
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """``(B, C, H, W)`` normalised images -> the last map, its mean, and the maps of the stem and each stage.

        Args:
            pixel_values: Images of `num_channels` channels; a grey image may come as three equal ones.
            output_hidden_states: Return the maps.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states = [self.stem(pixel_values)]
        for stage in self.stages:
            states.append(stage(states[-1]))
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=states[-1],
            pooler_output=states[-1].mean((-2, -1)),
            hidden_states=tuple(states) if output_hidden_states else None,
        )


class AdaptiveCNNForImageClassification(AdaptiveCNNPreTrainedModel):
    """AdaptiveCNN with a head of two linear layers on the mean of the last map."""

    accepts_loss_kwargs = False

    def __init__(self, config: AdaptiveCNNConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.adaptive_cnn = AdaptiveCNNModel(config)
        width = config.hidden_sizes[-1]
        self.classifier = nn.Sequential(
            nn.Linear(width, max(1, width // 2)),
            nn.ReLU(),
            nn.Dropout(config.classifier_dropout),
            nn.Linear(max(1, width // 2), config.num_labels),
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, output_hidden_states: bool | None = None
    ) -> ImageClassifierOutputWithNoAttention:
        """``(B, C, H, W)`` normalised images -> logits ``(B, K)``, and the maps of the stem and each stage.

        Args:
            pixel_values: Images of `num_channels` channels; a grey image may come as three equal ones.
            labels: ``(B,)``; the cross-entropy is returned where given.
            output_hidden_states: Return the maps.
        """
        outputs = self.adaptive_cnn(pixel_values, output_hidden_states=output_hidden_states)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


# what is saved names these classes and carries this file
AdaptiveCNNConfig.register_for_auto_class()
AdaptiveCNNModel.register_for_auto_class("AutoModel")
AdaptiveCNNForImageClassification.register_for_auto_class("AutoModelForImageClassification")
