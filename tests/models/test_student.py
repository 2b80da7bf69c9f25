import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

from hf_ihb.arguments import ModelArguments
from hf_ihb.errors import ModelLoadError, RecipeError
from hf_ihb.models.features import extract_features
from hf_ihb.models.module import StudentModule
from hf_ihb.models.processing import pixel_format
from hf_ihb.models.student import apply_drop_path, build_student, init_tokens, input_size

NAMES = [f"class {i}" for i in range(10)]
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
SMALL = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3}
TOKENS = ("cls_token", "distillation_token", "position_embeddings")


def build(names=NAMES, size=(32, 32), **kwargs):
    return build_student(ModelArguments(**kwargs), names, size, MEAN, STD)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def tokens_of(model):
    return {name: p for name, p in model.named_parameters() if name.rsplit(".", 1)[-1] in TOKENS}


@pytest.mark.parametrize(
    ("architecture", "parameters"),
    [("deit", 5_365_076), (None, 5_365_076), ("resnet18_cifar", 11_173_962), ("resnet18_cifar_w16", 701_466)],
)
def test_the_published_architectures_have_their_published_size(architecture, parameters):
    assert count(build(architecture=architecture)[0]) == parameters


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


# ---- Saved students ----


@pytest.mark.parametrize("architecture", ["deit", "deit_cls", "vit", "resnet18_cifar_w16"])
def test_a_student_is_saved_as_a_plain_model_that_loads_again(architecture, tmp_path):
    shape = SMALL if "resnet" not in architecture else {}
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
    assert pixel_format(processor) == (tuple(MEAN), tuple(STD), (32, 32))


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
    with pytest.raises(ModelLoadError, match=f"model '{name}' could not be loaded") as error:
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
    with pytest.raises(RecipeError, match=r"key 'architecture': expected deit, deit_cls, vit.* found 'deit_tiny'"):
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
    assert outputs.projected is None


def test_a_module_with_one_head_has_one_head():
    student, _ = build(architecture="vit", **SMALL)
    outputs = StudentModule(student.eval())(torch.randn(2, 3, 32, 32))
    assert len(outputs.heads) == 1
    assert torch.equal(outputs.heads[0], outputs.logits)


def test_the_module_returns_patch_tokens_of_its_layers_and_their_projections():
    student, _ = build(architecture="deit", **SMALL)
    projections = [nn.Linear(24, 7), nn.Linear(24, 9)]
    pixels = torch.randn(2, 3, 32, 32)
    outputs = StudentModule(student.eval(), [3, 1], projections)(pixels)
    _, maps = extract_features(student, pixels, [3, 1])
    assert [tuple(x.shape) for x in outputs.features] == [(2, 64, 24)] * 2
    for feature, projected, project, expected in zip(
        outputs.features, outputs.projected, projections, maps, strict=True
    ):
        torch.testing.assert_close(feature, expected.tokens[:, 2:])
        torch.testing.assert_close(projected, project(feature))


def test_the_students_own_weights_stand_under_one_prefix():
    student, _ = build(architecture="deit", **SMALL)
    module = StudentModule(student, [3], [nn.Linear(24, 7)])
    own = {name.removeprefix("student."): t for name, t in module.state_dict().items() if name.startswith("student.")}
    assert own.keys() == student.state_dict().keys()
    assert {name for name in module.state_dict() if not name.startswith("student.")} == {
        "projections.0.weight",
        "projections.0.bias",
    }
