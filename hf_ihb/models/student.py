"""Students (and CNNs trained as teachers): built from a recipe, saved as plain Hub models."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    ConvNextV2Model,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    PreTrainedConfig,
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
from hf_ihb.config.model import ModelArguments
from hf_ihb.errors import ModelLoadError, RecipeError
from hf_ihb.models.adaptive_cnn import AdaptiveCNNConfig, AdaptiveCNNForImageClassification
from hf_ihb.models.classes import check_classes, set_classes
from hf_ihb.models.deit import FlexibleDeiTConfig, FlexibleDeiTForImageClassification
from hf_ihb.models.files import UNREADABLE, model_files, one_line
from hf_ihb.models.images import take_images
from hf_ihb.models.inputs import input_size, processor_beside, takes
from hf_ihb.models.processing import pixel_format, student_processor, whole_image_processor

_VITS = ("deit", "deit_cls", "vit")
_CNNS = ("adaptive_cnn", "convnextv2")
_DEIT_KEYS = ("conv_stem", "layer_scale_init", "cls_token_dropout", "inference_head")
# What a key of `ModelArguments` applies to; the others apply to every architecture.
_APPLIES_TO = (
    dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "mlp_ratio"), _VITS)
    | {"patch_size": (*_VITS, "convnextv2")}
    | dict.fromkeys(("hidden_sizes", "depths"), _CNNS)
    | dict.fromkeys(_DEIT_KEYS, ("deit",))
)
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
    """The model to train and its image processor, which brings whole images to the size of the training.

    Levels, and the filter, are those of the weights' own image processor where there are weights; what that cuts off is
    not, as the student is trained on whole images.

    Grey images (one mean) are shown as three equal channels wherever the model is one that anyone can load, since
    `pipeline` makes every image RGB; an image processor therefore always has three means. Our own models
    ('adaptive_cnn', and 'deit' with an option that makes it ours) have one channel then, and average three.

    Args:
        args: Architecture and shape, or the weights to start from.
        label_names: Class names in label order.
        image_size: Height and width of the images; from scratch the model takes them as they are.
        mean: Channel means of the data in [0, 1]; a model that starts from weights keeps its own.
        std: Channel standard deviations.

    Raises:
        RecipeError: If the architecture is unknown, does not fit the image size, or has no such option.
        ModelLoadError: If the weights cannot be loaded, or fit in nothing but name; if the model does not answer with
            these classes.
    """
    model, processor = _model_and_processor(args, label_names, image_size, mean, std)
    check_classes(model, label_names)
    return model, processor


def _model_and_processor(
    args: ModelArguments, label_names: Sequence[str], image_size: tuple[int, int], mean: list[float], std: list[float]
) -> tuple[PreTrainedModel, Any]:
    labels = {"id2label": dict(enumerate(label_names)), "label2id": {n: i for i, n in enumerate(label_names)}}
    num_channels = len(mean)
    if num_channels == 1:
        mean, std = mean * 3, std * 3
    if args.model_name_or_path is not None:
        _refuse(args, _DEIT_KEYS, "no such key beside 'model_name_or_path'")
        return _from_weights(args, labels, image_size)
    architecture = args.architecture or "deit"
    if architecture not in (*_VITS, *_CNNS) and architecture not in timm.list_models():
        nearest = ", ".join((*_VITS, *_CNNS, *timm.list_models("*_cifar*")))
        raise RecipeError(f"key 'architecture': expected {nearest} or another timm model, found '{architecture}'")
    foreign = [name for name, owners in _APPLIES_TO.items() if architecture not in owners]
    _refuse(args, foreign, f"no such key for architecture '{architecture}'")
    if architecture in _VITS:
        model = _vit(args, architecture, labels, image_size, num_channels)
    elif architecture == "adaptive_cnn":
        model = _adaptive_cnn(args, labels, image_size, num_channels)
    elif architecture == "convnextv2":
        hidden_sizes, depths = _stages(args, [96, 192, 384, 768], [3, 3, 9, 3])
        shape = {"hidden_sizes": hidden_sizes, "depths": depths, "num_stages": len(depths)}
        model = ConvNextV2ForImageClassification(
            ConvNextV2Config(**shape, **_small_stem(args, image_size, len(depths)), **labels)
        )
    else:
        return _timm(args, architecture, labels, image_size, mean, std)
    return model, student_processor(mean, std, image_size)


def _refuse(args: ModelArguments, names: Sequence[str], expected: str) -> None:
    """Refuses keys that would do nothing."""
    defaults = {f.name: f.default for f in fields(args)}
    for name in names:
        if (value := getattr(args, name)) != defaults[name]:
            raise RecipeError(f"key '{name}': expected {expected}, found {value!r}")


def _vit(
    args: ModelArguments, architecture: str, labels: dict, image_size: tuple[int, int], num_channels: int
) -> PreTrainedModel:
    patch = args.patch_size or 4
    if image_size[0] != image_size[1] or image_size[0] % patch:
        raise RecipeError(
            f"key 'patch_size': expected square images whose side is a multiple of {patch} px, found "
            f"{image_size[0]} x {image_size[1]} px (see 'image_size')"
        )
    config_class, model_class, options = _vit_class(args, architecture, num_channels)
    width = args.hidden_size or 192
    config = config_class(
        image_size=image_size[0],
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=args.num_hidden_layers or 12,
        num_attention_heads=args.num_attention_heads or 3,
        intermediate_size=args.intermediate_size or round((args.mlp_ratio or 4) * width),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-6,
        initializer_range=0.02,
        **options,
        **labels,
    )
    model = model_class(config)
    init_tokens(model, config.initializer_range)
    apply_drop_path(model, args.drop_path_rate)
    apply_cls_token_dropout(model, args.cls_token_dropout)
    return model


def _vit_class(
    args: ModelArguments, architecture: str, num_channels: int
) -> tuple[type[PreTrainedConfig], type[PreTrainedModel], dict[str, Any]]:
    """Config, model and its own options: transformers' classes wherever they can hold what the recipe asks for."""
    if architecture == "vit":
        return ViTConfig, ViTForImageClassification, {}
    if args.conv_stem or args.layer_scale_init is not None or args.inference_head == "distillation":
        options = {
            "num_channels": num_channels,
            "conv_stem": args.conv_stem,
            "layer_scale_init_value": args.layer_scale_init,
            "inference_head": args.inference_head,
        }
        return FlexibleDeiTConfig, FlexibleDeiTForImageClassification, options
    one_head = architecture == "deit_cls" or args.inference_head == "cls"
    return DeiTConfig, DeiTForImageClassification if one_head else DeiTForImageClassificationWithTeacher, {}


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


