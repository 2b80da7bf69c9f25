import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    Dinov2Backbone,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from hf_ihb import LogitDistillationTrainer, LogitDistillationTrainingArguments
from hf_ihb.config.model import ModelArguments, TeacherArguments
from hf_ihb.data import ImageSplit
from hf_ihb.errors import ModelLoadError, NumericsError, TeacherMismatchError
from hf_ihb.models.features import extract_features
from hf_ihb.models.processing import PixelFormat, pixel_format, student_processor
from hf_ihb.models.student import build_student
from hf_ihb.models.teacher import Teacher, load_teacher

NAMES = ["cat", "dog", "night owl"]
SHAPE = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
PIXELS = PixelFormat((0.5,) * 3, (0.25,) * 3, (32, 32))


def vit(names=NAMES, model_class=ViTForImageClassification):
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    model = model_class(ViTConfig(**SHAPE, **labels))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def save(folder, model, state=None, processor=True):
    model.save_pretrained(folder, state_dict=state)
    if processor:
        mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
        size = {"height": 32, "width": 32}
        ViTImageProcessor(size=size, image_mean=mean, image_std=std).save_pretrained(folder)
    return str(folder)


def load(name, names=NAMES, logits=True, **kwargs):
    return load_teacher(TeacherArguments(teacher_model=str(name), **kwargs), names, logits)


@pytest.fixture
def pixels(generator):
    return torch.randn(4, 3, 32, 32, generator=generator)


# ---- Classes ----


def test_a_teacher_in_the_same_order_gives_its_own_scores(tmp_path, pixels):
    model = vit()
    teacher = load(save(tmp_path, model))
    assert teacher.permutation is None
    torch.testing.assert_close(teacher.logits(pixels), model(pixels).logits)


@pytest.mark.parametrize(
    "theirs", [["dog", "night owl", "cat"], ["Night_Owl", " CAT", "dog"], ["dog", "cat", "Night Owl"]]
)
def test_scores_are_brought_into_the_students_order_by_name(tmp_path, pixels, theirs):
    model = vit(theirs)
    teacher = load(save(tmp_path, model))
    logits = model(pixels).logits
    for i, name in enumerate(NAMES):
        column = [n.strip().lower().replace("_", " ") for n in theirs].index(name)
        torch.testing.assert_close(teacher.logits(pixels)[:, i], logits[:, column])


def test_a_student_that_lists_its_classes_in_another_order_is_taught_class_by_class(pixels, tmp_path):
    student = vit(NAMES)
    student.config.id2label = {2: NAMES[2], 0: NAMES[0], 1: NAMES[1]}
    teacher = vit([NAMES[1], NAMES[2], NAMES[0]])
    args = LogitDistillationTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    split = ImageSplit(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4) % 3, NAMES)
    made = student_processor([0.5] * 3, [0.5] * 3, (32, 32))
    trainer = LogitDistillationTrainer(
        student, args, train_dataset=split, processing_class=made, teacher_model=teacher, teacher_processor=made
    )
    logits = teacher(pixels).logits
    torch.testing.assert_close(trainer.teacher.logits(pixels), logits[:, [2, 0, 1]])


def test_another_number_of_classes_is_refused_with_both_lists(tmp_path):
    with pytest.raises(TeacherMismatchError, match=r"expected 3 classes \(cat, dog, night owl\), found 2 \(cat, dog\)"):
        load(save(tmp_path, vit(["cat", "dog"])))
    with pytest.raises(TeacherMismatchError, match="expected 3 classes"):
        load(tmp_path, teacher_assume_same_label_order=True)


@pytest.mark.parametrize("theirs", [["LABEL_0", "LABEL_1", "LABEL_2"], ["cat", "dog", "cow"], ["cat", "dog", "Cat"]])
def test_names_that_do_not_match_are_refused_until_the_order_is_vouched_for(tmp_path, pixels, theirs):
    model = vit(theirs)
    name = save(tmp_path, model)
    with pytest.raises(TeacherMismatchError, match=r"cat, dog, night owl.*'teacher_assume_same_label_order'") as error:
        load(name)
    assert ", ".join(theirs) in str(error.value)
    teacher = load(name, teacher_assume_same_label_order=True)
    torch.testing.assert_close(teacher.logits(pixels), model(pixels).logits)


