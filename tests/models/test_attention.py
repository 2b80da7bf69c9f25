import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
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
)

from hf_ihb.errors import ModelLoadError
from hf_ihb.functional.attention import attention_map, uniform_attention_distance
from hf_ihb.models.attention import (
    AttentionAccumulator,
    AttentionGeometry,
    _attention_weights,
    attention_geometry,
    capture_attention,
    cls_attention_maps,
)
from hf_ihb.models.deit import FlexibleDeiTConfig, FlexibleDeiTForImageClassification
from hf_ihb.models.features import extract_features

SHAPE = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
SHAPE["intermediate_size"] = 24
STAGES = {"hidden_sizes": [4, 8, 12], "depths": [1, 2, 1]}
TIMM_SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}


def timm_wrapper(name, size=32, **model_args):
    cfg = {"input_size": [3, size, size]}
    config = TimmWrapperConfig(architecture=name, pretrained_cfg=cfg, num_labels=5, model_args=model_args or None)
    return TimmWrapperForImageClassification(config)


def registers(**kwargs):
    return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SHAPE, num_register_tokens=4, **kwargs))


# name: (build, tokens before the patches, is token 0 a cls token)
TRANSFORMERS = {
    "deit": (lambda **kw: DeiTForImageClassification(DeiTConfig(**SHAPE, **kw)), 2, True),
    "deit-distilled": (lambda **kw: DeiTForImageClassificationWithTeacher(DeiTConfig(**SHAPE, **kw)), 2, True),
    "vit": (lambda **kw: ViTForImageClassification(ViTConfig(**SHAPE, **kw)), 1, True),
    "dinov2": (lambda **kw: Dinov2Model(Dinov2Config(**SHAPE, **kw)), 1, True),
    "dinov2-registers": (registers, 5, True),
}  # fmt: skip
TIMM = {
    "timm-vit": (lambda: timm_wrapper("vit_tiny_patch16_224", **TIMM_SHAPE), 1, True),
    "timm-deit": (lambda: timm_wrapper("deit_tiny_distilled_patch16_224", **TIMM_SHAPE), 2, True),
    "timm-registers": (lambda: timm_wrapper("vit_small_patch16_224", reg_tokens=3, **TIMM_SHAPE), 4, True),
    "timm-gap": (lambda: timm_wrapper("vit_base_patch16_gap_224", **TIMM_SHAPE), 0, False),
    "timm-gap-registers": (lambda: timm_wrapper("vit_medium_patch16_reg4_gap_256", **TIMM_SHAPE), 4, False),
    "timm-pooling-head": (lambda: timm_wrapper("vit_base_patch16_siglip_224", **TIMM_SHAPE), 0, False),
}
OTHERS = {
    "flexible-deit": (
        lambda: FlexibleDeiTForImageClassification(FlexibleDeiTConfig(**SHAPE, conv_stem=True)), 2, True,
    ),
    "clip": (
        lambda: CLIPForImageClassification(CLIPConfig(vision_config=SHAPE, text_config={"hidden_size": 24})), 1, True,
    ),
}  # fmt: skip
ALL = TRANSFORMERS | TIMM | OTHERS


