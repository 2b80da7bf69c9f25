import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import (
    ConvNextImageProcessor,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTImageProcessor,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from hf_ihb.models.features import FeatureMap, extract_features, final_norm, size_arguments
from hf_ihb.models.processing import PixelFormat, pixel_format, student_processor

SHAPE = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
STAGES = {"hidden_sizes": [4, 8, 12], "depths": [1, 2, 1]}


def timm_wrapper(name, size):
    config = TimmWrapperConfig(architecture=name, pretrained_cfg={"input_size": [3, size, size]}, num_labels=5)
    return TimmWrapperForImageClassification(config)


# name: (model, its blocks or stages, grid of each, tokens before the patches)
MODELS = {
    "deit": (lambda: DeiTForImageClassification(DeiTConfig(**SHAPE)), "deit.layers", [(4, 4)] * 3, 2),
    "deit-distilled": (
        lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**SHAPE)), "deit.layers", [(4, 4)] * 3, 2,
    ),
    "vit": (lambda: ViTForImageClassification(ViTConfig(**SHAPE)), "vit.layers", [(4, 4)] * 3, 1),
    "vit-headless": (lambda: ViTModel(ViTConfig(**SHAPE)), "layers", [(4, 4)] * 3, 1),
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**SHAPE)), "encoder.layer", [(4, 4)] * 3, 1),
    "dinov2-registers": (
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SHAPE, num_register_tokens=4)),
        "encoder.layer", [(4, 4)] * 3, 5,
    ),
    "convnextv2": (
        lambda: ConvNextV2ForImageClassification(ConvNextV2Config(**STAGES, num_stages=3, patch_size=2)),
        "convnextv2.encoder.stages", [(16, 16), (8, 8), (4, 4)], 0,
    ),
    "resnet": (
        lambda: ResNetForImageClassification(ResNetConfig(**STAGES, embedding_size=4, layer_type="basic")),
        "resnet.encoder.stages", [(8, 8), (4, 4), (2, 2)], 0,
    ),
    "timm-resnet-cifar": (
        lambda: timm_wrapper("resnet18_cifar_w16", 32),
        "timm_model.layer{}", [(32, 32), (16, 16), (8, 8), (4, 4)], 0,
    ),
    "timm-resnet": (
        lambda: timm_wrapper("test_resnet", 32), "timm_model.layer{}", [(8, 8), (4, 4), (2, 2), (1, 1)], 0,
    ),
    "timm-convnext": (
        lambda: timm_wrapper("test_convnext", 32), "timm_model.stages", [(8, 8), (4, 4), (2, 2), (1, 1)], 0,
    ),
    "timm-vit": (lambda: timm_wrapper("test_vit", 160), "timm_model.blocks", [(10, 10)] * 6, 0),
}  # fmt: skip


def blocks_of(model, path, count):
    if "{" in path:
        return [model.get_submodule(path.format(i + 1)) for i in range(count)]
    return list(model.get_submodule(path))


@pytest.fixture(params=MODELS)
def case(request):
    build, path, grids, prefix = MODELS[request.param]
    model = build().eval()
    for parameter in model.parameters():  # norms and scales that do nothing at first would hide a missing one
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0, 0.3)
    size = 160 if request.param == "timm-vit" else 32
    return model, blocks_of(model, path, len(grids)), grids, prefix, torch.randn(2, 3, size, size)


@torch.no_grad()
def test_layer_l_is_the_output_of_block_l(case):
    model, blocks, grids, prefix, pixels = case
    seen = {}
    for i, block in enumerate(blocks):
        block.register_forward_hook(
            lambda module, args, output, i=i: seen.update({i: output[0] if isinstance(output, tuple) else output})
        )
    _, maps = extract_features(model, pixels, range(len(grids)))
    assert len(seen) == len(maps) == len(grids)
    for i, (found, grid) in enumerate(zip(maps, grids, strict=True)):
        expected = seen[i].flatten(2).mT if seen[i].ndim == 4 else seen[i]
        assert found.grid == grid
        assert found.num_prefix_tokens == prefix
        assert found.tokens.shape[1] == prefix + grid[0] * grid[1]
        torch.testing.assert_close(found.patch_tokens, expected[:, -grid[0] * grid[1] :])
        assert found.tokens.shape[1] != expected.shape[1] or torch.equal(found.tokens, expected)


