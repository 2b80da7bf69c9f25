"""The module that is trained: what is saved of it, and which of its parameters are trained."""

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    BeitForImageClassification,
    CLIPConfig,
    CLIPForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SiglipConfig,
    SiglipForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_ihb.errors import ModelLoadError, RecipeError
from hf_ihb.models.module import StudentModule, freeze_unused

PIXELS = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SHAPE = {
    "image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32,
}  # fmt: skip


def reader(config_class, model_class):
    """A model that was made to read as well: its vision tower with a classifier."""
    return lambda: model_class(config_class(vision_config=dict(SHAPE), num_labels=4))


def looker(config_class, model_class, **shape):
    return lambda: model_class(config_class(**(shape or SHAPE), num_labels=4))


SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
# how many parameters of each family no output depends on
FAMILIES = {
    "dinov2": (looker(Dinov2Config, Dinov2ForImageClassification), 1),
    "dinov2 with registers": (looker(Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification), 1),
    "siglip": (reader(SiglipConfig, SiglipForImageClassification), 11),
    "clip": (reader(CLIPConfig, CLIPForImageClassification), 2),
    "vit": (looker(ViTConfig, ViTForImageClassification), 0),
    "beit": (looker(BeitConfig, BeitForImageClassification), 0),
    "swin": (looker(SwinConfig, SwinForImageClassification, **SWIN), 0),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_that_is_trained_has_a_gradient(family):
    make, count = FAMILIES[family]
    student = make()
    student.train()
    student.base_model.eval()
    modes, before = [m.training for m in student.modules()], {n: p.clone() for n, p in student.state_dict().items()}
    module = StudentModule(student)
    frozen = freeze_unused(module, PIXELS[:1])
    assert len(frozen) == count
    assert {name for name, p in module.named_parameters() if not p.requires_grad} == set(frozen)
    assert [m.training for m in student.modules()] == modes
    assert all(p.grad is None for p in module.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    module.train()
    module(pixel_values=PIXELS).logits.square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in module.parameters())


def test_what_only_features_depend_on_and_what_a_user_has_frozen_stay_as_they_are():
    student = FAMILIES["dinov2"][0]()
    student.classifier = nn.Linear(student.classifier.in_features, 4)
    student.dinov2.encoder.layer[0].requires_grad_(False)
    student.dinov2.embeddings.cls_token.requires_grad_(False)
    trainable = {name for name, p in student.named_parameters() if p.requires_grad}
    module = StudentModule(student, layers=[0], final_layer=1)
    assert freeze_unused(module, PIXELS[:1]) == ["student.dinov2.embeddings.mask_token"]
    left = {name for name, p in student.named_parameters() if p.requires_grad}
    assert trainable - left == {"dinov2.embeddings.mask_token"}


def test_a_student_that_cannot_be_tried_is_left_alone():
    module = StudentModule(FAMILIES["vit"][0]())
    assert freeze_unused(module, torch.zeros(1, 3, 12, 12)) == []
    assert all(p.requires_grad for p in module.parameters())


# ---- What is saved ----


@pytest.fixture
def module():
    torch.manual_seed(1)
    return StudentModule(FAMILIES["vit"][0](), heads={"token": nn.Linear(16, 3)})


@pytest.mark.parametrize("given", ["nothing", "its state", "the student's state"])
def test_saving_the_module_saves_the_plain_student(module, given, tmp_path):
    states = {"nothing": None, "its state": module.state_dict(), "the student's state": module.student.state_dict()}
    module.save_pretrained(tmp_path / "a", state_dict=states[given])
    module.student.save_pretrained(tmp_path / "b")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {p.name for p in (tmp_path / "b").iterdir()}
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    loaded, info = AutoModelForImageClassification.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded.eval()(PIXELS).logits, module.student.eval()(PIXELS).logits)


def test_pushing_the_module_pushes_the_plain_student(module, hub_here, tmp_path):
    module.push_to_hub("me/student")
    loaded = AutoModelForImageClassification.from_pretrained("me/student", cache_dir=tmp_path)
    assert type(loaded) is type(module.student)
    assert torch.equal(loaded.eval()(PIXELS).logits, module.student.eval()(PIXELS).logits)


