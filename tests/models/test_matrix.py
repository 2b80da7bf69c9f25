"""Any teacher: every family against what its author knows of it, in the quick form of `benchmarks/matrix.py`."""

import json

import pytest
import timm
import torch
import torchvision
from transformers import Siglip2VisionConfig, Siglip2VisionModel, SwinBackbone, SwinConfig, ViTImageProcessor

from benchmarks import matrix_training as training
from benchmarks.families import FAMILIES, MEAN, STD, STUDENTS, TIMM, TRANSFORMERS
from benchmarks.matrix_checks import CHECKS, Case
from hf_ihb.config.model import ModelArguments, TeacherArguments
from hf_ihb.errors import ModelLoadError, RecipeError, TeacherMismatchError
from hf_ihb.models.adapter import teacher_from_module
from hf_ihb.models.features import extract_features, layout_of
from hf_ihb.models.processing import PixelFormat, student_processor
from hf_ihb.models.student import build_student
from hf_ihb.models.teacher import Teacher, load_teacher

# Those of which there is nothing small: in the table alone.
LARGE = (
    "mvitv2", "volo", "dpn", "mlp_mixer", "regnet", "ghostnet", "mobilenetv3", "efficientvit", "edgenext", "mobilevit",
    "starnet", "mambaout",
)  # fmt: skip
QUICK = [name for name in FAMILIES if name not in [f"timm/{large}" for large in LARGE]]


def test_there_are_as_many_families_as_promised():
    assert len(TRANSFORMERS) >= 30
    assert len(TIMM) >= 25
    assert len(STUDENTS) >= 15
    assert len(QUICK) >= 30 + 25


@pytest.mark.parametrize("name", QUICK)
def test_a_family_as_a_teacher(name, tmp_path):
    case = Case(FAMILIES[name], tmp_path)
    for check in CHECKS.values():
        check(case)


@pytest.mark.parametrize("name", ["hiera", "clip"])
def test_a_deit_learns_from_a_family_cached_as_live(name, tmp_path):
    training.structural_teacher(Case(TRANSFORMERS[name], tmp_path / "teacher").teacher, tmp_path)


@pytest.mark.parametrize("name", ["poolformer", "clip-classifier"])
def test_a_family_as_a_student(name, tmp_path):
    family, dinov2 = TRANSFORMERS[name], Case(FAMILIES["transformers/dinov2"], tmp_path).teacher
    training.gradients(family, dinov2, tmp_path / "gradients")
    training.reload(family, dinov2, tmp_path / "reload")
    training.resume(family, dinov2, tmp_path / "resume")


def test_a_student_that_holds_a_module_at_two_places_is_saved_plain(tmp_path):
    dinov2 = Case(FAMILIES["transformers/dinov2"], tmp_path).teacher
    training.reload(FAMILIES["timm/coat-lite"], dinov2, tmp_path / "reload")


# ---- Errors: one line that names the model and the key ----


def load(folder, logits=True, **keys):
    names = [f"LABEL_{i}" for i in range(5)]
    return load_teacher(TeacherArguments(teacher_model=str(folder), **keys), names, needs_logits=logits)


def test_a_repo_of_two_towers_is_no_classifier(tmp_path):
    FAMILIES["transformers/clip"].build().save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="expected a classifier, found CLIPModel"):
        load(tmp_path)


def test_a_norm_below_the_last_stage_is_refused_with_the_widths(tmp_path):
    teacher = Case(FAMILIES["transformers/swin"], tmp_path).teacher
    pixels = torch.zeros(1, 3, 32, 32)
    with pytest.raises(TeacherMismatchError, match=r"key 'teacher_norm': .* of width 32 alone, where block 0 has 16"):
        teacher.features(pixels, [0], apply_norm=True)
    below = teacher.features(pixels, [0])[0]
    assert teacher.normed(below) is below


