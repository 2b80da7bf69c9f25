import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers import DropPath
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ConvNextImageProcessor,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    ResNetConfig,
    ResNetForImageClassification,
    pipeline,
)
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2DropPath

from hf_ihb.config.model import ModelArguments
from hf_ihb.errors import ModelLoadError, RecipeError
from hf_ihb.methods.token import LinearMaps
from hf_ihb.models.deit import FlexibleDeiTForImageClassification
from hf_ihb.models.features import extract_features
from hf_ihb.models.inputs import input_size
from hf_ihb.models.module import StudentModule
from hf_ihb.models.processing import pixel_format
from hf_ihb.models.student import apply_cls_token_dropout, apply_drop_path, build_student, init_tokens
from hf_ihb.step import TeacherOutputs

ROOT = Path(__file__).parents[2]
NAMES = [f"class {i}" for i in range(10)]
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
SMALL = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3}
TOKENS = ("cls_token", "distillation_token", "position_embeddings")


def build(names=NAMES, size=(32, 32), **kwargs):
    return build_student(ModelArguments(**kwargs), names, size, MEAN, STD)


def mean_std_and_size(processor):
    pixels = pixel_format(processor)
    return pixels.mean, pixels.std, pixels.size


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def tokens_of(model):
    return {name: p for name, p in model.named_parameters() if name.rsplit(".", 1)[-1] in TOKENS}


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({"architecture": "deit"}, 5_365_076),
        ({}, 5_365_076),
        ({"mlp_ratio": 2.0}, 3_590_996),
        ({"mlp_ratio": 2.0, "conv_stem": True}, 4_340_660),
        ({"conv_stem": True}, 6_114_740),
        ({"architecture": "resnet18_cifar"}, 11_173_962),
        ({"architecture": "resnet18_cifar_w16"}, 701_466),
        ({"architecture": "convnextv2"}, 27_870_730),
    ],
)
def test_the_published_architectures_have_their_published_size(options, parameters):
    assert count(build(**options)[0]) == parameters


def test_the_size_of_a_vit_follows_from_its_shape():
    width, mlp, depth, classes, positions, patch = 24, 50, 4, 10, 64, 4 * 4 * 3
    block = 4 * (width * width + width) + (width * mlp + mlp) + (mlp * width + width) + 4 * width
    trunk = depth * block + (patch * width + width) + 2 * width
    head = width * classes + classes
    shape = SMALL | {"intermediate_size": mlp}
    assert count(build(architecture="vit", **shape)[0]) == trunk + head + (positions + 1 + 1) * width
    assert count(build(architecture="deit_cls", **shape)[0]) == trunk + head + (positions + 2 + 2) * width
    assert count(build(architecture="deit", **shape)[0]) == trunk + 2 * head + (positions + 2 + 2) * width


@pytest.mark.parametrize("architecture", ["deit", "deit_cls", "vit"])
def test_tokens_and_positions_start_from_a_normal_truncated_at_two_deviations(architecture):
    model, _ = build(architecture=architecture, num_hidden_layers=1)
    tokens = tokens_of(model)
    assert len(tokens) == (2 if architecture == "vit" else 3)
    for parameter in tokens.values():
        assert parameter.abs().max() <= 0.04
        # a normal cut at two deviations keeps 0.8796 of its own
        assert parameter.std().item() == pytest.approx(0.02 * 0.8796, rel=0.02 if parameter.numel() > 1e4 else 0.25)
        assert parameter.mean().abs() < 5e-3


def test_init_tokens_leaves_every_other_parameter_alone():
    model, _ = build(architecture="deit", **SMALL)
    before = {name: p.clone() for name, p in model.named_parameters()}
    init_tokens(model, 0.5)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in tokens_of(model))
    assert max(p.abs().max() for p in tokens_of(model).values()) > 0.1


def test_linear_layers_of_a_vit_start_at_the_same_deviation_and_without_bias():
    model, _ = build(architecture="deit", num_hidden_layers=2)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert (module.bias == 0).all()
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6