def ready(model):
    """Eval mode, with weights that make attention far from uniform."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, 0.0, 0.5 if "token" in name or "position" in name else 0.25)
    return model.eval()


def attentions_of(model, pixels, **kwargs):
    found = {}
    capture_attention(model, pixels, lambda layer, attention: found.update({layer: attention}), **kwargs)
    assert list(found) == list(range(len(found)))
    return list(found.values())


def implementations(model):
    return [model.config._attn_implementation] + [
        getattr(model.config, name)._attn_implementation for name in model.config.sub_configs
    ]


# ---- The maps are the model's own ----


@torch.no_grad()
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_maps_are_those_of_eager_attention_under_either_implementation(name):
    eager = ready(TRANSFORMERS[name][0](attn_implementation="eager"))
    fused = TRANSFORMERS[name][0](attn_implementation="sdpa").eval()
    fused.load_state_dict(eager.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    expected = eager(pixel_values=pixels, output_attentions=True).attentions
    assert len(expected) == 3
    assert max(attention.max() for attention in expected) > 0.3  # or any map would do
    for model in (eager, fused):
        found = attentions_of(model, pixels)
        assert [attention.dtype for attention in found] == [torch.float32] * 3
        torch.testing.assert_close(found, list(expected), rtol=0, atol=1e-6)


def timm_blocks(model):
    return [block.attn for block in model.timm_model.blocks]


@torch.no_grad()
@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("fused", [True, False])
def test_maps_are_those_of_timm_without_fused_attention(name, fused):
    model = ready(TIMM[name][0]())
    pixels = torch.randn(2, 3, 32, 32)
    expected = []
    for block in timm_blocks(model):
        block.fused_attn = False
        block.attn_drop.register_forward_hook(lambda module, args, output: expected.append(args[0]))
    model(pixel_values=pixels)
    expected = list(expected)
    assert len(expected) == 3
    assert max(attention.max() for attention in expected) > 0.3
    for block in timm_blocks(model):
        block.fused_attn = fused
    torch.testing.assert_close(attentions_of(model, pixels), expected, rtol=0, atol=1e-6)
    assert [block.fused_attn for block in timm_blocks(model)] == [fused] * 3


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_the_model_answers_as_without(name):
    model, pixels = ready(ALL[name][0]()), torch.randn(2, 3, 32, 32)
    expected = model(pixel_values=pixels)
    found = capture_attention(model, pixels, lambda layer, attention: attention.zero_())  # the callback's to spoil
    assert list(found) == list(expected)
    assert torch.equal(found[0], expected[0])


@torch.no_grad()
def test_an_eager_model_answers_as_without_up_to_rounding():
    model, pixels = ready(TRANSFORMERS["deit"][0](attn_implementation="eager")), torch.randn(2, 3, 32, 32)
    found = capture_attention(model, pixels, lambda *_: None)
    torch.testing.assert_close(found.logits, model(pixel_values=pixels).logits, rtol=1e-5, atol=1e-5)


def test_maps_have_no_gradient_and_come_before_dropout_and_the_mode_stays():
    config = DeiTConfig(**SHAPE, attention_probs_dropout_prob=0.5)
    model = ready(DeiTForImageClassification(config)).train()
    pixels = torch.randn(2, 3, 32, 32)
    outputs = capture_attention(
        model, pixels, lambda _, a: torch.testing.assert_close(a.sum(-1), torch.ones(2, 3, 18), rtol=0, atol=1e-6)
    )
    assert model.training
    assert not outputs.logits.requires_grad
    assert not torch.equal(capture_attention(model, pixels, lambda *_: None).logits, outputs.logits)  # dropout is on
    first = attentions_of(model, pixels)[0]
    assert not first.requires_grad
    torch.testing.assert_close(first, attentions_of(model.eval(), pixels)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_maps_are_float32_at_least(dtype):
    model, pixels = ready(TRANSFORMERS["vit"][0]()).to(dtype), torch.randn(2, 3, 32, 32, dtype=dtype)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    for attention in attentions_of(model, pixels):
        assert attention.dtype == wanted
        assert (attention.sum(dim=-1) - 1).abs().max() < 1e-6


@torch.no_grad()
def test_autocast_rounds_queries_but_not_maps():
    model, pixels = ready(TRANSFORMERS["vit"][0]()), torch.randn(2, 3, 32, 32)
    expected = attentions_of(model, pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attentions_of(model, pixels)
    for attention, reference in zip(found, expected, strict=True):
        assert attention.dtype == torch.float32
        assert (attention.sum(dim=-1) - 1).abs().max() < 1e-6
        torch.testing.assert_close(attention, reference, rtol=0, atol=0.1)


def masks(count):
    allowed = torch.rand(2, 1, count, count) > 0.4
    allowed |= torch.eye(count, dtype=torch.bool)
    return {
        "none": {},
        "bool": {"attn_mask": allowed},
        "float": {"attn_mask": torch.randn(4, count, count)},
        "causal": {"is_causal": True},
        "scale": {"scale": 0.9},
        "groups": {"enable_gqa": True},
        "dropout": {"dropout_p": 0.0},
    }


@pytest.mark.parametrize("name", masks(2))
def test_weights_are_what_fused_attention_weighs_values_with(name):
    options = masks(7)[name]
    groups = 2 if name == "groups" else 4
    query, key, value = torch.randn(2, 4, 7, 6), torch.randn(2, groups, 7, 6), torch.randn(2, groups, 7, 5)
    weights = _attention_weights(query, key, value, **options)
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(weights @ value.repeat_interleave(4 // groups, dim=1), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 4, 7))


# ---- One map at a time, and everything put back ----


def test_one_layer_is_held_at_a_time():
    model, maps, alive = ready(TRANSFORMERS["deit"][0]()), [], []

    def count(*_):
        alive.append(sum(reference() is not None for reference in maps))

    def look(layer, attention):
        maps.append(weakref.ref(attention))
        count()

    for block in model.deit.layers:
        block.register_forward_pre_hook(count)
    capture_attention(model, torch.randn(2, 3, 32, 32), look)
    count()
    assert alive == [0, 1] * 3 + [0]  # before each block, and in its callback


def failing(layer, attention):
    if layer == 1:
        raise KeyError("mine")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_implementation_is_put_back(implementation, fails):
    model = TRANSFORMERS["deit"][0](attn_implementation=implementation).eval()
    pixels = torch.randn(1, 3, 32, 32)
    seen = []
    if fails:
        with pytest.raises(KeyError, match="mine"):
            capture_attention(model, pixels, failing)
    else:
        capture_attention(model, pixels, lambda *_: seen.append(model.config._attn_implementation))
        assert seen == ["sdpa"] * 3
    assert implementations(model) == [implementation]


@pytest.mark.parametrize("fails", [False, True])
def test_nested_implementations_are_put_back_each_to_its_own(fails):
    model = OTHERS["clip"][0]().eval()
    model.config._attn_implementation = {"": "sdpa", "vision_config": "eager", "text_config": "flex_attention"}
    before = implementations(model)
    assert set(before) == {"sdpa", "eager", "flex_attention"}
    if fails:
        with pytest.raises(KeyError):
            capture_attention(model, torch.randn(1, 3, 32, 32), failing)
    else:
        assert len(attentions_of(model, torch.randn(1, 3, 32, 32))) == 3
    assert implementations(model) == before


@pytest.mark.parametrize("fails", [False, True])
def test_the_flags_of_timm_are_put_back_each_to_its_own(fails):
    model = TIMM["timm-vit"][0]().eval()
    for block, flag in zip(timm_blocks(model), (True, False, True), strict=True):
        block.fused_attn = flag
    if fails:
        with pytest.raises(KeyError):
            capture_attention(model, torch.randn(1, 3, 32, 32), failing)
    else:
        assert len(attentions_of(model, torch.randn(1, 3, 32, 32))) == 3
    assert [block.fused_attn for block in timm_blocks(model)] == [True, False, True]


def test_a_model_that_returns_its_attentions_by_default_can_be_looked_at():
    model = TRANSFORMERS["deit"][0](attn_implementation="eager", output_attentions=True).eval()
    assert len(attentions_of(model, torch.randn(1, 3, 32, 32))) == 3
    assert model.config.output_attentions


# ---- What the tokens are ----


@pytest.mark.parametrize("name", ALL)
def test_geometry_of_every_family(name):
    build, prefix, has_cls = ALL[name]
    model, pixels = build().eval(), torch.randn(2, 3, 32, 32)
    geometry = attention_geometry(model, pixels)
    assert geometry == AttentionGeometry((4, 4), prefix, 8, has_cls)
    assert [a.shape for a in attentions_of(model, pixels)] == [(2, 3, 16 + prefix, 16 + prefix)] * 3


@pytest.mark.parametrize("name", ["timm-deit", "timm-registers", "timm-gap-registers"])
def test_prefix_tokens_are_those_timm_counts(name):
    model = TIMM[name][0]()
    geometry = attention_geometry(model, torch.randn(1, 3, 32, 32))
    assert geometry.num_prefix_tokens == model.timm_model.num_prefix_tokens
    assert geometry.has_cls == model.timm_model.has_class_token


@pytest.mark.parametrize("name", ["deit", "vit", "dinov2", "dinov2-registers"])
@pytest.mark.parametrize("size", [(48, 24), (16, 64), (35, 52)])
def test_the_grid_follows_the_size_of_the_images(name, size):
    model, prefix = ready(TRANSFORMERS[name][0]()), TRANSFORMERS[name][1]
    pixels = torch.randn(1, 3, *size)
    options = {} if name.startswith("dinov2") else {"interpolate_pos_encoding": True}  # DINOv2 always does
    geometry = attention_geometry(model, pixels)
    assert geometry.grid == (size[0] // 8, size[1] // 8)
    assert len(attentions_of(model, pixels, **options)) == 3  # which checks the number of tokens
    (found,) = extract_features(model, pixels, [0], **options)[1]
    assert (found.grid, found.num_prefix_tokens) == (geometry.grid, geometry.num_prefix_tokens)
    assert geometry.num_prefix_tokens == prefix


def test_a_timm_vit_of_any_size():
    model = timm_wrapper("vit_tiny_patch16_224", **TIMM_SHAPE, dynamic_img_size=True).eval()
    pixels = torch.randn(1, 3, 48, 24)
    assert attention_geometry(model, pixels).grid == (6, 3)
    assert attentions_of(model, pixels)[0].shape[-1] == 19


@pytest.mark.parametrize("name", ["deit", "dinov2-registers", "timm-gap", "timm-gap-registers", "timm-deit"])
def test_a_model_that_cannot_tell_tokens_apart_is_uniform(name):
    model, prefix, has_cls = ready(ALL[name][0]()), *ALL[name][1:]
    for path, parameter in model.named_parameters():
        if any(part in path for part in ("q_proj", "query", "qkv")):
            nn.init.zeros_(parameter)
    accumulator = accumulated(model, torch.randn(3, 3, 32, 32), 2)
    for layer in accumulator.layers():
        assert layer["distance_relative"] == pytest.approx(1, rel=1e-6)
        assert layer["distance"] == pytest.approx(uniform_attention_distance((4, 4)), rel=1e-6)
        assert layer["distance_px"] == pytest.approx(8 * layer["distance"], rel=1e-12)
        assert layer["effective_number"] == pytest.approx(16, rel=1e-5)
        assert layer["special_token_mass"] == pytest.approx(prefix / (16 + prefix), rel=1e-6)
        assert layer["cls_dispersion"] == (pytest.approx(2 * 15 / 12, rel=1e-5) if has_cls else None)
        assert (layer["cls_dispersion_per_head"] is None) == (not has_cls)


# ---- Refusals ----


REFUSED = {
    "resnet": lambda: ResNetForImageClassification(ResNetConfig(**STAGES, embedding_size=4, layer_type="basic")),
    "convnextv2": lambda: ConvNextV2ForImageClassification(ConvNextV2Config(**STAGES, num_stages=3, patch_size=2)),
    "timm-resnet": lambda: timm_wrapper("test_resnet"),
    "timm-convnext": lambda: timm_wrapper("test_convnext"),
    "timm-cait": lambda: timm_wrapper("cait_xxs24_224", **TIMM_SHAPE),  # mixes heads after the softmax, itself
}
WINDOWED = {
    "swin": lambda: SwinModel(
        SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)
    ),
    "timm-swin": lambda: timm_wrapper(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2)
    ),
    # windows as large as the map at first; then patches are merged
    "swin-one-window": lambda: SwinModel(
        SwinConfig(image_size=32, patch_size=8, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
    ),
}


@pytest.mark.parametrize("name", REFUSED | WINDOWED)
def test_a_model_whose_attention_does_not_span_the_grid_is_refused(name):
    model = (REFUSED | WINDOWED)[name]().eval()
    found = "found none" if name in REFUSED else r"patches and 0 before them\), found \d+"
    with pytest.raises(ModelLoadError, match=rf"^{type(model).__name__}.*: expected .*{found}.*leave attention out$"):
        capture_attention(model, torch.randn(1, 3, 32, 32), lambda *_: None)
    with pytest.raises(ModelLoadError):
        cls_attention_maps(model, torch.randn(1, 3, 32, 32))


def test_tokens_before_the_patches_are_measured_whatever_they_are_called():
    model = TRANSFORMERS["dinov2-registers"][0]().eval()
    tokens = model.embeddings.register_tokens
    del model.embeddings.register_tokens
    model.embeddings.register_buffer("register_tokens", tokens.data)  # no parameter any more
    shapes = []
    capture_attention(model, torch.randn(1, 3, 32, 32), lambda _, attention: shapes.append(attention.shape[-2:]))
    assert set(shapes) == {(21, 21)}
    assert attention_geometry(model, torch.randn(1, 3, 32, 32)).num_prefix_tokens == 5


def test_tokens_that_nothing_accounts_for_are_refused():
    model = TIMM["timm-registers"][0]().eval()
    tokens = model.timm_model.reg_token
    del model.timm_model.reg_token
    model.timm_model.register_buffer("reg_token", tokens.data)  # no parameter any more
    with pytest.raises(ModelLoadError, match=r"expected attention over 17 tokens \(4 x 4 patches and 1 .*found 20"):
        capture_attention(model, torch.randn(1, 3, 32, 32), lambda *_: None)


def test_patches_that_are_not_square_are_refused():
    model = ViTForImageClassification(ViTConfig(**SHAPE | {"patch_size": (8, 4)})).eval()
    with pytest.raises(ModelLoadError, match=r"ViTForImageClassification, key 'patch_size': .*square.*8, 4"):
        attention_geometry(model, torch.randn(1, 3, 32, 32))


# ---- Maps to look at ----


@pytest.mark.parametrize("name", ["deit", "timm-gap", "timm-gap-registers"])
@torch.no_grad()
def test_cls_maps_are_those_of_the_heads_mean(name):
    model, pixels = ready(ALL[name][0]()), torch.randn(2, 3, 32, 32)
    prefix, has_cls = ALL[name][1:]
    found = cls_attention_maps(model, pixels)
    expected = [attention_map(a, (4, 4), prefix, has_cls=has_cls) for a in attentions_of(model, pixels)]
    assert len(found) == 3
    torch.testing.assert_close(found, expected)
    for layer in found:
        assert layer.shape == (2, 4, 4)
        torch.testing.assert_close(layer.sum(dim=(1, 2)), torch.ones(2))


@torch.no_grad()
def test_cls_maps_have_the_rows_and_columns_of_the_image():
    model = ready(ViTForImageClassification(ViTConfig(**SHAPE | {"num_attention_heads": 1})))
    pixels = torch.zeros(1, 3, 48, 24)
    before = cls_attention_maps(model, pixels, interpolate_pos_encoding=True)[0]
    pixels[:, :, 32:40, 16:24] = torch.randn(3, 8, 8)  # row 4, column 2
    after = cls_attention_maps(model, pixels, interpolate_pos_encoding=True)[0]
    assert after.shape == (1, 6, 3)
    gain = (after / before)[0] / (after / before)[0, 0, 0]  # in block 0 the keys of the others are as they were
    assert ((gain - 1).abs() > 1e-3).nonzero().tolist() == [[4, 2]]


# ---- Means over images ----


def accumulated(model, pixels, batch_size):
    geometry = attention_geometry(model, pixels)
    accumulator = AttentionAccumulator(geometry)
    for batch in pixels.split(batch_size):
        capture_attention(model, batch, lambda layer, a: accumulator.update(layer, geometry.statistics(a)))
    return accumulator


def assert_same(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        assert list(one) == list(other)
        for key, value in one.items():
            assert value == (None if other[key] is None else pytest.approx(other[key], rel=tolerance, nan_ok=True)), key


@pytest.mark.parametrize("name", ["deit", "timm-gap"])
def test_means_over_images_do_not_depend_on_the_batches(name):
    model, pixels = ready(ALL[name][0]()), torch.randn(10, 3, 32, 32)
    whole = accumulated(model, pixels, 10)
    assert whole.num_images == 10
    for batch_size in (1, 3, 7):
        part = accumulated(model, pixels, batch_size)
        assert part.num_images == 10
        assert_same(part.layers(), whole.layers(), 1e-6)
        assert part.mean_distance == pytest.approx(whole.mean_distance, rel=1e-7)


GEOMETRY = AttentionGeometry((3, 4), 2, 5, True)


def some_statistics(images, geometry=GEOMETRY):
    count = geometry.num_tokens
    return geometry.statistics((2 * torch.randn(images, 3, count, count, dtype=torch.float64)).softmax(dim=-1))


def test_layers_are_means_and_deviations_of_the_statistics():
    statistics = {layer: some_statistics(6) for layer in (1, 0)}
    accumulator = AttentionAccumulator(GEOMETRY)
    for layer, values in statistics.items():
        for start, stop in ((0, 1), (1, 4), (4, 6)):
            accumulator.update(layer, type(values)(*(value[start:stop] for value in values)))
    rows = accumulator.layers()
    assert [row["layer"] for row in rows] == [0, 1]
    for row in rows:
        values = statistics[row["layer"]]
        for name, value in values._asdict().items():
            assert row[name] == pytest.approx(value.mean().item(), rel=1e-12)
            assert row[f"{name}_per_head"] == pytest.approx(value.mean(dim=0).tolist(), rel=1e-12)
        deviation = values.distance.mean(dim=1).std().item()
        assert row["distance_std_over_images"] == pytest.approx(deviation, rel=1e-9)
        assert row["distance_px"] == pytest.approx(5 * row["distance"], rel=1e-14)
        assert row["distance_relative"] == pytest.approx(row["distance"] / uniform_attention_distance((3, 4)))
    assert accumulator.mean_distance == pytest.approx((rows[0]["distance"] + rows[1]["distance"]) / 2)


def test_layers_have_the_keys_of_the_report_and_plain_numbers():
    accumulator = AttentionAccumulator(GEOMETRY)
    accumulator.update(0, some_statistics(2))
    (row,) = accumulator.layers()
    assert list(row) == [
        "layer", "distance", "distance_px", "distance_relative", "distance_per_head", "distance_std_over_images",
        "entropy", "entropy_per_head", "effective_number", "effective_number_per_head", "special_token_mass",
        "special_token_mass_per_head", "cls_dispersion", "cls_dispersion_per_head", "legacy_map_entropy",
        "legacy_map_entropy_per_head",
    ]  # fmt: skip
    for key, value in row.items():
        values = value if key.endswith("_per_head") else [value]
        assert [type(entry) for entry in values] == [int if key == "layer" else float] * len(values)
        assert len(values) == (3 if key.endswith("_per_head") else 1)


def test_the_sums_of_many_images_take_no_more_room():
    accumulator = AttentionAccumulator(GEOMETRY)
    accumulator.update(0, some_statistics(1))
    size = [tensor.shape for tensor in accumulator._sums[0][2:]]
    for _ in range(3):
        accumulator.update(0, some_statistics(5))
    assert [tensor.shape for tensor in accumulator._sums[0][2:]] == size
    assert accumulator.num_images == 16


def test_constant_images_have_no_deviation_and_one_image_has_none_to_speak_of():
    accumulator = AttentionAccumulator(GEOMETRY)
    accumulator.update(0, statistics := some_statistics(1))
    assert accumulator.layers()[0]["distance_std_over_images"] != accumulator.layers()[0]["distance_std_over_images"]
    for _ in range(4):
        accumulator.update(0, statistics)
    assert accumulator.layers()[0]["distance_std_over_images"] == pytest.approx(0, abs=1e-7)


def test_an_image_without_a_value_is_not_hidden_and_spoils_no_other_head():
    attention = torch.full((2, 3, 14, 14), 1 / 14)
    attention[1, 2, 2:, 2:] = 0
    attention[1, 2, 2:, 0] = 1
    accumulator = AttentionAccumulator(GEOMETRY)
    accumulator.update(0, GEOMETRY.statistics(attention))
    (row,) = accumulator.layers()
    uniform = uniform_attention_distance((3, 4))
    assert row["distance_per_head"] == pytest.approx([uniform, uniform, float("nan")], nan_ok=True)
    assert row["distance"] != row["distance"]
    assert row["cls_dispersion_per_head"] == pytest.approx([(9 + 16 - 2) / 12] * 3)


def test_one_patch_has_no_relative_distance():
    geometry = AttentionGeometry((1, 1), 1, 4, True)
    accumulator = AttentionAccumulator(geometry)
    accumulator.update(0, some_statistics(2, geometry))
    (row,) = accumulator.layers()
    assert row["distance"] == 0
    assert row["distance_relative"] != row["distance_relative"]