def test_channels_other_than_one_or_three_are_refused_and_one_mean_stands_for_all(tmp_path):
    four = TRANSFORMERS["vit"]._replace(options=TRANSFORMERS["vit"].options | {"num_channels": 4})
    with pytest.raises(TeacherMismatchError, match=r"expected a model of 1 or 3 channels .* found 4 channels"):
        Case(four, tmp_path / "four")
    grey = TRANSFORMERS["vit"]._replace(options=TRANSFORMERS["vit"].options | {"num_channels": 1})
    for channels, family in ((1, grey), (3, TRANSFORMERS["vit"])):
        family.build().save_pretrained(tmp_path)
        student_processor([0.5], [0.25], (32, 32)).save_pretrained(tmp_path)
        teacher = load(tmp_path)
        assert teacher.pixels.mean == (0.5,) * channels
        assert teacher.logits(teacher.prepare(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))).shape == (2, 5)


def with_moments(folder, moments, **keys):
    TRANSFORMERS["vit"].build().save_pretrained(folder)
    student_processor(MEAN, STD, (32, 32)).save_pretrained(folder)
    said = folder / "preprocessor_config.json"
    written = json.loads(said.read_text()) | {"image_mean": moments, "image_std": moments, **keys}
    said.write_text(json.dumps(written))