def test_two_builds_from_one_seed_are_the_same_student():
    states = []
    for rate in (0.0, 0.3):
        torch.manual_seed(7)
        states.append(build(architecture="deit", **SMALL, drop_path_rate=rate)[0].state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_no_dropout_is_left_on():
    model, _ = build(architecture="deit", **SMALL)
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.train()(pixels).logits, model(pixels).logits)


# ---- Drop path ----


@pytest.mark.parametrize("architecture", ["deit", "deit_cls", "vit"])
def test_drop_path_leaves_weights_config_and_evaluation_unchanged(architecture):
    model, _ = build(architecture=architecture, **SMALL)
    pixels, state, config = torch.randn(2, 3, 32, 32), dict(model.state_dict()), model.config.to_dict()
    expected = model.eval()(pixels).logits
    apply_drop_path(model, 0.5)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config
    assert torch.equal(model.eval()(pixels).logits, expected)
    model.train()
    assert not torch.equal(model(pixels).logits, model(pixels).logits)


def test_drop_rates_rise_linearly_from_zero_to_the_last_block():
    model, _ = build(architecture="deit", **SMALL, drop_path_rate=0.3)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    model, _ = build(architecture="deit", **SMALL)
    assert not any(isinstance(module, DropPath) for module in model.modules())


def test_both_branches_of_a_block_are_dropped():
    model, _ = build(architecture="vit", **SMALL)
    apply_drop_path(model, 1 - 1e-6)
    last = model.vit.layers[-1].train()
    x = torch.randn(4, 5, 24)
    assert torch.equal(last(x), x)
    assert not torch.equal(last.eval()(x), x)


def test_drop_path_keeps_the_mean_and_drops_whole_samples():
    model, _ = build(architecture="vit", **SMALL)
    apply_drop_path(model, 0.5)
    drop = model.vit.layers[-1].dropout.train()
    dropped = drop(torch.ones(4000, 3, 2)).flatten(1)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(dropped.amin(1), dropped.amax(1))
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.1)


def test_drop_path_comes_after_a_dropout_that_is_on():
    model, _ = build(architecture="vit", **SMALL)
    for block in model.vit.layers:
        block.dropout = nn.Dropout(0.25)
    apply_drop_path(model, 0.5)
    dropout = model.vit.layers[-1].dropout
    assert [type(module) for module in dropout] == [nn.Dropout, DropPath]
    assert (dropout[0].p, dropout[1].drop_prob) == (0.25, 0.5)


def test_drop_path_on_a_model_without_its_blocks_is_refused():
    model = ResNetForImageClassification(ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1]))
    with pytest.raises(
        RecipeError, match=r"key 'drop_path_rate': expected 0 for ResNetForImageClassification, found 0.1"
    ):
        apply_drop_path(model, 0.1)
    apply_drop_path(model, 0.0)


# ---- Options of a DeiT ----


@pytest.mark.parametrize(
    ("options", "model_class"),
    [
        ({"inference_head": "average"}, DeiTForImageClassificationWithTeacher),
        ({"inference_head": "cls"}, DeiTForImageClassification),
        ({"cls_token_dropout": 0.2, "mlp_ratio": 2.5}, DeiTForImageClassificationWithTeacher),
        ({"inference_head": "distillation"}, FlexibleDeiTForImageClassification),
        ({"conv_stem": True}, FlexibleDeiTForImageClassification),
        ({"conv_stem": True, "inference_head": "cls"}, FlexibleDeiTForImageClassification),
        ({"layer_scale_init": 0.1}, FlexibleDeiTForImageClassification),
    ],
)
def test_what_transformers_own_deit_can_hold_is_transformers_own_deit(options, model_class):
    model, _ = build(**SMALL, **options)
    assert type(model) is model_class
    assert model.config.intermediate_size == (60 if "mlp_ratio" in options else 96)
    if model_class is FlexibleDeiTForImageClassification:
        assert model.config.inference_head == options.get("inference_head", "average")
        assert model.config.conv_stem == options.get("conv_stem", False)
        assert model.config.layer_scale_init_value == options.get("layer_scale_init")
        assert all(0 < p.abs().max() <= 0.04 for p in tokens_of(model).values())


