"""ResNets for small images, registered with timm so that a saved one loads again by its name.

The stem is one 3 x 3 convolution of stride 1 without max-pooling: a 32 px image reaches the first stage at 32 px.
"""

from typing import Any

from timm.models import register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

# Not arguments of a network: timm passes them to every entry point.
_TIMM_ONLY = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def _small_image_resnet(layers: tuple[int, ...], channels: tuple[int, ...], pretrained: bool, **kwargs: Any) -> ResNet:
    if pretrained:
        raise RuntimeError("resnet18_cifar* have no weights of their own; load a saved teacher by its folder or Hub id")
    kwargs = {name: value for name, value in kwargs.items() if name not in _TIMM_ONLY}
    in_channels = kwargs.get("in_chans", 3)
    # timm ties the width of the stem to 64 unless it is "deep"; the stem itself is replaced below
    model = ResNet(BasicBlock, layers, channels=channels, stem_type="deep", stem_width=channels[0] // 2, **kwargs)
    model.conv1 = nn.Conv2d(in_channels, channels[0], kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    for info in model.feature_info:  # timm counts on a stem of stride 2 and a pool of stride 2
        info["reduction"] = max(1, info["reduction"] // 4)
    return model


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 for 32 px: 11,173,962 parameters with 10 classes (He et al., 2016, https://arxiv.org/abs/1512.03385)."""
    return _small_image_resnet((2, 2, 2, 2), (64, 128, 256, 512), pretrained, **kwargs)


@register_model
def resnet18_cifar_w16(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """`resnet18_cifar` at a quarter of its width, 701,466 parameters with 10 classes: for minutes on a CPU."""
    return _small_image_resnet((2, 2, 2, 2), (16, 32, 64, 128), pretrained, **kwargs)
