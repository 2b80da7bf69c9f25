"""Students (and CNNs trained as teachers): built from a recipe, saved as plain Hub models."""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.layers import DropPath
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.deit.modeling_deit import DeiTLayer
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor
from transformers.models.vit.modeling_vit import ViTLayer

import hf_ihb.models.timm_cifar  # noqa: F401  registers resnet18_cifar
from hf_ihb.arguments import ModelArguments
from hf_ihb.errors import ModelLoadError, RecipeError
from hf_ihb.models.adaptive_cnn import AdaptiveCNNConfig, AdaptiveCNNForImageClassification
from hf_ihb.models.processing import student_processor

_VITS = {
    "deit": (DeiTConfig, DeiTForImageClassificationWithTeacher),
    "deit_cls": (DeiTConfig, DeiTForImageClassification),
    "vit": (ViTConfig, ViTForImageClassification),
}
# Parameters that are tokens or positions: never decayed, and drawn from a truncated normal rather than zero.
TOKEN_PARAMETERS = (
    "cls_token",
    "distillation_token",
    "dist_token",
    "mask_token",
    "register_tokens",
    "reg_token",
    "position_embeddings",
    "pos_embed",
)


def _is_head(parameter: str) -> bool:
    return any(part in ("head", "fc") or part.endswith("classifier") for part in parameter.split("."))


def build_student(
    args: ModelArguments, label_names: Sequence[str], image_size: tuple[int, int], mean: list[float], std: list[float]
) -> tuple[PreTrainedModel, Any]:
    """The model to train and its image processor.

    Args:
        args: Architecture and shape, or the weights to start from.
        label_names: Class names in label order.
        image_size: Height and width of the images; from scratch the model takes them as they are.
        mean: Channel means of the data in [0, 1]; a model that starts from weights keeps its own.
        std: Channel standard deviations.

    Raises:
        RecipeError: If the architecture is unknown or does not fit the image size.
        ModelLoadError: If the weights cannot be loaded, or fit in nothing but name.
    """
    labels = {"id2label": dict(enumerate(label_names)), "label2id": {n: i for i, n in enumerate(label_names)}}
    if args.model_name_or_path is not None:
        return _from_weights(args, labels)
    architecture = args.architecture or "deit"
    if architecture in _CNNS:
        return _CNNS[architecture](args, labels, image_size, len(mean)), student_processor(mean, std, image_size)
    if architecture in _VITS:
        return _vit(args, architecture, labels, image_size), student_processor(mean, std, image_size)
    if architecture not in timm.list_models():
        nearest = ", ".join((*_VITS, *_CNNS, *timm.list_models("*_cifar*")))
        raise RecipeError(f"key 'architecture': expected {nearest} or another timm model, found '{architecture}'")
    return _timm(args, architecture, labels, image_size, mean, std)


def _vit(args: ModelArguments, architecture: str, labels: dict, image_size: tuple[int, int]) -> PreTrainedModel:
    config_class, model_class = _VITS[architecture]
    patch = args.patch_size or 4
    if image_size[0] != image_size[1] or image_size[0] % patch:
        raise RecipeError(
            f"key 'patch_size': expected square images whose side is a multiple of {patch} px, found "
            f"{image_size[0]} x {image_size[1]} px (see 'image_size')"
        )
    width = args.hidden_size or 192
    config = config_class(
        image_size=image_size[0],
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=args.num_hidden_layers or 12,
        num_attention_heads=args.num_attention_heads or 3,
        intermediate_size=args.intermediate_size or 4 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-6,
        initializer_range=0.02,
        **labels,
    )
    model = model_class(config)
    init_tokens(model, config.initializer_range)
    apply_drop_path(model, args.drop_path_rate)
    return model


@torch.no_grad()
def init_tokens(model: nn.Module, std: float = 0.02) -> None:
    """Draws tokens and positions from a normal truncated at two standard deviations, where transformers has zeros.

    References:
        Touvron et al., 2021 (DeiT), https://arxiv.org/abs/2012.12877, section 6
    """
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[-1] in TOKEN_PARAMETERS:
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)


def apply_drop_path(model: nn.Module, rate: float) -> None:
    """Puts stochastic depth on both residual branches of each block, its rate rising linearly from 0 to `rate`.

    It has no parameters and no place in the config, so the saved model stays the plain one.

    References:
        Huang et al., 2016, https://arxiv.org/abs/1603.09382

    Raises:
        RecipeError: If the model has no DeiT or ViT blocks.
    """
    if rate == 0:
        return
    blocks = [module for module in model.modules() if isinstance(module, (DeiTLayer, ViTLayer))]
    if not blocks:
        raise RecipeError(f"key 'drop_path_rate': expected 0 for {type(model).__name__}, found {rate}")
    for block, block_rate in zip(blocks, torch.linspace(0, rate, len(blocks)).tolist(), strict=True):
        dropout = block.dropout
        active = isinstance(dropout, nn.Dropout) and dropout.p > 0
        block.dropout = nn.Sequential(dropout, DropPath(block_rate)) if active else DropPath(block_rate)


