import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, DeiTConfig, DeiTForImageClassificationWithTeacher

from hf_ihb.config.model import ModelArguments
from hf_ihb.models.deit import (
    FlexibleDeiTConfig,
    FlexibleDeiTForImageClassification,
    FlexibleDeiTLayerScale,
    FlexibleDeiTModel,
)
from hf_ihb.models.features import extract_features
from hf_ihb.models.student import apply_drop_path, build_student

SHAPE = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
SHAPE |= {"intermediate_size": 48, "num_labels": 5}
NAMES = list("abcde")
SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
OPTIONS = [{"conv_stem": True}, {"layer_scale_init_value": 0.5}, {"inference_head": "distillation"}]


def flexible(**options):
    return shaken(FlexibleDeiTForImageClassification(FlexibleDeiTConfig(**SHAPE, **options)))


def shaken(model):
    """Every parameter and statistic does something."""
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name and "weight" in name else 0.0, 0.2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()


@pytest.fixture
def pixels(generator):
    return torch.randn(3, 3, 16, 16, generator=generator)


@torch.no_grad()
def test_without_options_it_is_transformers_deit_bit_for_bit(pixels):
    deit = shaken(DeiTForImageClassificationWithTeacher(DeiTConfig(**SHAPE)))
    model = flexible()
    assert model.state_dict().keys() == deit.state_dict().keys()
    model.load_state_dict(deit.state_dict())
    expected, found = (m(pixels, output_hidden_states=True) for m in (deit, model))
    for name in ("logits", "cls_logits", "distillation_logits"):
        assert torch.equal(found[name], expected[name])
    assert len(found.hidden_states) == len(expected.hidden_states) == 4
    assert all(torch.equal(*pair) for pair in zip(found.hidden_states, expected.hidden_states, strict=True))
    larger = F.interpolate(pixels, (24, 24))
    expected, found = (m(larger, interpolate_pos_encoding=True).logits for m in (deit, model))
    assert torch.equal(found, expected)


@torch.no_grad()
def test_layer_scale_is_what_scaling_the_last_layer_of_a_branch_does(pixels):
    model = flexible(layer_scale_init_value=0.5)
    deit = DeiTForImageClassificationWithTeacher(DeiTConfig(**SHAPE)).eval()
    deit.load_state_dict({k: v for k, v in model.state_dict().items() if "layer_scale" not in k})
    for layer, scaled in zip(deit.deit.layers, model.deit.layers, strict=True):
        for linear, scale in ((layer.attention.o_proj, scaled.layer_scale1), (layer.mlp.fc2, scaled.layer_scale2)):
            linear.weight.mul_(scale.lambda1[:, None])
            linear.bias.mul_(scale.lambda1)
    torch.testing.assert_close(model(pixels).logits, deit(pixels).logits)


@torch.no_grad()
def test_the_stem_is_two_convolutions_at_full_resolution_before_the_patches(pixels):
    model = flexible(conv_stem=True)
    deit = DeiTForImageClassificationWithTeacher(DeiTConfig(**SHAPE, num_channels=24)).eval()
    prefix = "deit.embeddings.patch_embeddings.stem"
    state = model.state_dict()
    x = pixels
    for conv, norm, width in ((0, 1, 12), (3, 4, 24)):
        x = F.conv2d(x, state.pop(f"{prefix}.{conv}.weight"), padding=1)
        assert x.shape == (3, width, 16, 16)
        parts = [state.pop(f"{prefix}.{norm}.{n}") for n in ("running_mean", "running_var", "weight", "bias")]
        state.pop(f"{prefix}.{norm}.num_batches_tracked")
        x = F.gelu(F.batch_norm(x, *parts))
    deit.load_state_dict(state)
    torch.testing.assert_close(model(pixels).logits, deit(x).logits)