def test_a_long_list_of_classes_is_cut():
    with pytest.raises(TeacherMismatchError, match=r", \.\.\.\)") as error:
        Teacher(vit(), PIXELS, [str(i) for i in range(1000)])
    assert len(str(error.value)) < 300


def test_a_teacher_of_features_alone_needs_no_classes(tmp_path, pixels):
    model = vit(["other"])
    teacher = load(save(tmp_path, model), logits=False)
    assert teacher.permutation is None
    _, expected = extract_features(model, pixels, [0, 2])
    for found, one in zip(teacher.features(pixels, [0, 2]), expected, strict=True):
        torch.testing.assert_close(found.tokens, one.tokens)


# ---- Weights ----


def test_a_headless_checkpoint_is_no_teacher_of_logits(tmp_path):
    headless = ViTModel(vit().config, add_pooling_layer=False)
    name = save(tmp_path, headless)
    with pytest.raises(ModelLoadError, match=r"expected weights for all of .*, found none for classifier\.bias"):
        load(name)
    assert isinstance(load(name, logits=False).model, ViTModel)


@pytest.mark.parametrize("logits", [True, False])
def test_a_checkpoint_that_lacks_a_layer_is_refused(tmp_path, logits):
    model = vit()
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1." not in name}
    with pytest.raises(ModelLoadError, match=r"found none for .*layers?\.1\..* in all\)"):
        load(save(tmp_path, model, state), logits=logits)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    name = save(tmp_path, vit())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 17}))
    with pytest.raises(ModelLoadError, match=name):
        load(name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("logits", [True, False])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value, logits):
    name = save(tmp_path, vit())
    state = load_file(tmp_path / "model.safetensors")
    broken = next(key for key in state if key.endswith("2.layernorm_after.weight"))
    state[broken][5] = value
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        NumericsError, match=r"expected finite weights, found NaN or Inf in .*2\.layernorm_after\.weight"
    ):
        load(name, logits=logits)


def test_a_checkpoint_of_pickles_alone_is_refused_unread(tmp_path):
    model = vit()
    save(tmp_path, model)
    (tmp_path / "model.safetensors").unlink()
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self):
            return (open, (str(canary), "w"))

    torch.save({"payload": Payload(), **model.state_dict()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="pickled weights are never read"):
        load(tmp_path)
    assert not canary.exists()


def test_code_of_a_checkpoint_is_never_run(tmp_path):
    save(tmp_path, vit())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Config: ...\nclass Model: ...\n")
    for logits in (True, False):
        with pytest.raises(ModelLoadError):
            load(tmp_path, logits=logits)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["someone/nothing", "/nowhere"])
def test_a_teacher_that_cannot_be_found_is_one_line(name):
    with pytest.raises(
        ModelLoadError, match=f"^teacher '{name}': (not in the cache|expected a folder or a Hub id, found neither)"
    ) as error:
        load(name)
    assert "\n" not in str(error.value)


def test_a_truncated_checkpoint_is_one_line(tmp_path):
    name = save(tmp_path, vit())
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelLoadError, match="could not be loaded") as error:
        load(name)
    assert "\n" not in str(error.value)


def test_a_teacher_without_its_image_processor_is_refused(tmp_path):
    with pytest.raises(ModelLoadError, match="could not be loaded"):
        load(save(tmp_path, vit(), processor=False))


def test_teacher_weights_are_read_in_float32(tmp_path):
    assert load(save(tmp_path, vit().half())).model.dtype == torch.float32


# ---- Controls ----