@pytest.mark.parametrize(
    ("architecture", "option"),
    [
        *((a, o) for a in ("vit", "deit_cls") for o in (
            {"conv_stem": True}, {"layer_scale_init": 0.1}, {"cls_token_dropout": 0.1}, {"inference_head": "cls"},
            {"hidden_sizes": [8]}, {"depths": [1]},
        )),
        *((a, o) for a in ("adaptive_cnn", "convnextv2", "resnet18_cifar_w16") for o in (
            {"conv_stem": True}, {"inference_head": "cls"}, {"hidden_size": 192}, {"num_hidden_layers": 2},
            {"num_attention_heads": 3}, {"intermediate_size": 8}, {"mlp_ratio": 2.0},
        )),
        ("adaptive_cnn", {"patch_size": 2}), ("resnet18_cifar_w16", {"patch_size": 2}),
        ("resnet18_cifar_w16", {"depths": [1]}), ("deit", {"hidden_sizes": [8]}),
    ],
)  # fmt: skip
def test_a_key_that_would_do_nothing_is_refused(architecture, option):
    ((key, value),) = option.items()
    with pytest.raises(
        RecipeError, match=rf"^key '{key}': expected no such key for architecture '{architecture}'"
    ) as e:
        build(architecture=architecture, **option)
    assert str(e.value).endswith(f"found {value!r}")


@pytest.mark.parametrize("option", [{"conv_stem": True}, {"cls_token_dropout": 0.1}, {"inference_head": "cls"}])
def test_an_option_of_a_deit_is_refused_beside_weights(option):
    with pytest.raises(RecipeError, match=rf"^key '{next(iter(option))}': .*beside 'model_name_or_path'"):
        build(model_name_or_path="someone/something", **option)


# ---- Cls token dropout ----


def with_cls_token_dropout(probability):
    model, _ = build(**SMALL)
    apply_cls_token_dropout(model, probability)
    return model


def test_the_cls_token_of_some_samples_becomes_the_mean_of_their_patches():
    model = with_cls_token_dropout(0.3)
    norm, tokens = model.deit.layernorm.train(), torch.randn(4000, 6, 24)
    found, expected = norm(tokens), nn.functional.layer_norm(tokens, (24,), norm.weight, norm.bias, norm.eps)
    assert torch.equal(found[:, 1:], expected[:, 1:])
    replaced = torch.isclose(found[:, 0], expected[:, 2:].mean(1)).all(1)
    kept = (found[:, 0] == expected[:, 0]).all(1)
    assert (replaced ^ kept).all()
    assert replaced.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(norm.eval()(tokens), expected)


def test_cls_token_dropout_leaves_weights_config_and_evaluation_unchanged():
    model, _ = build(**SMALL)
    pixels, state, config = torch.randn(2, 3, 32, 32), dict(model.state_dict()), model.config.to_dict()
    expected = model.eval()(pixels).logits
    apply_cls_token_dropout(model, 0.5)
    assert model.state_dict().keys() == state.keys()
    assert model.config.to_dict() == config
    assert torch.equal(model.eval()(pixels).logits, expected)


def test_the_gradient_reaches_the_tokens_that_are_read():
    model = with_cls_token_dropout(0.5)
    tokens = torch.randn(64, 6, 24, requires_grad=True)
    model.deit.layernorm.train()(tokens)[:, 0].square().sum().backward()
    reached = (tokens.grad != 0).any(-1)
    assert not reached[:, 1].any()
    assert (reached[:, 0] ^ reached[:, 2:].all(1)).all()
    assert 0 < reached[:, 0].sum() < 64


def test_copies_drop_cls_tokens_too():
    model = with_cls_token_dropout(0.999).train()
    pixels = torch.randn(2, 3, 32, 32)
    expected = model(pixels)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(pixels).cls_logits, expected.cls_logits)
    assert not torch.allclose(model.eval()(pixels).cls_logits, expected.cls_logits)