@torch.no_grad()
def test_the_head_that_answers_is_the_one_asked_for(pixels):
    outputs = {head: flexible(inference_head=head)(pixels) for head in ("average", "cls", "distillation")}
    assert torch.equal(outputs["cls"].logits, outputs["cls"].cls_logits)
    assert torch.equal(outputs["distillation"].logits, outputs["distillation"].distillation_logits)
    average = outputs["average"]
    torch.testing.assert_close(average.logits, (average.cls_logits + average.distillation_logits) / 2)
    assert not torch.allclose(average.cls_logits, average.distillation_logits)
    with pytest.raises(ValueError, match="inference_head: expected average, cls, distillation, found 'mean'"):
        FlexibleDeiTConfig(**SHAPE, inference_head="mean")


@torch.no_grad()
def test_attention_is_transformers_own(pixels):
    model = flexible(layer_scale_init_value=0.5)
    expected = model(pixels).logits
    model.set_attn_implementation("eager")
    outputs = model(pixels, output_attentions=True)
    torch.testing.assert_close(outputs.logits, expected)
    assert [tuple(a.shape) for a in outputs.attentions] == [(3, 3, 18, 18)] * 3


def test_weights_start_as_they_should():
    config = FlexibleDeiTConfig(**SHAPE | {"hidden_size": 96}, conv_stem=True, layer_scale_init_value=0.1)
    model = FlexibleDeiTForImageClassification(config)
    stem = model.deit.embeddings.patch_embeddings.stem
    for conv in (stem[0], stem[3]):
        assert conv.weight.std().item() == pytest.approx((2 / (conv.out_channels * 9)) ** 0.5, rel=0.05)
    scales = [module.lambda1 for module in model.modules() if isinstance(module, FlexibleDeiTLayerScale)]
    assert len(scales) == 6
    assert all((scale == 0.1).all() for scale in scales)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or name.endswith("embeddings.projection"):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_a_trained_model_loads_again(options, tmp_path, pixels):
    model = flexible(**options)
    model.train()(pixels)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is FlexibleDeiTForImageClassification
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(loaded.eval()(pixels).logits, model.eval()(pixels).logits)
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is FlexibleDeiTModel
    (found,), (expected,) = (extract_features(m.eval(), pixels, [1])[1] for m in (body, model))
    assert (found.grid, found.num_prefix_tokens) == ((4, 4), 2)
    assert torch.equal(found.tokens, expected.tokens)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_step_moves_every_parameter(checkpointing):
    args = ModelArguments(conv_stem=True, layer_scale_init=0.1, cls_token_dropout=0.5, drop_path_rate=0.1, **SMALL)
    model, _ = build_student(args, NAMES, (16, 16), [0.5] * 3, [0.2] * 3)
    if checkpointing:
        model.gradient_checkpointing_enable()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    outputs = model.train()(torch.randn(16, 3, 16, 16))
    (F.cross_entropy(outputs.logits, torch.arange(16) % 5)).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert [name for name in still if not name.endswith("k_proj.bias")] == []  # softmax ignores a key's bias


@torch.no_grad()
def test_stochastic_depth_drops_a_scaled_branch_whole(pixels):
    model = flexible(layer_scale_init_value=0.5)
    apply_drop_path(model, 0.5)
    assert [m.drop_prob for m in model.modules() if isinstance(m, DropPath)] == pytest.approx([0, 0.25, 0.5])
    layer = model.deit.layers[-1]
    layer.dropout.drop_prob = 1 - 1e-6
    tokens = torch.randn(4, 18, 24)
    assert torch.equal(layer.train()(tokens), tokens)
    layer.dropout.drop_prob = 0.5
    layer.dropout.scale_by_keep = False  # then a branch that is kept is the branch itself
    kept = layer.eval()(tokens)
    both = [torch.isclose(layer.train()(tokens), kept).flatten(1).all(1) for _ in range(40)]
    assert torch.stack(both).float().mean().item() == pytest.approx(0.25, abs=0.12)


@torch.no_grad()
def test_grey_images_come_as_one_channel_or_three_equal_ones():
    grey = torch.randn(2, 1, 16, 16)
    for channels in (1, 3):
        model = flexible(conv_stem=True, num_channels=channels)
        torch.testing.assert_close(model(grey).logits, model(grey.expand(-1, 3, -1, -1)).logits)
    with pytest.raises(ValueError, match="expected images of 3 channels, found 4"):
        model(grey.expand(-1, 4, -1, -1))