def test_an_untrained_teacher_has_the_weights_its_library_draws_from_the_seed(tmp_path):
    name = save(tmp_path, vit(NAMES[::-1]))
    torch.manual_seed(11)
    state = torch.get_rng_state()
    teacher = load_teacher(TeacherArguments(teacher_model=name, teacher_control="untrained"), NAMES, True)
    assert torch.equal(torch.get_rng_state(), state)  # the student is drawn next
    assert teacher.control == "untrained"
    assert teacher.permutation.tolist() == [2, 1, 0]
    assert teacher.pixels == load(name).pixels
    torch.manual_seed(11)
    expected = ViTForImageClassification(teacher.model.config).state_dict()
    trained = load(name).model.state_dict()
    for key, tensor in teacher.model.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    assert all(not torch.equal(tensor, expected[key]) for key, tensor in trained.items())
    weights = {}
    for seed in (3, 3, 4):
        args = TeacherArguments(teacher_model=name, teacher_control="untrained")
        model = load_teacher(args, NAMES, True, seed=seed).model
        found = model.classifier.weight.detach()
        assert torch.equal(weights.setdefault(seed, found), found)
    assert not torch.equal(weights[3], weights[4])


@pytest.mark.parametrize("logits", [True, False])
def test_an_untrained_timm_teacher_has_timms_initialisation(tmp_path, logits):
    """Convolutions of transformers' wrapper come from N(0, 0.02), and no block starts at zero there."""
    arguments = ModelArguments(architecture="resnet18_cifar_w16")
    model, _ = build_student(arguments, NAMES, (32, 32), [0.5] * 3, [0.2] * 3)
    model.save_pretrained(tmp_path)
    untrained = load(tmp_path, logits=logits, teacher_control="untrained").model.timm_model
    kernel = untrained.layer4[1].conv1.weight  # Kaiming, fan out: 3 x 3 x 128
    assert kernel.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    assert all((block.bn2.weight == 0).all() for block in untrained.layer4)
    assert not torch.equal(kernel, model.timm_model.layer4[1].conv1.weight)


def test_an_untrained_teacher_needs_no_weights_but_its_classes_must_fit(tmp_path):
    name = save(tmp_path, vit(["a", "b"]))
    with pytest.raises(TeacherMismatchError, match="expected 3 classes"):
        load(name, teacher_control="untrained")


def test_the_pixels_can_be_normalised_like_the_data_set(tmp_path):
    name, statistics = save(tmp_path, vit()), ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    args = TeacherArguments(teacher_model=name, teacher_normalization="dataset")
    teacher = load_teacher(args, NAMES, True, dataset_statistics=statistics)
    images = torch.rand(2, 3, 32, 32)
    expected = torch.stack([(images[:, c] - m) / s for c, (m, s) in enumerate(zip(*statistics, strict=True))], dim=1)
    torch.testing.assert_close(teacher.prepare(images), expected)
    with pytest.raises(ValueError, match="'teacher_normalization'"):
        load_teacher(args, NAMES, True)
    own = load_teacher(TeacherArguments(teacher_model=name), NAMES, True, dataset_statistics=statistics)
    assert own.pixels.mean == (0.5, 0.4, 0.3)


# ---- What a teacher does ----