# ---- ConvNeXt V2 ----

STAGES = {"hidden_sizes": [8, 16, 24], "depths": [1, 2, 1]}


@torch.no_grad()
def test_a_convnextv2_from_scratch_keeps_a_map_at_its_last_stage():
    model, processor = build(architecture="convnextv2", drop_path_rate=0.2, depths=[1, 1, 1, 1])
    _, maps = extract_features(model.eval(), torch.randn(1, 3, 32, 32), [0, 1, 2, 3])
    assert [m.grid for m in maps] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    assert [m.tokens.shape[-1] for m in maps] == [96, 192, 384, 768]
    assert model.config.drop_path_rate == 0.2
    rates = [m.drop_prob for m in model.modules() if isinstance(m, ConvNextV2DropPath) and m.drop_prob > 0]
    assert rates == pytest.approx([0.2 / 3, 0.4 / 3, 0.2])
    assert input_size(model) == (32, 32)
    assert mean_std_and_size(processor) == (tuple(MEAN), tuple(STD), (32, 32))


def test_one_step_moves_every_parameter_of_a_convnextv2():
    model, _ = build(architecture="convnextv2", **STAGES)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.train()(torch.randn(8, 3, 32, 32), labels=torch.arange(8)).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []


def test_images_that_the_last_stage_would_not_see_are_refused():
    with pytest.raises(RecipeError, match=r"key 'patch_size': expected images of at least 16 px .* found 8 x 8 px"):
        build(architecture="convnextv2", size=(8, 8))
    assert build(architecture="convnextv2", size=(8, 8), patch_size=1, **STAGES)[0].config.patch_size == 1


@pytest.fixture
def convnext(tmp_path):
    """A small ConvNeXt V2 as it comes from the Hub: patch 4, 224 px, 5 classes, every weight drawn anew."""
    model = ConvNextV2ForImageClassification(ConvNextV2Config(**STAGES, num_stages=3, num_labels=5))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path)
    size = {"shortest_edge": 224}
    ConvNextImageProcessor(size=size, image_mean=[0.4] * 3, image_std=[0.2] * 3).save_pretrained(tmp_path)
    return model, tmp_path


@torch.no_grad()
def test_a_convnextv2_goes_on_from_its_weights_behind_a_stem_for_small_images(convnext):
    source, folder = convnext
    model, processor = build(["a", "b"], architecture="convnextv2", model_name_or_path=str(folder), drop_path_rate=0.1)
    for part in ("encoder", "layernorm"):
        found, expected = (m.convnextv2.get_submodule(part).state_dict() for m in (model, source))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    stem = model.convnextv2.embeddings
    assert stem.patch_embeddings.weight.shape == (8, 3, 2, 2)
    assert stem.patch_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert (stem.patch_embeddings.bias == 0).all()
    assert (stem.layernorm.weight == 1).all()
    assert (stem.layernorm.bias == 0).all()
    assert model.classifier.weight.shape == (2, 24)
    assert model.classifier.weight.std().item() == pytest.approx(0.02, rel=0.4)
    assert (model.config.id2label, model.config.drop_path_rate) == ({0: "a", 1: "b"}, 0.1)
    assert input_size(model) == (32, 32)
    assert mean_std_and_size(processor) == ((0.4,) * 3, (0.2,) * 3, (32, 32))
    _, maps = extract_features(model.eval(), torch.randn(1, 3, 32, 32), [0, 1, 2])
    assert [m.grid for m in maps] == [(16, 16), (8, 8), (4, 4)]


def test_a_stem_of_the_wanted_patch_is_kept_and_the_head_is_new(convnext):
    source, folder = convnext
    names = [f"LABEL_{i}" for i in range(5)]
    model, _ = build(names, architecture="convnextv2", model_name_or_path=str(folder), patch_size=4)
    found, expected = (m.convnextv2.state_dict() for m in (model, source))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert model.classifier.weight.std() < 0.1 < source.classifier.weight.std()


