"""What is read of a model where its states alone would mislead."""

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    SwiftFormerConfig,
    SwiftFormerForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
    YolosConfig,
    YolosModel,
)

from hf_ihb.models.features import extract_features, layout_of, size_arguments
from hf_ihb.models.images import take_images
from hf_ihb.models.module import StudentModule

SHAPE = {"patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}


def timm_network(name, **model_args):
    shown = {"input_size": [3, 64, 64]}
    return TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture=name, model_args=model_args, pretrained_cfg=shown, num_labels=3)
    ).eval()


def test_tokens_behind_the_patches_are_not_taken_for_patches():
    model = YolosModel(YolosConfig(image_size=[32, 32], num_detection_tokens=5, **SHAPE)).eval()
    with pytest.raises(ValueError, match="YolosModel: expected patches as its last tokens, found 5 others after them"):
        extract_features(model, torch.randn(2, 3, 32, 32), [0])


@torch.no_grad()
def test_a_batch_may_be_what_a_masked_autoencoder_is_seen_with_first(generator):
    model = take_images(ViTMAEModel(ViTMAEConfig(image_size=32, **SHAPE))).eval()
    pixels = torch.randn(3, 3, 32, 32, generator=generator)
    _, (found,) = extract_features(model, pixels, [-1], **size_arguments(model, pixels))
    for image, tokens in zip(pixels, found.tokens, strict=True):
        _, (alone,) = extract_features(model, image[None], [-1], **size_arguments(model, image[None]))
        torch.testing.assert_close(alone.tokens[0], tokens)


@pytest.mark.parametrize(
    ("name", "model_args", "first"),
    [
        ("dla34", {"channels": (8, 8, 8, 16, 16, 24)}, "level1"),
        ("legacy_seresnet18", {}, "layer1"),
        ("resnet18_cifar_w16", {}, "layer1"),
    ],
)
@torch.no_grad()
def test_layer_0_is_not_the_stem(name, model_args, first, generator):
    model, seen = timm_network(name, **model_args), []
    pixels = torch.randn(1, 3, 64, 64, generator=generator)
    layout_of(model, pixels)
    model.get_submodule(f"timm_model.{first}").register_forward_hook(lambda module, args, output: seen.append(output))
    _, (found,) = extract_features(model, pixels, [0])
    torch.testing.assert_close(found.tokens, seen[0].flatten(2).mT)


def test_a_final_batch_norm_counts_each_batch_once(generator):
    config = SwiftFormerConfig(image_size=64, embed_dims=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_labels=3)
    student = SwiftFormerForImageClassification(config).train()
    plain, pixels = copy.deepcopy(student), torch.randn(4, 3, 64, 64, generator=generator)
    layout_of(student, pixels)
    output = StudentModule(student, (0,), final_layer=3).train()(pixels)
    plain(pixel_values=pixels)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(student.get_buffer(name), buffer, msg=name)
    channels = output.final_tokens.flatten(0, 1)  # normed by the batch's own statistics, as in the model
    norm = nn.BatchNorm1d(8, affine=False)
    torch.testing.assert_close(norm(channels), channels / student.norm.weight, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not hasattr(transformers, "RadioModel"), reason="the installed transformers has no RADIO")
@pytest.mark.parametrize("registers", [2, 6])
def test_registers_that_make_up_a_grid_of_their_own_are_no_patches(registers, generator):
    config = transformers.RadioConfig(
        image_size=32, max_img_size=32, num_cls_tokens=3, num_registers=registers, **SHAPE
    )
    model = transformers.RadioModel(config).eval()  # it embeds patches by a linear map: no grid is seen on the way
    pixels = torch.randn(1, 3, 32, 32, generator=generator)
    _, (found,) = extract_features(model, pixels, [-1])
    assert found.grid == (4, 4)
    assert found.num_prefix_tokens == 3 + registers


@torch.no_grad()
def test_an_image_that_no_patch_covers_whole_has_its_patches_found(generator):
    model = ViTModel(ViTConfig(image_size=32, **SHAPE)).eval()
    pixels = torch.randn(1, 3, 37, 37, generator=generator)  # 4 x 4 patches of 8 px, and 5 px that nobody sees
    _, (found,) = extract_features(model, pixels, [-1], interpolate_pos_encoding=True)
    assert (found.grid, found.num_prefix_tokens) == ((4, 4), 1)


@torch.no_grad()
def test_patches_that_are_not_square_lie_as_the_network_lays_them(generator):
    model = ViTModel(ViTConfig(image_size=32, **SHAPE | {"patch_size": (8, 4)})).eval()
    _, (found,) = extract_features(model, torch.randn(1, 3, 32, 32, generator=generator), [-1])
    assert (found.grid, found.num_prefix_tokens) == ((4, 8), 1)