def test_a_teacher_is_frozen(tmp_path, pixels):
    model = vit().train()
    teacher = Teacher(model, PIXELS, NAMES)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pixels.requires_grad_()
    assert not teacher.logits(pixels).requires_grad
    assert not any(found.tokens.requires_grad for found in teacher.features(pixels, [0, 1, 2], apply_norm=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_frozen_teacher_with_batch_norm_keeps_its_buffers(pixels):
    model, _ = build_student(ModelArguments(architecture="resnet18_cifar_w16"), NAMES, (32, 32), [0.5] * 3, [0.2] * 3)
    teacher = Teacher(model.train(), PIXELS, NAMES)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    teacher.logits(5 * pixels)
    teacher.features(5 * pixels, [0, 3])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_saved_timm_teacher_loads_again(tmp_path, pixels):
    arguments = ModelArguments(architecture="resnet18_cifar_w16")
    model, processor = build_student(arguments, NAMES[::-1], (32, 32), [0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
    model(pixels)  # moves the running statistics away from their start
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    teacher = load(tmp_path)
    model.eval()
    assert torch.equal(teacher.logits(pixels), model(pixels).logits.flip(1))
    assert teacher.pixels == pixel_format(processor)
    for found, expected in zip(
        load(tmp_path, logits=False).features(pixels, [0, 3]), extract_features(model, pixels, [0, 3])[1], strict=True
    ):
        assert found.grid == expected.grid
        torch.testing.assert_close(found.tokens, expected.tokens)


def test_a_teacher_sees_images_as_its_own_processor_makes_them(tmp_path, generator):
    teacher = load(save(tmp_path, vit()))
    processor = ViTImageProcessor.from_pretrained(tmp_path)
    images = torch.randint(256, (4, 3, 32, 32), generator=generator, dtype=torch.uint8)
    expected = processor(list(images), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(teacher.prepare(images.float() / 255), expected, rtol=0, atol=1e-5)


def test_the_image_size_can_be_chosen_and_positions_are_interpolated(tmp_path):
    model = vit()
    teacher = load(save(tmp_path, model), teacher_image_size=48)
    pixels = teacher.prepare(torch.rand(2, 3, 32, 32))
    assert pixels.shape[-2:] == (48, 48)
    expected = model(pixels, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(teacher.logits(pixels), expected)
    assert teacher.features(pixels, [1])[0].grid == (6, 6)


def test_a_teacher_without_a_processor_takes_normalised_pixels_alone(pixels):
    teacher = Teacher(vit(), None, NAMES)
    assert teacher.logits(pixels).shape == (4, 3)
    with pytest.raises(TeacherMismatchError, match="'teacher_processor'"):
        teacher.prepare(pixels)


def test_the_final_norm_gives_the_features_of_dinov2(tmp_path, pixels):
    config = Dinov2Config(**SHAPE, out_indices=[1, 2, 3], apply_layernorm=True, reshape_hidden_states=True)
    backbone = Dinov2Backbone(config).eval()
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.3)
    model = Dinov2Model(Dinov2Config(**SHAPE))
    model.load_state_dict(backbone.state_dict())
    teacher = load(save(tmp_path, model), logits=False)
    with torch.no_grad():
        expected = backbone(pixels).feature_maps
    normed = teacher.features(pixels, [0, 1, 2], apply_norm=True)
    for found, one in zip(normed, expected, strict=True):
        assert found.grid == (4, 4)
        torch.testing.assert_close(found.patch_tokens, one.flatten(2).mT)
    raw = teacher.features(pixels, [0, 1, 2])
    assert all((a.tokens - b.tokens).abs().max() > 0.1 for a, b in zip(raw, normed, strict=True))


def test_a_block_is_normed_where_there_is_a_norm(pixels):
    model = vit()
    teacher = Teacher(model, PIXELS, NAMES)
    (last,) = teacher.features(pixels, [2])
    with torch.no_grad():
        expected = model.vit(pixels).last_hidden_state
    torch.testing.assert_close(teacher.normed(last).tokens, expected)
    resnet, _ = build_student(ModelArguments(architecture="resnet18_cifar_w16"), NAMES, (32, 32), [0.5] * 3, [0.2] * 3)
    teacher = Teacher(resnet, PIXELS)
    (last,) = teacher.features(pixels, [3])
    assert teacher.normed(last) is last


def test_a_layer_or_a_norm_that_does_not_exist_is_refused_with_its_key(pixels):
    with pytest.raises(TeacherMismatchError, match=r"key 'teacher_layers': .* has blocks 0 to 2, not 3"):
        Teacher(vit(), PIXELS).features(pixels, [3])
    model, _ = build_student(ModelArguments(architecture="resnet18_cifar_w16"), NAMES, (32, 32), [0.5] * 3, [0.2] * 3)
    with pytest.raises(TeacherMismatchError, match="key 'teacher_norm': expected a final norm, found none"):
        Teacher(model, PIXELS).features(pixels, [0], apply_norm=True)