@pytest.mark.parametrize("fault", ["missing", "mismatched"])
def test_stages_without_weights_of_theirs_are_refused(convnext, fault):
    _, folder = convnext
    state = load_file(folder / "model.safetensors")
    name = next(key for key in state if "stages.1.layers.1" in key and "pwconv1.weight" in key)
    tensor = state.pop(name)
    if fault == "mismatched":
        state[name] = tensor[:-1].contiguous()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"expected every weight but the head's, found none that fits .*stages\.1"):
        build(architecture="convnextv2", model_name_or_path=str(folder))


def test_weights_of_another_family_are_refused_for_a_convnextv2(tmp_path):
    model, processor = build(architecture="vit", **SMALL)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"key 'model_name_or_path': expected a ConvNeXt V2 .*, a vit$"):
        build(architecture="convnextv2", model_name_or_path=str(tmp_path))


# ---- Saved students ----


@pytest.mark.parametrize("architecture", ["deit", "deit_cls", "vit", "resnet18_cifar_w16", "convnextv2"])
def test_a_student_is_saved_as_a_plain_model_that_loads_again(architecture, tmp_path):
    shape = {"resnet18_cifar_w16": {}, "convnextv2": STAGES}.get(architecture, SMALL)
    model, processor = build(architecture=architecture, **shape, drop_path_rate=0.2)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(model)
    assert loaded.config.id2label == dict(enumerate(NAMES))
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.eval()(pixels).logits, model.eval()(pixels).logits)
    assert pixel_format(AutoImageProcessor.from_pretrained(tmp_path)) == pixel_format(processor)
    assert mean_std_and_size(processor) == (tuple(MEAN), tuple(STD), (32, 32))


_ELSEWHERE = """
import json, sys
import torch
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_ihb":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from transformers import AutoImageProcessor, AutoModelForImageClassification
logits = []
for folder in sys.argv[1:]:
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    image = torch.arange(3 * 16 * 16, dtype=torch.uint8).view(3, 16, 16)
    logits.append(model(**processor(image, return_tensors="pt")).logits.tolist())
print(json.dumps(logits))
"""