@pytest.mark.parametrize(("moments", "normalises"), [(None, False), (0.5, True)])
def test_a_mean_that_is_null_or_a_number_is_what_the_processor_makes_of_it(moments, normalises, tmp_path, generator):
    with_moments(tmp_path, moments, do_normalize=normalises)
    stored = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=generator)
    shown = ViTImageProcessor.from_pretrained(tmp_path)(stored, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(load(tmp_path).prepare(stored), shown)


def test_a_null_mean_of_a_processor_that_normalises_is_one_line(tmp_path):
    with_moments(tmp_path, None)
    with pytest.raises(ModelLoadError, match=r"image_mean[^\n]*$"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_layers_of_a_repo_of_two_towers_are_those_of_its_vision_tower(name, tmp_path):
    family = TRANSFORMERS[name]
    whole = family.build()
    whole.save_pretrained(tmp_path)
    student_processor(MEAN, STD, (32, 32)).save_pretrained(tmp_path)
    teacher = load(tmp_path, logits=False)
    pixels, seen = torch.randn(2, 3, 32, 32), []
    for layer in whole.vision_model.encoder.layers:
        layer.register_forward_hook(lambda m, a, output: seen.append(output))
    with torch.no_grad():
        whole.get_image_features(pixel_values=pixels)
    for found, expected in zip(teacher.features(pixels, [-1, -2]), reversed(seen[-2:]), strict=True):
        torch.testing.assert_close(found.tokens, expected)


def test_a_timm_teacher_sees_images_of_another_size_as_timm_makes_it(tmp_path):
    for name, key in (("vision_transformer", "blocks"), ("swin_transformer", "layers"), ("eva", "blocks")):
        case = Case(TIMM[name], tmp_path / name)
        teacher = load(tmp_path / name, teacher_image_size=96 if name != "eva" else 84)
        size = teacher.pixels.size
        pixels = torch.randn(2, 3, *size)
        network = timm.create_model(TIMM[name].made_of, num_classes=5, **TIMM[name].options).eval()
        network.load_state_dict(case.model.timm_model.state_dict())
        network.set_input_size(img_size=size)
        torch.testing.assert_close(teacher.logits(pixels), network(pixels), msg=f"{name} {key}")


def test_a_timm_teacher_of_one_size_alone_says_so(tmp_path):
    Case(TIMM["visformer"], tmp_path)
    with pytest.raises(
        TeacherMismatchError, match="key 'teacher_image_size': Visformer of timm takes images of one size"
    ):
        load(tmp_path, teacher_image_size=96)


def test_patches_of_a_size_that_does_not_divide_the_images_are_one_line():
    config = Siglip2VisionConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=24, patch_size=8, num_patches=16
    )
    with pytest.raises(TeacherMismatchError, match="expected images whose sides are multiples of 8 px, found"):
        Teacher(Siglip2VisionModel(config), PixelFormat((0.5,) * 3, (0.5,) * 3, (30, 30)))


# ---- Students of timm ----

TIMM_STUDENTS = [
    "vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "levit_128s", "mixer_s32_224",
    "swin_tiny_patch4_window7_224",
]  # fmt: skip


@pytest.mark.parametrize("name", TIMM_STUDENTS)
def test_a_timm_student_is_made_for_the_images_it_gets(name, tmp_path):
    names = ["a", "b"]
    student, _ = build_student(ModelArguments(architecture=name), names, (32, 32), MEAN, STD)
    pixels = torch.randn(2, 3, 32, 32)
    student.eval().save_pretrained(tmp_path)
    plain = type(student).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(plain(pixels).logits, student(pixels).logits)


def test_a_timm_student_that_cannot_be_made_is_refused_with_its_key():
    for name in ("densenet121", "vgg11"):
        asked = ModelArguments(architecture=name, drop_path_rate=0.1)
        with pytest.raises(RecipeError, match=f"key 'drop_path_rate': expected 0 for {name}, which has none, found"):
            build_student(asked, ["a", "b"], (32, 32), MEAN, STD)
    with pytest.raises(
        RecipeError, match=r"keys 'architecture' and 'image_size': .* takes 8 x 8 px, found inception_v3"
    ):
        build_student(ModelArguments(architecture="inception_v3"), ["a", "b"], (8, 8), MEAN, STD)


# ---- Models from Python ----


@torch.no_grad()
def test_a_model_of_torchvision_and_one_of_timm_are_teachers():
    pixels = torch.randn(2, 3, 64, 64)
    blocks = ["layer1", "layer2", "layer3", "layer4"]
    for network, names in ((torchvision.models.resnet18(), blocks), (timm.create_model("test_resnet"), None)):
        seen = []
        for path in blocks:
            network.get_submodule(path).register_forward_hook(lambda m, a, output, seen=seen: seen.append(output))
        teacher = teacher_from_module(
            network, mean=MEAN, std=STD, size=(64, 64), blocks=names, label_names=[str(i) for i in range(1000)]
        )
        assert seen == []  # whoever watches a model does not see how it is looked at
        maps = teacher.features(pixels, [0, 1, 2, -1])
        for found, expected in zip(maps, seen, strict=True):
            assert torch.equal(found.tokens, expected.flatten(2).mT)
        assert torch.equal(teacher.logits(pixels), network(pixels))


def test_a_module_without_names_of_blocks_is_refused():
    network = torchvision.models.resnet18()
    with pytest.raises(TeacherMismatchError, match="expected names of its blocks, found none"):
        teacher_from_module(network, mean=MEAN, std=STD)
    with pytest.raises(TeacherMismatchError, match=r"expected names of its modules \(conv1, .* found 'layer9'"):
        teacher_from_module(network, mean=MEAN, std=STD, blocks=["layer9"])


@torch.no_grad()
def test_stage_0_of_coat_can_be_reached():
    """Transformers' wrapper cannot save one, whose weights are shared."""
    options = {"embed_dims": [16] * 4, "serial_depths": [1] * 4, "parallel_depth": 1, "img_size": 64}
    network = timm.create_model("coat_tiny", num_classes=5, **options)
    teacher = teacher_from_module(network, mean=MEAN, std=STD, size=(64, 64))
    assert [m.grid for m in teacher.features(torch.randn(1, 3, 64, 64), range(4))] == [(16, 16), (8, 8), (4, 4), (2, 2)]


def test_a_backbone_is_the_same_from_python_and_from_its_folder(tmp_path):
    case = Case(FAMILIES["transformers/swin-backbone"], tmp_path)
    backbone = SwinBackbone(SwinConfig(**case.family.options)).eval()
    backbone.load_state_dict(case.model.state_dict())
    _, maps = extract_features(backbone, case.pixels, None)
    for one, other in zip(maps, case.teacher.features(case.pixels, [0, 1, 2]), strict=True):
        torch.testing.assert_close(one.tokens, other.tokens)
    assert layout_of(backbone).blocks == case.layout.blocks