@torch.no_grad()
def test_layers_come_in_the_order_asked_for_with_the_models_own_outputs(case):
    model, _, grids, _, pixels = case
    outputs, maps = extract_features(model, pixels, [2, 0])
    _, everything = extract_features(model, pixels, range(len(grids)))
    assert torch.equal(maps[0].tokens, everything[2].tokens)
    assert torch.equal(maps[1].tokens, everything[0].tokens)
    plain, none = extract_features(model, pixels, [])
    assert none == []
    assert plain.hidden_states is None
    torch.testing.assert_close(plain[0], outputs[0])


@pytest.mark.parametrize("offset", [0, 5])
def test_a_layer_that_does_not_exist_is_refused_with_those_that_do(case, offset):
    model, _, grids, _, pixels = case
    layer = len(grids) + offset
    with pytest.raises(ValueError, match=f"{type(model).__name__} has blocks 0 to {len(grids) - 1}, not {layer}"):
        extract_features(model, pixels, [0, layer])
    with pytest.raises(ValueError, match=f"not {-layer - 1}"):
        extract_features(model, pixels, [-layer - 1])


@torch.no_grad()
def test_negative_layers_count_from_the_last(case):
    model, _, grids, _, pixels = case
    depth = len(grids)
    _, found = extract_features(model, pixels, [-1, -depth])
    _, expected = extract_features(model, pixels, [depth - 1, 0])
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.tokens, other.tokens)


@torch.no_grad()
def test_patch_tokens_are_ordered_row_by_row():
    model = ViTModel(ViTConfig(**SHAPE)).eval()
    for block in model.layers:
        block.attention = nn.Identity()
        block.forward = lambda hidden_states, *args, **kwargs: hidden_states
    model.embeddings.position_embeddings.zero_()
    images = torch.zeros(1, 3, 32, 32)
    images[:, :, 8:16, 24:32] = 1.0
    _, (found,) = extract_features(model, images, [0])
    background = found.patch_tokens[0, 0]
    changed = (found.patch_tokens[0] - background).abs().sum(-1) > 1e-6
    assert changed.nonzero().flatten().tolist() == [1 * 4 + 3]


@torch.no_grad()
def test_a_grid_follows_the_size_of_the_images():
    model = ViTModel(ViTConfig(**SHAPE)).eval()
    _, (found,) = extract_features(model, torch.randn(1, 3, 48, 24), [1], interpolate_pos_encoding=True)
    assert found.grid == (6, 3)
    assert found.num_prefix_tokens == 1


@torch.no_grad()
def test_swin_stages_are_read_as_maps():
    config = SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 2, 2], window_size=2)
    model = SwinModel(config).eval()
    seen = []
    for stage in model.encoder.layers:
        stage.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    _, maps = extract_features(model, torch.randn(2, 3, 32, 32), [0, 1, 2])
    for found, expected in zip(maps, seen, strict=True):
        assert found.num_prefix_tokens == 0
        assert found.grid[0] * found.grid[1] == found.tokens.shape[1]
        torch.testing.assert_close(found.tokens, expected)


def test_patch_tokens_leave_the_prefix_out():
    tokens = torch.arange(6.0).view(1, 6, 1)
    assert FeatureMap(tokens, (2, 2), 2).patch_tokens.flatten().tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("deit", "deit.layernorm"),
        ("vit-headless", "layernorm"),
        ("dinov2", "layernorm"),
        ("timm-vit", "timm_model.norm"),
    ],
)
def test_the_final_norm_of_a_vit_is_found(name, path):
    model = MODELS[name][0]()
    assert final_norm(model) is model.get_submodule(path)


@pytest.mark.parametrize("name", ["resnet", "timm-resnet", "timm-resnet-cifar"])
def test_a_network_without_a_final_norm_has_none(name):
    assert final_norm(MODELS[name][0]()) is None