@torch.no_grad()
def test_our_own_models_carry_their_code(tmp_path):
    image = torch.arange(3 * 16 * 16, dtype=torch.uint8).view(3, 16, 16)
    folders, expected = [], []
    for options in (
        {"architecture": "adaptive_cnn", "hidden_sizes": [16, 32], "depths": [1, 1]},
        SMALL | {"conv_stem": True, "layer_scale_init": 0.1, "inference_head": "distillation"},
    ):
        model, processor = build(size=(16, 16), **options)
        folders.append(tmp_path / str(len(folders)))
        for part in (model, processor):
            part.save_pretrained(folders[-1])
        expected.append(model.eval()(**processor(image, return_tensors="pt")).logits)
    command = [sys.executable, "-c", _ELSEWHERE, *map(str, folders)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for found, logits in zip(json.loads(run.stdout.splitlines()[-1]), expected, strict=True):
        torch.testing.assert_close(torch.tensor(found), logits)


@pytest.mark.parametrize(
    "options",
    [
        SMALL,
        {"architecture": "vit"} | SMALL,
        {"architecture": "convnextv2"} | STAGES,
        {"architecture": "resnet18_cifar_w16"},
        {"conv_stem": True} | SMALL,
    ],
)
@torch.no_grad()
def test_the_pipeline_sees_grey_images_as_evaluation_does(options, tmp_path):
    args = ModelArguments(**options)
    model, processor = build_student(args, NAMES, (16, 16), [0.4], [0.3])
    assert mean_std_and_size(processor) == ((0.4,) * 3, (0.3,) * 3, (16, 16))
    for module in model.modules():  # untrained logits are too alike to tell one normalisation from another
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    images = torch.randint(256, (2, 1, 16, 16), dtype=torch.uint8)
    expected = model(pixel_format(processor).apply(images.float() / 255)).logits.softmax(-1)
    answers = pipeline("image-classification", model=str(tmp_path), device="cpu")(
        [Image.fromarray(image[0].numpy()) for image in images], top_k=10
    )
    for answer, scores in zip(answers, expected, strict=True):
        found = {entry["label"]: entry["score"] for entry in answer}
        torch.testing.assert_close(torch.tensor([found[name] for name in NAMES]), scores, rtol=1e-3, atol=1e-5)


def test_a_timm_model_starts_from_timms_own_initialisation():
    torch.manual_seed(3)
    expected = timm.create_model("resnet18_cifar_w16", num_classes=10).state_dict()
    torch.manual_seed(3)
    found = build(architecture="resnet18_cifar_w16")[0].timm_model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_small_image_resnet_keeps_the_resolution_up_to_its_first_stage():
    model, _ = build(architecture="resnet18_cifar_w16")
    _, maps = extract_features(model.eval(), torch.randn(1, 3, 32, 32), [0, 1, 2, 3])
    assert [m.grid for m in maps] == [(32, 32), (16, 16), (8, 8), (4, 4)]
    assert [m.tokens.shape[-1] for m in maps] == [16, 32, 64, 128]
    assert [info["reduction"] for info in model.timm_model.feature_info] == [1, 1, 2, 4, 8]


def test_the_small_image_resnet_has_no_weights_to_download():
    with pytest.raises(RuntimeError, match="no weights of their own"):
        timm.create_model("resnet18_cifar", pretrained=True)


def test_saved_weights_start_a_student_with_a_new_head_alone(tmp_path):
    source, processor = build(architecture="vit", **SMALL)
    source.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    student, kept = build(["a", "b", "c"], model_name_or_path=str(tmp_path), drop_path_rate=0.1)
    assert student.config.num_labels == 3
    assert student.config.id2label == {0: "a", 1: "b", 2: "c"}
    for name, parameter in student.vit.state_dict().items():
        assert torch.equal(parameter, source.vit.state_dict()[name])
    assert student.classifier.out_features == 3
    assert pixel_format(kept) == pixel_format(processor)
    assert any(isinstance(module, DropPath) for module in student.modules())


def test_weights_that_fit_in_nothing_but_name_are_refused(tmp_path):
    model, processor = build(architecture="vit", **SMALL)
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.2" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    processor.save_pretrained(tmp_path)
    with pytest.raises(
        ModelLoadError, match=r"expected every weight but the head's, found none that fits .*layers?\.2"
    ):
        build(model_name_or_path=str(tmp_path))


@pytest.mark.parametrize("name", ["someone/nothing", "/nowhere"])
def test_weights_that_cannot_be_found_are_one_line(name):
    with pytest.raises(
        ModelLoadError, match=f"^model '{name}': (not in the cache|expected a folder or a Hub id, found neither)"
    ) as error:
        build(model_name_or_path=name)
    assert "\n" not in str(error.value)


def test_truncated_weights_are_one_line(tmp_path):
    model, processor = build(architecture="vit", **SMALL)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelLoadError, match="could not be loaded") as error:
        build(model_name_or_path=str(tmp_path))
    assert "\n" not in str(error.value)


def test_an_unknown_architecture_is_refused_with_the_nearest_ones():
    with pytest.raises(
        RecipeError,
        match=r"key 'architecture': expected deit, deit_cls, vit, adaptive_cnn, convnextv2.* found 'deit_tiny'",
    ):
        build(architecture="deit_tiny")
    with pytest.raises(RecipeError, match=r"resnet18_cifar.* found 'resnet_18'"):
        build(architecture="resnet_18")


@pytest.mark.parametrize("size", [(30, 30), (32, 16)])
def test_images_that_do_not_fall_into_patches_are_refused(size):
    with pytest.raises(RecipeError, match=rf"key 'patch_size': .* found {size[0]} x {size[1]} px"):
        build(architecture="deit", size=size)


