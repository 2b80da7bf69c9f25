import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import AutoModelForImageClassification, pipeline

from hf_ihb.config.model import ModelArguments, TeacherArguments
from hf_ihb.errors import RecipeError
from hf_ihb.models.adaptive_cnn import AdaptiveCNNConfig, AdaptiveCNNForImageClassification
from hf_ihb.models.features import extract_features
from hf_ihb.models.student import build_student
from hf_ihb.models.teacher import load_teacher

NAMES = [f"class {i}" for i in range(10)]
SMALL = {"hidden_sizes": [32, 64, 48], "depths": [2, 1, 2]}


def build(size=32, channels=3, names=NAMES, **kwargs):
    args = ModelArguments(architecture="adaptive_cnn", **kwargs)
    return build_student(args, names, (size, size), [0.5, 0.4, 0.3][:channels], [0.2, 0.25, 0.3][:channels])


def shaken(model):
    """Norms whose weights and statistics do something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()


@pytest.mark.parametrize(
    ("size", "channels", "parameters", "grids"),
    [
        (32, 3, 17_629_514, [32, 16, 8, 4]),
        (28, 1, 709_034, [14, 7, 4]),
        (28, 3, 17_629_514, [28, 14, 7, 4]),
        (32, 1, 17_629_514 - 2 * 64 * 9, [32, 16, 8, 4]),
    ],
)
@torch.no_grad()
def test_the_layout_follows_the_data(size, channels, parameters, grids):
    model, _ = build(size, channels)
    assert sum(p.numel() for p in model.parameters()) == parameters
    _, maps = extract_features(model.eval(), torch.randn(1, channels, size, size), range(len(grids)))
    assert [m.grid for m in maps] == [(side, side) for side in grids]
    assert [m.tokens.shape[-1] for m in maps] == ([32, 64, 128] if len(grids) == 3 else [64, 128, 256, 512])


def reference(state, pixels, depths, pool):
    """The network of the study, written out on the state dict: logits and the map of each stage."""

    def norm(x, name):
        parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts)

    x = F.relu(norm(F.conv2d(pixels, state["adaptive_cnn.stem.conv.weight"], padding=1), "adaptive_cnn.stem.norm"))
    x = F.max_pool2d(x, 2) if pool else x
    maps = []
    for stage, depth in enumerate(depths):
        for block in range(depth):
            at = f"adaptive_cnn.stages.{stage}.{block}"
            stride = 2 if stage > 0 and block == 0 else 1
            y = F.relu(norm(F.conv2d(x, state[f"{at}.conv1.weight"], stride=stride, padding=1), f"{at}.norm1"))
            y = norm(F.conv2d(y, state[f"{at}.conv2.weight"], padding=1), f"{at}.norm2")
            squeezed = F.relu(y.mean((2, 3)) @ state[f"{at}.squeeze_excitation.reduce.weight"].T)
            assert squeezed.shape[1] == y.shape[1] // 16
            y = y * torch.sigmoid(squeezed @ state[f"{at}.squeeze_excitation.expand.weight"].T)[..., None, None]
            if y.shape != x.shape:
                x = norm(F.conv2d(x, state[f"{at}.shortcut.0.weight"], stride=stride), f"{at}.shortcut.1")
            x = F.relu(y + x)
        maps.append(x)
    hidden = F.relu(x.mean((2, 3)) @ state["classifier.0.weight"].T + state["classifier.0.bias"])
    return hidden @ state["classifier.3.weight"].T + state["classifier.3.bias"], maps


@pytest.mark.parametrize(("size", "channels", "layout"), [(16, 3, SMALL), (20, 1, {})])
@torch.no_grad()
def test_the_network_is_the_published_one(size, channels, layout):
    model = shaken(build(size, channels, **layout)[0])
    pixels = torch.randn(2, channels, size, size)
    outputs, maps = extract_features(model, pixels, [0, 1, 2])
    logits, expected = reference(model.state_dict(), pixels, model.config.depths, pool=not layout)
    torch.testing.assert_close(outputs.logits, logits)
    for found, map in zip(maps, expected, strict=True):
        torch.testing.assert_close(found.tokens, map.flatten(2).mT)
    assert len(outputs.hidden_states) == 4  # the stem's is the first


def test_the_head_drops_three_tenths():
    model, _ = build(**SMALL)
    dropped = model.classifier[2].train()(torch.ones(20_000))
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)


def test_weights_start_as_published():
    model, _ = build(hidden_sizes=[64, 128], depths=[2, 2])
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.bias is None
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
        elif isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound
            assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
            assert module.bias is None or 0 < module.bias.abs().max() <= bound
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()


def test_one_step_moves_every_parameter_and_every_statistic():
    model, _ = build(**SMALL)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss = model(torch.randn(8, 3, 16, 16), labels=torch.arange(8)).loss
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert [name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])] == []


def test_the_loss_is_the_cross_entropy_of_the_logits():
    model, _ = build(**SMALL)
    labels = torch.tensor([3, 9])
    outputs = model.eval()(torch.randn(2, 3, 16, 16), labels=labels)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, labels))
    loss, logits = model(torch.zeros(2, 3, 16, 16), labels=labels, return_dict=False)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    assert model(torch.zeros(2, 3, 16, 16)).hidden_states is None


@torch.no_grad()
def test_a_trained_model_loads_again_with_its_statistics(tmp_path):
    model, processor = build(**SMALL)
    pixels = torch.randn(4, 3, 16, 16)
    model.train()(pixels)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is AdaptiveCNNForImageClassification
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(loaded.eval()(pixels).logits, model.eval()(pixels).logits)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForImageClassification"] == "adaptive_cnn.AdaptiveCNNForImageClassification"


@pytest.mark.parametrize("needs_logits", [True, False])
@torch.no_grad()
def test_a_saved_model_teaches(tmp_path, needs_logits):
    model, processor = build(16, **SMALL)
    shaken(model).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    teacher = load_teacher(TeacherArguments(teacher_model=str(tmp_path)), NAMES, needs_logits)
    pixels = teacher.prepare(torch.rand(2, 3, 16, 16))
    outputs, expected = extract_features(model, pixels, [2, 0])
    for found, map in zip(teacher.features(pixels, [2, 0]), expected, strict=True):
        assert found.grid == map.grid
        torch.testing.assert_close(found.tokens, map.tokens)
    if needs_logits:
        torch.testing.assert_close(teacher.logits(pixels), outputs.logits)


def test_weights_go_on_behind_a_head_of_other_classes(tmp_path):
    model, processor = build(**SMALL)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    args = ModelArguments(model_name_or_path=str(tmp_path))
    student, _ = build_student(args, ["a", "b"], (32, 32), [0.5] * 3, [0.2] * 3)
    assert student.classifier[-1].out_features == 2
    state = model.adaptive_cnn.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in student.adaptive_cnn.state_dict().items())


# ---- Channels ----


@torch.no_grad()
def test_three_equal_channels_are_one_grey_image():
    grey = torch.randn(2, 1, 20, 20)
    for channels in (1, 3):
        model = shaken(build(20, channels, **SMALL)[0])
        torch.testing.assert_close(model(grey).logits, model(grey.expand(-1, 3, -1, -1)).logits)
    model = shaken(build(20, 1, **SMALL)[0])
    colour = torch.randn(2, 3, 20, 20)
    torch.testing.assert_close(model(colour).logits, model(colour.mean(1, keepdim=True)).logits)
    with pytest.raises(ValueError, match="expected images of 1 channels, found 2"):
        model(grey.expand(-1, 2, -1, -1))


@torch.no_grad()
def test_the_pipeline_answers_for_grey_images_what_the_model_does(tmp_path, generator):
    model, processor = build(12, 1, **SMALL)
    shaken(model).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    images = torch.randint(256, (3, 12, 12), generator=generator, dtype=torch.uint8)
    answers = pipeline("image-classification", model=str(tmp_path), device="cpu")(
        [Image.fromarray(image.numpy()) for image in images], top_k=10
    )
    expected = model((images[:, None].float() / 255 - 0.5) / 0.2).logits.softmax(-1)
    for answer, scores in zip(answers, expected, strict=True):
        found = {entry["label"]: entry["score"] for entry in answer}
        torch.testing.assert_close(torch.tensor([found[name] for name in NAMES]), scores, rtol=1e-4, atol=1e-6)


# ---- Layouts that are refused ----


@pytest.mark.parametrize(
    "layout", [{"hidden_sizes": []}, {"hidden_sizes": [], "depths": []}, {"depths": [1, 1]}, SMALL | {"depths": [1]}]
)
def test_an_empty_or_unequal_layout_is_refused(layout):
    with pytest.raises(RecipeError, match="keys 'hidden_sizes' and 'depths': expected a width and a depth") as error:
        build(**layout)
    assert "\n" not in str(error.value)


def test_a_config_without_stages_is_refused():
    for layout in ({"hidden_sizes": [], "depths": []}, {"hidden_sizes": [8], "depths": [1, 1]}):
        with pytest.raises(ValueError, match="expected one width and one depth for each of one or more stages"):
            AdaptiveCNNConfig(**layout)


def test_stochastic_depth_is_refused():
    with pytest.raises(RecipeError, match="key 'drop_path_rate': expected 0 for AdaptiveCNNForImageClassification"):
        build(**SMALL, drop_path_rate=0.1)