# ---- Pixels ----

MEAN, STD = [0.49, 0.48, 0.45], [0.2, 0.3, 0.25]
NORMALIZED = {"image_mean": MEAN, "image_std": STD}
PROCESSORS = {
    "student": lambda: student_processor(MEAN, STD, (32, 32)),
    "vit": lambda: ViTImageProcessor(size={"height": 32, "width": 32}, **NORMALIZED),
    "vit-unnormalised": lambda: ViTImageProcessor(size={"height": 32, "width": 32}, do_normalize=False),
    "deit": lambda: DeiTImageProcessor(
        size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32}, **NORMALIZED
    ),
    "convnext": lambda: ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=1.0, **NORMALIZED),
    "timm": lambda: TimmWrapperImageProcessor(
        {"input_size": [3, 32, 32], "mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_pct": 1.0}
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_pixel_format_does_what_the_processor_does_to_images_of_its_size(name, generator):
    processor = PROCESSORS[name]()
    images = torch.randint(256, (4, 3, 32, 32), generator=generator, dtype=torch.uint8)
    if name == "timm":
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        expected = processor(pictures, return_tensors="pt")["pixel_values"]
    else:
        expected = processor(list(images), return_tensors="pt")["pixel_values"]
    found = pixel_format(processor)
    assert found.size == (32, 32)
    torch.testing.assert_close(found.apply(images.float() / 255), expected, rtol=0, atol=1e-5)


def test_the_pixel_format_resizes_like_the_processor(generator):
    processor = student_processor([0.0] * 3, [1.0] * 3, (48, 40))
    coarse = 64 + 128 * torch.rand(
        4, 3, 8, 8, generator=generator
    )  # no overshoot, which the processor clips in between
    images = F.interpolate(coarse, (32, 32), mode="bilinear").round().to(torch.uint8)
    expected = processor(list(images), return_tensors="pt")["pixel_values"]
    found = pixel_format(processor).apply(images.float() / 255)
    assert found.shape[-2:] == (48, 40)
    torch.testing.assert_close(found, expected, rtol=0, atol=1.51 / 255)  # it rounds to levels twice
    shrunk = student_processor([0.0] * 3, [1.0] * 3, (12, 16))
    expected = shrunk(list(images), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixel_format(shrunk).apply(images.float() / 255), expected, rtol=0, atol=1.51 / 255)


def test_the_processor_beside_a_student_keeps_its_mean_std_and_size():
    assert pixel_format(student_processor(MEAN, STD, (24, 32))) == PixelFormat(tuple(MEAN), tuple(STD), (24, 32))


@pytest.mark.parametrize(
    ("processor", "size"),
    [
        (ViTImageProcessor(size={"height": 20, "width": 30}), (20, 30)),
        (ConvNextImageProcessor(size={"shortest_edge": 28}), (28, 28)),
        (DeiTImageProcessor(size={"height": 36, "width": 36}, crop_size={"height": 32, "width": 32}), (32, 32)),
        (DeiTImageProcessor(size={"height": 36, "width": 36}, do_center_crop=False), (36, 36)),
    ],
)
def test_the_size_is_the_one_the_model_sees(processor, size):
    assert pixel_format(processor).size == size


def test_every_cifar_resnet_is_known_to_timm():
    assert {"resnet18_cifar", "resnet18_cifar_w16"} <= set(timm.list_models("*_cifar*"))


def test_a_vit_is_told_of_images_of_another_size_and_of_no_others(generator):
    config = {"patch_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = ViTForImageClassification(ViTConfig(image_size=32, **config)).eval()
    for px, tokens in ((32, 17), (16, 5)):
        pixels = torch.randn(1, 3, px, px, generator=generator)
        kwargs = size_arguments(model, pixels)
        assert kwargs == ({} if px == 32 else {"interpolate_pos_encoding": True})
        _, (found,) = extract_features(model, pixels, None, **kwargs)
        assert found.tokens.shape == (1, tokens, 8)
    cnn = ResNetForImageClassification(ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic"))
    assert size_arguments(cnn, torch.zeros(1, 3, 16, 16)) == {}