def test_the_input_size_is_that_of_the_config():
    assert input_size(build(architecture="vit", **SMALL)[0]) == (32, 32)
    assert input_size(build(architecture="resnet18_cifar_w16")[0]) is None


# ---- StudentModule ----


def test_the_module_returns_what_the_saved_model_returns_and_both_heads():
    student, _ = build(architecture="deit", **SMALL)
    pixels = torch.randn(2, 3, 32, 32)
    outputs, expected = StudentModule(student.eval())(pixels), student(pixels)
    assert torch.equal(outputs.logits, expected.logits)
    torch.testing.assert_close(outputs.logits, (outputs.cls_logits + outputs.distillation_logits) / 2)
    assert len(outputs.heads) == 2
    assert torch.equal(outputs.heads[0], expected.cls_logits)
    assert torch.equal(outputs.heads[1], expected.distillation_logits)
    assert outputs.features is None
    assert outputs.method_heads is None


def test_a_module_with_one_head_has_one_head():
    student, _ = build(architecture="vit", **SMALL)
    outputs = StudentModule(student.eval())(torch.randn(2, 3, 32, 32))
    assert len(outputs.heads) == 1
    assert torch.equal(outputs.heads[0], outputs.logits)


def test_the_module_returns_patch_tokens_of_its_layers_and_their_projections():
    student, _ = build(architecture="deit", **SMALL)
    projections = LinearMaps([nn.Linear(24, 7), nn.Linear(24, 9)])
    pixels = torch.randn(2, 3, 32, 32)
    outputs = StudentModule(student.eval(), [3, 1], {"token": projections})(pixels, TeacherOutputs())
    _, maps = extract_features(student, pixels, [3, 1])
    assert [tuple(x.shape) for x in outputs.features] == [(2, 64, 24)] * 2
    for feature, projected, project, expected in zip(
        outputs.features, outputs.method_heads["token"], projections, maps, strict=True
    ):
        torch.testing.assert_close(feature, expected.tokens[:, 2:])
        torch.testing.assert_close(projected, project(feature))


def test_the_students_own_weights_stand_under_one_prefix():
    student, _ = build(architecture="deit", **SMALL)
    module = StudentModule(student, [3], {"token": LinearMaps([nn.Linear(24, 7)])})
    own = {name.removeprefix("student."): t for name, t in module.state_dict().items() if name.startswith("student.")}
    assert own.keys() == student.state_dict().keys()
    assert {name for name in module.state_dict() if not name.startswith("student.")} == {
        "heads.token.0.weight",
        "heads.token.0.bias",
    }


@pytest.mark.parametrize(("keys", "units"), [
    ({"architecture": "deit", "num_hidden_layers": 3}, 3),
    ({"architecture": "deit", "num_hidden_layers": 3, "conv_stem": True, "layer_scale_init": 0.1}, 3),
    ({"architecture": "adaptive_cnn", "hidden_sizes": [8, 16], "depths": [2, 2]}, 4),
    ({"architecture": "convnextv2", "hidden_sizes": [8, 16], "depths": [2, 1]}, 5),
    ({"architecture": "resnet18_cifar_w16"}, 8),
])  # fmt: skip
def test_fsdp_shards_what_any_student_repeats(keys, units):
    if keys["architecture"] == "deit":
        keys = keys | {"hidden_size": 32, "num_attention_heads": 2}
    student = build_student(ModelArguments(**keys), list("abcd"), (32, 32), [0.5] * 3, [0.2] * 3)[0]
    config = load_config_from_file(str(ROOT / "recipes" / "accelerate" / "fsdp2.yaml")).fsdp_config
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy=config["fsdp_auto_wrap_policy"],
        transformer_cls_names_to_wrap=config.get("fsdp_transformer_layer_cls_to_wrap"),
    )  # fmt: skip
    module = StudentModule(student)
    policy = fsdp2_prepare_auto_wrap_policy(plugin, module)
    assert sum(policy(part) for part in module.modules()) == units