def _adaptive_cnn(
    args: ModelArguments, labels: dict, size: tuple[int, int], num_channels: int
) -> AdaptiveCNNForImageClassification:
    small = num_channels == 1 and max(size) < 32  # the layout for handwritten digits
    layout = ([32, 64, 128], [2, 2, 2]) if small else ([64, 128, 256, 512], [2, 3, 3, 3])
    hidden_sizes, depths = _stages(args, *layout)
    custom = args.hidden_sizes is not None or args.depths is not None
    config = AdaptiveCNNConfig(
        num_channels=num_channels,
        hidden_sizes=hidden_sizes,
        depths=depths,
        stem_pool=small and not custom,
        **labels,
    )
    model = AdaptiveCNNForImageClassification(config)
    apply_drop_path(model, args.drop_path_rate)
    return model


def _stages(args: ModelArguments, hidden_sizes: list[int], depths: list[int]) -> tuple[list[int], list[int]]:
    hidden_sizes = hidden_sizes if args.hidden_sizes is None else args.hidden_sizes
    depths = depths if args.depths is None else args.depths
    if not depths or len(hidden_sizes) != len(depths):
        raise RecipeError(
            f"keys 'hidden_sizes' and 'depths': expected a width and a depth for each of one or more stages, found "
            f"{hidden_sizes} and {depths}"
        )
    return hidden_sizes, depths


def _convnextv2(
    args: ModelArguments, labels: dict, size: tuple[int, int], num_channels: int
) -> ConvNextV2ForImageClassification:
    hidden_sizes, depths = _stages(args, [96, 192, 384, 768], [3, 3, 9, 3])
    config = ConvNextV2Config(
        num_channels=num_channels,
        hidden_sizes=hidden_sizes,
        depths=depths,
        num_stages=len(depths),
        **_small_stem(args, size, len(depths)),
        **labels,
    )
    return ConvNextV2ForImageClassification(config)


def _small_stem(args: ModelArguments, size: tuple[int, int], num_stages: int) -> dict[str, Any]:
    """What of a ConvNeXt V2's config belongs to the images rather than to the network."""
    patch = args.patch_size or 2
    if min(size) < (least := patch * 2 ** (num_stages - 1)):
        raise RecipeError(
            f"key 'patch_size': expected images of at least {least} px for {num_stages} stages behind a patch of "
            f"{patch} px, found {size[0]} x {size[1]} px (see 'image_size')"
        )
    return {"patch_size": patch, "image_size": list(size), "drop_path_rate": args.drop_path_rate}


def _timm(
    args: ModelArguments, architecture: str, labels: dict, size: tuple[int, int], mean: list[float], std: list[float]
) -> tuple[PreTrainedModel, Any]:
    model_args = {"drop_path_rate": args.drop_path_rate} if args.drop_path_rate > 0 else {}
    source = timm.create_model(architecture, pretrained=False, num_classes=len(labels["id2label"]), **model_args)
    config = TimmWrapperConfig(
        architecture=architecture,
        model_args=model_args,
        # the wrapper's image processor is made from this
        pretrained_cfg={
            "input_size": [len(mean), *size],
            "mean": mean,
            "std": std,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
        },
        **labels,
    )
    model = TimmWrapperForImageClassification(config)
    model.timm_model.load_state_dict(source.state_dict())  # the wrapper initialises convolutions like a transformer's
    return model, TimmWrapperImageProcessor(config.pretrained_cfg, architecture)


def _from_weights(args: ModelArguments, labels: dict) -> tuple[PreTrainedModel, Any]:
    name = args.model_name_or_path
    try:
        model, info = AutoModelForImageClassification.from_pretrained(
            name,
            revision=args.model_revision or "main",
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            dtype=torch.float32,
            trust_remote_code=False,
            **labels,
        )
        processor = AutoImageProcessor.from_pretrained(
            name, revision=args.model_revision or "main", trust_remote_code=False
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ModelLoadError(f"model '{name}' could not be loaded: {' '.join(str(error).split())[:300]}") from error
    new = [*info["missing_keys"], *(k[0] if isinstance(k, tuple) else k for k in info["mismatched_keys"])]
    if fresh := sorted(k for k in new if not _is_head(k)):
        raise ModelLoadError(f"model '{name}': expected every weight but the head's, found none that fits {fresh[0]}")
    apply_drop_path(model, args.drop_path_rate)
    return model, processor


_CNNS = {"adaptive_cnn": _adaptive_cnn, "convnextv2": _convnextv2}


def input_size(model: PreTrainedModel) -> tuple[int, int] | None:
    """Height and width a model takes; None where it takes any."""
    size = getattr(model.config, "image_size", None)
    return (size, size) if isinstance(size, int) else size and tuple(size)