class ClsTokenDropout:
    """In training, replaces the cls vector of some samples by the mean of their patch tokens.

    Args:
        probability: Of a sample, in [0, 1).
        num_prefix_tokens: Tokens before the patches, the cls token first.
    """

    def __init__(self, probability: float, num_prefix_tokens: int = 2) -> None:
        self.probability, self.num_prefix_tokens = probability, num_prefix_tokens

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """A forward hook on the final norm; ``(B, T, D)`` -> ``(B, T, D)``."""
        if not module.training:
            return output
        replaced = torch.rand(len(output), 1, device=output.device) < self.probability
        cls_token = torch.where(replaced, output[:, self.num_prefix_tokens :].mean(1), output[:, 0])
        return torch.cat((cls_token[:, None], output[:, 1:]), dim=1)


def apply_cls_token_dropout(model: nn.Module, probability: float) -> None:
    """Puts `ClsTokenDropout` behind the final norm of a DeiT.

    It has no parameters and no place in the config, so the saved model stays the plain one.
    """
    if probability > 0:
        model.deit.layernorm.register_forward_hook(ClsTokenDropout(probability))


def _adaptive_cnn(
    args: ModelArguments, labels: dict, size: tuple[int, int], num_channels: int
) -> AdaptiveCNNForImageClassification:
    """The layout follows the data, unless the recipe gives one (which then has no pool in its stem)."""
    small = num_channels == 1 and max(size) < 32
    layout = ([32, 64, 128], [2, 2, 2]) if small else ([64, 128, 256, 512], [2, 3, 3, 3])
    hidden_sizes, depths = _stages(args, *layout)
    config = AdaptiveCNNConfig(
        num_channels=num_channels,
        hidden_sizes=hidden_sizes,
        depths=depths,
        stem_pool=small and args.hidden_sizes is None and args.depths is None,
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


def _small_stem(args: ModelArguments, size: tuple[int, int], num_stages: int) -> dict[str, Any]:
    """What of a ConvNeXt V2's config belongs to the images rather than to the network."""
    patch = args.patch_size or 2
    if min(size) < (least := patch * 2 ** (num_stages - 1)):
        raise RecipeError(
            f"key 'patch_size': expected images of at least {least} px for {num_stages} stages behind a patch of "
            f"{patch} px, found {size[0]} x {size[1]} px (see 'image_size')"
        )
    side = size[0] if size[0] == size[1] else list(size)
    return {"patch_size": patch, "image_size": side, "drop_path_rate": args.drop_path_rate}


def _timm(
    args: ModelArguments, architecture: str, labels: dict, size: tuple[int, int], mean: list[float], std: list[float]
) -> tuple[PreTrainedModel, Any]:
    model_args, source = _timm_network(args, architecture, len(labels["id2label"]), size)
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
            "crop_mode": "squash",  # the whole image, whatever its shape
        },
        **labels,
    )
    model = TimmWrapperForImageClassification(config)
    model.timm_model.load_state_dict(source.state_dict())  # the wrapper initialises convolutions like a transformer's
    return model, TimmWrapperImageProcessor(config.pretrained_cfg, architecture)


