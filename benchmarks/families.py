"""Families of image models of transformers and timm, each a tiny random one, and what is known of it by hand.

The blocks, grids, tokens before the patches and final norms stand here as their authors wrote them, so that what
`hf_ihb.models.probe` measures is compared with something that was not measured.
"""

from typing import Any, NamedTuple

import timm
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, TimmWrapperConfig, TimmWrapperForImageClassification

MEAN, STD = [0.49, 0.48, 0.45], [0.22, 0.27, 0.25]


class Family(NamedTuple):
    """A model and what is known of it.

    Attributes:
        library: ``transformers`` or ``timm``.
        made_of: Class of the config and of the model; of timm the name of the model.
        options: Of the config, or of timm's network.
        size: Side of its images, px.
        blocks: Path of its blocks, in order; one path with ``{}`` stands for as many as there are grids.
        sides: Side of the grid of each block.
        prefix: Tokens before the patches of each block, as the features have them.
        norm: Path of its final norm; None where there is none.
        first: Number of the first block in `blocks`.
        unordered: Whether a block has its patches in an order of its own.
        heads: Heads of the fused self-attention over all tokens that each block has; 0 where there is none.
    """

    library: str
    made_of: Any
    options: dict[str, Any]
    size: int
    blocks: str | tuple[str, ...]
    sides: tuple[int, ...]
    prefix: int = 0
    norm: str | None = None
    first: int = 0
    unordered: bool = False
    heads: int = 0

    @property
    def is_classifier(self) -> bool:
        """Whether it has class scores."""
        return self.library == "timm" or "Classification" in self.made_of[1]

    @property
    def paths(self) -> list[str]:
        """Path of each block."""
        if isinstance(self.blocks, str):
            return [self.blocks.format(i + self.first) for i in range(len(self.sides))]
        return list(self.blocks)

    def build(self, classes: int = 5, seed: int = 0) -> PreTrainedModel:
        """The model with random weights, none of which is a neutral one."""
        torch.manual_seed(seed)
        if self.library == "timm":
            config = TimmWrapperConfig(
                architecture=self.made_of,
                model_args=self.options,
                pretrained_cfg={
                    "input_size": [3, self.size, self.size],
                    "mean": MEAN,
                    "std": STD,
                    "interpolation": "bicubic",
                    "crop_pct": 1.0,
                    "crop_mode": "squash",
                },
                num_labels=classes,
            )
            model = TimmWrapperForImageClassification(config)
            fresh = timm.create_model(self.made_of, num_classes=classes, **self.options)
            model.timm_model.load_state_dict(fresh.state_dict())
        else:
            config_name, model_name = self.made_of
            config_class = getattr(transformers, config_name)
            config = config_class(**self.options)
            config.id2label = {i: f"LABEL_{i}" for i in range(classes)}
            config.label2id = {name: i for i, name in config.id2label.items()}
            model = getattr(transformers, model_name)(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1 and name.endswith(("weight", "gamma", "lambda1", "lambda_1", "lambda_2")):
                    nn.init.normal_(parameter, 1.0, 0.2)  # norms and scales that do nothing would hide a missing one
                elif not parameter.any():
                    nn.init.normal_(parameter, 0.0, 0.02)
        _settle_statistics(model, self.size)
        return model.eval()


@torch.no_grad()
def _settle_statistics(model: PreTrainedModel, size: int) -> None:
    """Gives batch norms the statistics of images, as training does; at random ones a deep network tells none apart."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        model.train()(pixel_values=torch.randn(16, 3, size, size))
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum


_VIT: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3,
    "intermediate_size": 48,
}  # fmt: skip
_TEXT = {
    "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50,
}  # fmt: skip
_CLIP = {"vision_config": _VIT | {"projection_dim": 16}, "text_config": _TEXT | {"projection_dim": 16}}
_CLIP |= {"projection_dim": 16}
_STAGES = {"hidden_sizes": [4, 8, 12], "depths": [1, 2, 1]}
_PYRAMID = {
    "image_size": 64, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "num_attention_heads": [1, 2, 2, 2],
}  # fmt: skip
_SWIN = {
    "image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1, 2], "num_heads": [1, 2, 2], "window_size": 4,
}  # fmt: skip


def _vit(config: str, model: str, blocks: str, norm: str | None, prefix: int = 1, **options: Any) -> Family:
    return Family("transformers", (config, model), _VIT | options, 32, blocks, (4, 4, 4), prefix, norm, heads=3)


def _towers(config: str, model: str, options: dict[str, Any], prefix: int, path: str = "") -> Family:
    blocks, norm = f"{path}encoder.layers.{{}}", f"{path}post_layernorm"
    return Family("transformers", (config, model), options, 32, blocks, (4, 4, 4), prefix, norm, heads=3)


def _cnn(
    config: str, model: str, options: dict, size: int, blocks: Any, sides: tuple, norm: str | None = None, **more: Any
) -> Family:
    return Family("transformers", (config, model), options, size, blocks, sides, 0, norm, **more)


_SIGLIP2 = {name: value for name, value in _VIT.items() if name != "image_size"} | {"num_patches": 16}

TRANSFORMERS = {
    "vit": _vit("ViTConfig", "ViTForImageClassification", "vit.layers.{}", "vit.layernorm"),
    "deit": _vit("DeiTConfig", "DeiTForImageClassification", "deit.layers.{}", "deit.layernorm", 2),
    "deit-distilled": _vit("DeiTConfig", "DeiTForImageClassificationWithTeacher", "deit.layers.{}", "deit.layernorm",
                           2),
    "dinov2": _vit("Dinov2Config", "Dinov2Model", "encoder.layer.{}", "layernorm"),
    "dinov2-classifier": _vit(
        "Dinov2Config", "Dinov2ForImageClassification", "dinov2.encoder.layer.{}", "dinov2.layernorm"
    ),
    "dinov2-registers": _vit(
        "Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", "encoder.layer.{}", "layernorm", 5,
        num_register_tokens=4,
    ),
    "dinov3-vit": _vit("DINOv3ViTConfig", "DINOv3ViTModel", "model.layer.{}", "norm", 5, num_register_tokens=4),
    "beit": _vit(
        "BeitConfig", "BeitForImageClassification", "beit.layers.{}", "beit.pooler.layernorm",
        use_relative_position_bias=True,
    ),
    "data2vec": _vit(
        "Data2VecVisionConfig", "Data2VecVisionForImageClassification", "data2vec_vision.encoder.layer.{}",
        "data2vec_vision.pooler.layernorm", use_relative_position_bias=True,
    ),
    "vit-mae": _vit("ViTMAEConfig", "ViTMAEModel", "layers.{}", "layernorm"),
    "vit-msn": _vit("ViTMSNConfig", "ViTMSNForImageClassification", "vit.layers.{}", "vit.layernorm"),
    "ijepa": _vit("IJepaConfig", "IJepaForImageClassification", "ijepa.layers.{}", "ijepa.layernorm", 0),
    "radio": _vit("RadioConfig", "RadioModel", "encoder.layer.{}", None, 10, max_img_size=64),
    "tipsv2-vision": _vit("Tipsv2VisionConfig", "Tipsv2VisionModel", "encoder.layer.{}", "layernorm", 2),
    "tipsv2": Family("transformers", ("Tipsv2Config", "Tipsv2Model"), {"vision_config": _VIT, "text_config": _TEXT}, 32,
                     "encoder.layer.{}", (4, 4, 4), 2, "layernorm", heads=3),
    "pixio": _vit("PixioConfig", "PixioModel", "layers.{}", "layernorm", 8),
    "clip-vision": _towers("CLIPVisionConfig", "CLIPVisionModel", _VIT, 1),
    "clip": _towers("CLIPConfig", "CLIPModel", _CLIP, 1),
    "clip-classifier": _towers("CLIPConfig", "CLIPForImageClassification", _CLIP, 1, "vision_model."),
    "metaclip2": _towers("MetaClip2Config", "MetaClip2ForImageClassification", _CLIP, 1, "vision_model."),
    "siglip": _towers("SiglipConfig", "SiglipModel", {"vision_config": _VIT, "text_config": _TEXT}, 0),
    "siglip-classifier": _towers(
        "SiglipConfig", "SiglipForImageClassification", {"vision_config": _VIT, "text_config": _TEXT}, 0,
        "vision_model.",
    ),
    "siglip2": _towers("Siglip2Config", "Siglip2Model", {"vision_config": _SIGLIP2, "text_config": _TEXT}, 0),
    "siglip2-classifier": _towers(
        "Siglip2Config", "Siglip2ForImageClassification", {"vision_config": _SIGLIP2, "text_config": _TEXT}, 0,
        "vision_model.",
    ),
    "aimv2": _vit("Aimv2VisionConfig", "Aimv2VisionModel", "encoder.layers.{}", "rms_norm", 0),
    "dinov3-convnext": _cnn(
        "DINOv3ConvNextConfig", "DINOv3ConvNextModel", {"hidden_sizes": [4, 8, 12, 16], "depths": [1, 1, 2, 1]}, 64,
        "model.stages.{}", (16, 8, 4, 2), "layer_norm",
    ),
    "hiera": _cnn(
        "HieraConfig", "HieraForImageClassification",
        {"image_size": [64, 64], "embed_dim": 4, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]}, 64,
        "hiera.encoder.stages.{}", (16, 8, 4, 2), "hiera.pooler.layernorm", unordered=True,
    ),
    "swin": _cnn("SwinConfig", "SwinForImageClassification", _SWIN, 32, "swin.encoder.layers.{}", (8, 4, 4),
                 "swin.layernorm"),
    "swin-backbone": _cnn("SwinConfig", "SwinBackbone", _SWIN | {"out_features": ["stage3"]}, 32,
                          ("swin.encoder.layers.0.blocks.0", "swin.encoder.layers.1.blocks.0",
                           "swin.encoder.layers.2.blocks.1"), (16, 8, 4), "swin.layernorm"),
    "swinv2": _cnn("Swinv2Config", "Swinv2ForImageClassification", _SWIN, 32, "swinv2.encoder.layers.{}", (8, 4, 4),
                   "swinv2.layernorm"),
    "focalnet": _cnn(
        "FocalNetConfig", "FocalNetForImageClassification",
        {"image_size": 32, "embed_dim": 8, "depths": [1, 1, 2], "patch_size": 2, "focal_levels": [1, 1, 1],
         "focal_windows": [3, 3, 3], "hidden_sizes": [8, 16, 32]}, 32,
        "focalnet.encoder.stages.{}", (8, 4, 4), "focalnet.layernorm",
    ),
    "convnext": _cnn("ConvNextConfig", "ConvNextForImageClassification", _STAGES | {"num_stages": 3, "patch_size": 2},
                     32, "convnext.encoder.stages.{}", (16, 8, 4), "convnext.layernorm"),
    "convnextv2": _cnn("ConvNextV2Config", "ConvNextV2ForImageClassification",
                       _STAGES | {"num_stages": 3, "patch_size": 2}, 32, "convnextv2.encoder.stages.{}", (16, 8, 4),
                       "convnextv2.layernorm"),
    "resnet": _cnn("ResNetConfig", "ResNetForImageClassification",
                   _STAGES | {"embedding_size": 4, "layer_type": "basic"}, 32, "resnet.encoder.stages.{}", (8, 4, 2)),
    "regnet": _cnn("RegNetConfig", "RegNetForImageClassification",
                   _STAGES | {"embedding_size": 4, "groups_width": 4}, 64, "regnet.encoder.stages.{}", (16, 8, 4)),
    "bit": _cnn("BitConfig", "BitForImageClassification",
                {"embedding_size": 8, "hidden_sizes": [8, 16, 24], "depths": [1, 2, 1], "num_groups": 4}, 64,
                "bit.encoder.stages.{}", (16, 8, 4), "bit.norm"),
    "efficientnet": _cnn(
        "EfficientNetConfig", "EfficientNetForImageClassification",
        {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320, "image_size": 64}, 64,
        "efficientnet.encoder.blocks.{}", (32, 16, 8, 4, 4, 4, 4, 2, 2, 2),
    ),
    "mobilenet-v1": _cnn(
        "MobileNetV1Config", "MobileNetV1ForImageClassification", {"depth_multiplier": 0.25, "image_size": 64}, 64,
        "mobilenet_v1.layer.{}", (32, 32, *[16] * 4, *[8] * 4, *[4] * 12, *[2] * 4),
    ),
    "mobilenet-v2": _cnn(
        "MobileNetV2Config", "MobileNetV2ForImageClassification", {"depth_multiplier": 0.25, "image_size": 64}, 64,
        "mobilenet_v2.layer.{}", (16, 16, 8, 8, 8, *[4] * 7, *[2] * 4),
    ),
    "mobilevit": _cnn(
        "MobileViTConfig", "MobileViTForImageClassification",
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 12, 16, 16, 20, 40],
         "num_attention_heads": 2}, 64, "mobilevit.encoder.layer.{}", (32, 16, 8, 4, 2),
    ),
    "mobilevitv2": _cnn("MobileViTV2Config", "MobileViTV2ForImageClassification",
                        {"image_size": 64, "width_multiplier": 0.25}, 64, "mobilevitv2.encoder.layer.{}",
                        (32, 16, 8, 4, 2)),
    "levit": _cnn(
        "LevitConfig", "LevitForImageClassification",
        {"image_size": 128, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "depths": [2, 1, 1],
         "key_dim": [8, 8, 8]}, 128, "levit.encoder.stages.{}", (4, 2, 2),
    ),
    "cvt": _cnn("CvtConfig", "CvtForImageClassification", {"embed_dim": [8, 16, 24], "num_heads": [1, 2, 3],
                "depth": [1, 2, 3]}, 64, "cvt.encoder.stages.{}", (16, 8, 4), "layernorm"),
    "pvt": _cnn("PvtConfig", "PvtModel", _PYRAMID, 64,
                tuple(f"encoder.block.{i}" for i in ("0.0", "1.0", "2.0", "2.1", "3.0")), (16, 8, 4, 4, 2),
                "encoder.layer_norm"),
    "pvt-v2": _cnn("PvtV2Config", "PvtV2ForImageClassification", _PYRAMID | {"mlp_ratios": [2] * 4}, 64,
                   tuple(f"pvt_v2.encoder.layers.{i}.layer_norm" for i in range(4)), (16, 8, 4, 2)),
    "segformer": _cnn("SegformerConfig", "SegformerForImageClassification", _PYRAMID, 64, "segformer.stages.{}",
                      (16, 8, 4, 2)),
    "poolformer": _cnn(
        "PoolFormerConfig", "PoolFormerForImageClassification",
        {"hidden_sizes": [4, 8, 12, 16], "depths": [1, 1, 2, 1]}, 64,
        tuple(f"poolformer.encoder.block.{i}" for i in ("0.0", "1.0", "2.1", "3.0")), (16, 8, 4, 2), "norm",
    ),
    "swiftformer": _cnn("SwiftFormerConfig", "SwiftFormerForImageClassification",
                        {"image_size": 64, "embed_dims": [8, 12, 16, 24], "depths": [1, 1, 2, 1]}, 64,
                        tuple(f"swiftformer.encoder.network.{i}" for i in (0, 2, 4, 6)), (16, 8, 4, 2), "norm"),
    "textnet": _cnn("TextNetConfig", "TextNetForImageClassification",
                    {"image_size": 64, "stem_out_channels": 8, "hidden_sizes": [8, 8, 12, 16, 20]}, 64,
                    "textnet.encoder.stages.{}", (16, 8, 4, 2)),
    "hgnet-v2": _cnn(
        "HGNetV2Config", "HGNetV2ForImageClassification",
        {"stem_channels": [3, 8, 8], "stage_in_channels": [8, 16, 24, 32], "stage_mid_channels": [8] * 4,
         "stage_out_channels": [16, 24, 32, 40], "stage_num_blocks": [1, 1, 2, 1], "embedding_size": 8,
         "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1]}, 64, "encoder.stages.{}", (16, 8, 4, 2),
    ),
    "vitdet": _cnn("VitDetConfig", "VitDetModel",
                   {k: v for k, v in _VIT.items() if k != "intermediate_size"}
                   | {"window_size": 2, "window_block_indices": [0]}, 32, "encoder.layer.{}", (4, 4, 4)),
}  # fmt: skip


def _timm(name: str, options: dict[str, Any], size: int, blocks: Any, sides: tuple, norm: str | None = None,
          first: int = 0, heads: int = 0) -> Family:  # fmt: skip
    paths = f"timm_model.{blocks}" if isinstance(blocks, str) else tuple(f"timm_model.{path}" for path in blocks)
    return Family("timm", name, options, size, paths, sides, 0, norm and f"timm_model.{norm}", first, heads=heads)


_FOUR, _SHORT = (16, 8, 4, 2), {"layers": [1, 1, 1, 1]}
_COAT = {"embed_dims": (8, 16, 24, 32), "serial_depths": (1,) * 4, "num_heads": 8, "img_size": 64}
_SMALL_VIT = {"embed_dim": 24, "depth": 3, "num_heads": 2, "img_size": 64}

TIMM = {
    "vision_transformer": _timm("test_vit", {"img_size": 64}, 64, "blocks.{}", (4,) * 6, "norm", heads=2),
    "deit": _timm("deit_tiny_distilled_patch16_224", _SMALL_VIT, 64, "blocks.{}", (4, 4, 4), "norm", heads=2),
    "beit": _timm("beit_base_patch16_224", _SMALL_VIT, 64, "blocks.{}", (4, 4, 4), "fc_norm", heads=2),
    "eva": _timm("eva02_tiny_patch14_224", _SMALL_VIT | {"img_size": 56}, 56, "blocks.{}", (4, 4, 4), "fc_norm",
                 heads=2),
    "eva-dinov3": _timm("vit_small_patch16_dinov3", _SMALL_VIT, 64, "blocks.{}", (4, 4, 4), "norm", heads=2),
    "eva-pe": _timm("vit_pe_core_tiny_patch16_384", _SMALL_VIT, 64, "blocks.{}", (4, 4, 4), "norm", heads=2),
    "eva-pe-spatial": _timm("vit_pe_spatial_tiny_patch16_512", _SMALL_VIT, 64, "blocks.{}", (4, 4, 4), heads=2),
    "siglip": _timm("vit_base_patch16_siglip_224", _SMALL_VIT, 64, "blocks.{}", (4, 4, 4), "norm", heads=2),
    "vision_transformer_relpos": _timm("test_vit_relpos", {"img_size": 64}, 64, "blocks.{}", (4,) * 9, "fc_norm",
                                       heads=3),
    "cait": _timm("cait_xxs24_224", _SMALL_VIT, 64, "blocks.{}", (4, 4, 4), "norm"),
    "xcit": _timm("xcit_nano_12_p8_224", _SMALL_VIT, 64, "blocks.{}", (8, 8, 8), "norm"),
    "convit": _timm("convit_tiny", _SMALL_VIT, 64, "blocks.{}", (4, 4, 4), "norm"),
    "mlp_mixer": _timm("mixer_s32_224", {"img_size": 64}, 64, "blocks.{}", (2,) * 8, "norm"),
    "swin_transformer": _timm(
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 12, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 4), "img_size": 64}, 64,
        "layers.{}", _FOUR, "norm",
    ),
    "resnet": _timm("test_resnet", {}, 64, "layer{}", _FOUR, None, 1),
    "resnet_cifar": _timm("resnet18_cifar_w16", {}, 32, "layer{}", (32, 16, 8, 4), None, 1),
    "convnext": _timm("test_convnext", {}, 64, "stages.{}", _FOUR, "head.norm"),
    "efficientnet": _timm("test_efficientnet", {}, 64, "blocks.{}", (32, 16, 8, 4, 2)),
    "byobnet": _timm("test_byobnet", {}, 64, ("stages.0", "stages.1", "stages.2", "final_conv"), (16, 8, 4, 2)),
    "maxxvit": _timm("test_coatnet", {"img_size": 64}, 64, "stages.{}", _FOUR, "norm"),
    "mambaout": _timm("test_mambaout", {}, 64, "stages.{}", _FOUR, "head.norm"),
    "mvitv2": _timm("mvitv2_tiny", {"img_size": 64}, 64, "stages.{}", _FOUR, "norm"),
    "pit": _timm("pit_ti_224", {"base_dims": [8, 8, 8], "heads": [1, 2, 4], "depth": [1, 1, 1], "img_size": 64}, 64,
                 "transformers.{}", (7, 4, 2), "norm"),
    "rdnet": _timm("rdnet_tiny", {"num_init_features": 16, "growth_rates": (8,) * 7}, 64,
                   tuple(f"dense_stages.{i}" for i in (0, 1, 5, 6)), _FOUR, "head.norm"),
    "twins": _timm("twins_svt_small",
                   {"embed_dims": [8, 16, 32, 64], "num_heads": [1, 2, 4, 8], "depths": [1] * 4, "img_size": 64}, 64,
                   "pos_block.{}", _FOUR, "norm"),
    "visformer": _timm("visformer_tiny", {"embed_dim": 48, "depth": (1, 1, 1), "num_heads": 3, "img_size": 64}, 64,
                       "stage{}", (8, 4, 2), "norm", 1),
    "volo": _timm("volo_d1_224", {"img_size": 64}, 64, tuple(f"network.{i}" for i in (0, 2, 3, 4)), (8, 4, 4, 4),
                  "norm"),
    "coat-lite": _timm("coat_lite_tiny", _COAT, 64, tuple(f"serial_blocks{i}.0" for i in (1, 2, 3, 4)), _FOUR, "norm4"),
    "coat": _timm("coat_tiny", _COAT | {"parallel_depth": 1, "embed_dims": (16,) * 4}, 64, (), _FOUR, "norm4"),
    "densenet": _timm("densenet121", {"growth_rate": 8, "block_config": (1, 1, 2, 1)}, 64,
                      ("features.denseblock1", "features.denseblock2", "features.denseblock3", "features.norm5"),
                      _FOUR),
    "dpn": _timm("dpn48b", {}, 64, (), _FOUR, "features.conv5_bn_ac.bn"),
    "senet": _timm("legacy_seresnet18", _SHORT, 64, "layer{}", _FOUR, None, 1),
    "levit": _timm("levit_128s", {"embed_dim": (16, 24, 32), "key_dim": 8, "depth": (1, 1, 1), "img_size": 128}, 128,
                   "stages.{}", (8, 4, 2)),
    "hiera": _timm("hiera_tiny_224", {"embed_dim": 12, "stages": (1, 1, 2, 1), "img_size": (64, 64)}, 64, (), _FOUR,
                   "head.norm"),
    "davit": _timm("davit_tiny", {"embed_dims": (8, 16, 24, 32), "depths": (1,) * 4, "num_heads": (1, 2, 3, 4)}, 64,
                   "stages.{}", _FOUR, "head.norm"),
    "resnetv2": _timm("resnetv2_18", _SHORT | {"channels": [16, 24, 32, 40], "stem_chs": 16}, 64, "stages.{}", _FOUR,
                      "norm"),
    "sknet": _timm("skresnet18", _SHORT | {"channels": [16, 24, 32, 40]}, 64, "layer{}", _FOUR, None, 1),
    "fasternet": _timm("fasternet_t0", {"embed_dim": 8, "depths": (1,) * 4}, 64, "stages.{}", _FOUR),
    "regnet": _timm("regnetx_002", {}, 64, "s{}", _FOUR, None, 1),
    "mobilenetv3": _timm("lcnet_035", {}, 64, tuple(f"blocks.{i}" for i in (0, 1, 2, 4, 5)), (32, 16, 8, 4, 2)),
    "starnet": _timm("starnet_s050", {}, 64, "stages.{}", _FOUR, "norm"),
    "ghostnet": _timm("ghostnet_050", {}, 64, tuple(f"blocks.{i}" for i in (1, 3, 5, 7)), _FOUR),
    "efficientvit": _timm("efficientvit_b0", {}, 64, "stages.{}", _FOUR),
    "edgenext": _timm("edgenext_xx_small", {}, 64, "stages.{}", _FOUR, "head.norm"),
    "mobilevit": _timm("mobilevit_xxs", {}, 64, ("stages.0", "stages.1", "stages.2", "stages.3", "final_conv"),
                       (32, 16, 8, 4, 2)),
}  # fmt: skip

# The oldest versions that are supported lack some of them.
FAMILIES = {
    f"transformers/{n}": family for n, family in TRANSFORMERS.items() if hasattr(transformers, family.made_of[1])
}
FAMILIES |= {f"timm/{name}": family for name, family in TIMM.items()}

# Those that are trained: classifiers of as many kinds as there are.
STUDENTS = tuple(
    f"transformers/{name}"
    for name in ("vit", "deit", "deit-distilled", "dinov2-classifier", "beit", "vit-msn", "ijepa", "clip-classifier",
                 "siglip-classifier", "swin", "convnext", "resnet", "mobilenet-v2", "poolformer", "cvt", "focalnet")
) + tuple(
    f"timm/{name}"
    for name in ("vision_transformer", "resnet_cifar", "convnext", "efficientnet", "swin_transformer", "fasternet",
                 "coat-lite")
)  # fmt: skip