@pytest.mark.parametrize(
    ("call", "args"),
    [("add_adapter", (None,)), ("load_adapter", ("x",)), ("set_adapter", ("x",)), ("disable_adapters", ()),
     ("enable_adapters", ()), ("active_adapters", ()), ("get_adapter_state_dict", ()), ("delete_adapter", ("x",))],
)  # fmt: skip
def test_adapters_of_the_module_are_refused_in_one_line(module, call, args):
    with pytest.raises(ModelLoadError, match=r"^adapters of PEFT: expected .* merge it"):
        getattr(module, call)(*args)


def test_a_student_with_an_adapter_is_refused_in_one_line():
    student = FAMILIES["vit"][0]()
    student._hf_peft_config_loaded = True  # what transformers sets where one is loaded
    with pytest.raises(ModelLoadError, match=r"^adapters of PEFT: expected .* merge it"):
        StudentModule(student)


def test_there_is_no_module_to_load(tmp_path):
    with pytest.raises(ModelLoadError, match=r"take AutoModelForImageClassification.from_pretrained$"):
        StudentModule.from_pretrained(tmp_path)


# ---- Attention maps with gradients ----


@pytest.mark.parametrize("family", ["vit", "dinov2", "dinov2 with registers", "siglip", "clip"])
def test_maps_and_their_gradients_are_those_of_eager_attention(family):
    student = FAMILIES[family][0]().double()
    module = StudentModule(student, attention=True)
    student.set_attn_implementation("eager")
    expected = student(PIXELS.double(), output_attentions=True).attentions
    student.set_attn_implementation("sdpa")
    found = module(pixel_values=PIXELS.double()).attentions
    assert student.config._attn_implementation == "sdpa"
    assert len(found) == len(expected) == 2
    parameters = [p for p in student.parameters() if p.ndim == 2]
    sides = []
    for maps in (expected, found):
        loss = sum(((k + 1) * attention.square()).sum() for k, attention in enumerate(maps))
        sides.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one)
    assert sum(gradient is not None for gradient in sides[0]) > 4
    for one, other in zip(*sides, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)  # eager softmax may be in float32


def test_gradients_of_maps_survive_checkpointing_or_it_is_refused():
    student = FAMILIES["vit"][0]()
    module, sides = StudentModule(student, attention=True).train(), []
    for reentrant in (None, False, True):
        if reentrant is not None:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            with pytest.raises(RecipeError, match="key 'gradient_checkpointing_kwargs': expected"):
                module(pixel_values=PIXELS)
            break
        output = module(pixel_values=PIXELS)
        loss = output.logits.sum() + sum(attention.square().sum() for attention in output.attentions)
        sides.append(torch.autograd.grad(loss, list(student.parameters())))
    for one, other in zip(*sides, strict=True):
        torch.testing.assert_close(other, one)


def test_a_compiled_student_gives_the_same_maps_in_one_graph():
    module = StudentModule(FAMILIES["vit"][0](), attention=True)
    expected = module(pixel_values=PIXELS).attentions
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    found = torch.compile(module, backend=counter)(pixel_values=PIXELS).attentions
    assert counter.frame_count == 1
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one)


def test_a_student_of_timm_gives_its_maps_too_and_is_not_changed_by_being_seen():
    config = TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        model_args={"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
        num_labels=4,
    )
    student = TimmWrapperForImageClassification(config).eval()
    expected = student(PIXELS).logits
    output = StudentModule(student, attention=True)(pixel_values=PIXELS)
    assert torch.equal(output.logits, expected)
    assert [a.shape for a in output.attentions] == [(4, 2, 17, 17)] * 2
    torch.testing.assert_close(output.attentions[1].sum(-1), torch.ones(4, 2, 17))
    assert output.attentions[0].requires_grad


def test_a_student_without_attention_is_refused_before_training():
    module = StudentModule(ResNetForImageClassification(ResNetConfig(depths=[1], hidden_sizes=[8])), attention=True)
    with pytest.raises(ModelLoadError, match="expected a ViT with self-attention over all patches"):
        freeze_unused(module, PIXELS[:1])