def _timm_network(
    args: ModelArguments, architecture: str, num_classes: int, size: tuple[int, int]
) -> tuple[dict[str, Any], nn.Module]:
    """A network of timm for images of a size, and the arguments that it takes for that."""
    rate = {"drop_path_rate": args.drop_path_rate} if args.drop_path_rate > 0 else {}
    troubles: list[str] = []
    state = torch.get_rng_state()
    for options in (rate, rate | {"img_size": list(size)}):
        torch.set_rng_state(state)
        try:
            network = timm.create_model(architecture, pretrained=False, num_classes=num_classes, **options)
            _check_drop_path(network, args.drop_path_rate, architecture)
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                network.eval()(torch.zeros(1, 3, *size))
            return options, network.train()
        except UNREADABLE as error:
            troubles.append(one_line(error))
    if rate and "drop_path_rate" in troubles[0]:
        _refuse_drop_path(args.drop_path_rate, architecture)
    raise RecipeError(
        f"keys 'architecture' and 'image_size': expected a network that takes {size[0]} x {size[1]} px, found "
        f"{architecture}: {troubles[0]}"
    )


def _check_drop_path(network: nn.Module, rate: float, architecture: str) -> None:
    """Sees that a rate that is asked for is one that something in the network drops at."""
    rates = [getattr(m, "drop_prob", None) or getattr(m, "drop_path_rate", None) or 0 for m in network.modules()]
    if rate > 0 and not any(rates):
        _refuse_drop_path(rate, architecture)


def _refuse_drop_path(rate: float, architecture: str) -> NoReturn:
    raise RecipeError(f"key 'drop_path_rate': expected 0 for {architecture}, which has none, found {rate}")


def _from_weights(args: ModelArguments, labels: dict, image_size: tuple[int, int]) -> tuple[PreTrainedModel, Any]:
    name = args.model_name_or_path
    folder = model_files(name, args.model_revision).folder
    load = _small_convnextv2 if args.architecture == "convnextv2" else _with_own_shape
    try:
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        model, absent = load(args, labels, image_size, folder)
    except UNREADABLE as error:
        raise ModelLoadError(f"model '{name}' could not be loaded: {' '.join(str(error).split())[:300]}") from error
    if absent:
        raise ModelLoadError(f"model '{name}': expected every weight but the head's, found none that fits {absent[0]}")
    try:
        size = image_size if args.architecture == "convnextv2" else _size_to_train_at(model, processor, image_size)
        processor = processor_beside(model, whole_image_processor(processor, size))
    except ModelLoadError as error:
        raise ModelLoadError(f"model '{name}': {error}") from error
    model.name_or_path = model.config.name_or_path = name  # not the folder of the cache
    return model, processor


def _size_to_train_at(model: PreTrainedModel, processor: Any, image_size: tuple[int, int]) -> tuple[int, int]:
    """What the weights' image processor makes, where the network takes it; the images' own where that is any size."""
    size = pixel_format(processor).size or image_size
    return size if takes(model, size) else input_size(model)


def absent_weights(info: dict[str, Any]) -> list[str]:
    """Names of the parameters that loading left as they were."""
    mismatched = (key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"])
    return sorted([*info["missing_keys"], *mismatched])


def _with_own_shape(
    args: ModelArguments, labels: dict, image_size: tuple[int, int], folder: str
) -> tuple[PreTrainedModel, list[str]]:
    """The model as it was saved, behind another head if the classes differ; and the weights that are absent."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    set_classes(config, list(labels["id2label"].values()))
    model, info = AutoModelForImageClassification.from_pretrained(
        folder,
        config=config,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        dtype=torch.float32,
        trust_remote_code=False,
    )
    apply_drop_path(take_images(model), args.drop_path_rate)
    return model, [name for name in absent_weights(info) if not _is_head(name)]


def _small_convnextv2(
    args: ModelArguments, labels: dict, image_size: tuple[int, int], folder: str
) -> tuple[ConvNextV2ForImageClassification, list[str]]:
    """The stages and final norm of a ConvNeXt V2 behind a new stem (patches and their norm) and a new head.

    Both are drawn as from scratch; the stem is kept where it has the patch size that is wanted.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not isinstance(config, ConvNextV2Config):
        raise RecipeError(
            f"key 'model_name_or_path': expected a ConvNeXt V2 of transformers beside architecture 'convnextv2', found "
            f"'{args.model_name_or_path}', a {config.model_type}"
        )
    trained, info = ConvNextV2Model.from_pretrained(
        folder,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        dtype=torch.float32,
    )
    stem = _small_stem(args, image_size, len(config.depths))
    keeps_stem = trained.config.patch_size == stem["patch_size"]
    set_classes(config, list(labels["id2label"].values()))
    for key, value in stem.items():
        setattr(config, key, value)
    model = ConvNextV2ForImageClassification(config)
    parts = ["encoder", "layernorm"] + ["embeddings"] * keeps_stem
    for part in parts:
        getattr(model.convnextv2, part).load_state_dict(getattr(trained, part).state_dict())
    return model, [key for key in absent_weights(info) if key.startswith(tuple(parts))]
