"""Every shipped recipe, built and trained for one step by its own command, on made-up images with stand-in weights."""

import json
import runpy
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image
from transformers import (
    BitImageProcessor,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    Dinov2Config,
    Dinov2Model,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    set_seed,
)

from hf_ihb.config.model import ModelArguments
from hf_ihb.config.recipe import parse_recipe
from hf_ihb.data import ImageSplit
from hf_ihb.models.student import build_student
from hf_ihb.trainer import SupervisedTrainer
from hf_ihb.trainer.arguments import SupervisedTrainingArguments
from tests.config.test_recipe import DISTILL, TRAIN

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
DIGITS = [str(n) for n in range(10)]
DINOV3 = ("facebook/dinov3-vits16-pretrain-lvd1689m", "facebook/dinov3-convnext-tiny-pretrain-lvd1689m")
TRAIN_FROM_LABELS = {"adaptive_cnn", "resnet18", "convnextv2", "mnist", "deit", "vit", "ce_only"}

# What was published, by run (batch is per GPU; SGD has Nesterov momentum 0.9).
_COLUMNS = (
    "num_train_epochs", "per_device_train_batch_size", "optim", "learning_rate", "weight_decay", "warmup_epochs",
    "min_lr", "swa_start", "swa_learning_rate", "early_stopping_patience", "early_stopping_threshold",
)  # fmt: skip
PUBLISHED_TRAINING = {
    "adaptive_cnn": (40, 2048, "sgd", 0.8, 5e-4, 5, 1e-5, 0.75, 5e-4, 15, 5e-4),
    "resnet18": (200, 512, "sgd", 0.1, 5e-4, 5, 1e-5, 0.75, 1e-3, 20, 1e-3),
    "convnextv2": (100, 512, "adamw", 1e-3, 0.05, 5, 1e-6, 0.75, 1e-4, 15, 1e-3),
    "mnist": (20, 4096, "adamw", 0.08, 5e-4, 2, 1e-5, 0.75, 5e-4, 20, 5e-4),
    "vit": (100, 1024, "adamw", 2e-3, 0.05, 10, 1e-5, None, None, None, 0.0),
    "kd_adaptive_cnn": (100, 4096, "adamw", 4e-3, 0.05, 10, 1e-5, None, None, 20, 5e-4),
    "kd_resnet18": (200, 1024, "adamw", 5e-4, 0.05, 10, 1e-6, 0.8, 1e-4, 20, 1e-3),
    "kd_convnextv2": (200, 1024, "adamw", 5e-4, 0.05, 10, 1e-6, 0.8, 1e-4, 20, 1e-3),
    "cka": (200, 512, "adamw", 5e-4, 0.05, 10, 1e-6, 0.8, 1e-4, 20, 1e-3),
    "gram": (200, 512, "adamw", 5e-4, 0.05, 10, 1e-6, 0.8, 1e-4, 20, 1e-3),
    "token_relation": (100, 512, "adamw", 1e-3, 0.05, 10, 1e-6, None, None, 20, 1e-3),
    "ce_only": (100, 256, "adamw", 1e-3, 0.05, 10, 1e-5, None, None, 20, 5e-4),
}
AUTO_AUGMENT = {"random_crop_padding": 4, "horizontal_flip": 0.5, "auto_augment": "autoaugment_cifar10"}
RANDAUGMENT = {
    "random_crop_padding": 4, "horizontal_flip": 0.5, "auto_augment": "randaugment", "randaugment_num_ops": 2,
    "randaugment_magnitude": 9, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.2,
}  # fmt: skip
CUTOUT = {"cutout_size": 16, "interpolation": "nearest"}
SMALL_STUDENT = {"mlp_ratio": 2.0, "conv_stem": True, "cls_token_dropout": 0.1}
SOFT = {
    "method": "logits", "distillation_type": "soft", "temperature": 4.0, "alpha": 0.5, "alpha_schedule": "constant",
    "distillation_warmup_epochs": 5, "distillation_warmup_type": "step", "distilled_heads": "distillation",
    "teacher_logits_view": "identical",
}  # fmt: skip
DINO = {
    "method": "structural", "teacher_model": "facebook/dinov2-small", "teacher_image_size": 224, "teacher_norm": True,
    "teacher_normalization": "dataset", "teacher_projector": "trainable", "teacher_view": "clean", "task_heads": "cls",
    "relation_warmup_epochs": 10, "relation_include_self": True, "relation_temperature": 0.1, "mixup_alpha": 0.0,
    "cutmix_alpha": 0.0, "label_smoothing_factor": 0.1, "distillation_warmup_type": "step", "center_positions": False,
}  # fmt: skip
FOUR_LAYERS = {"student_layers": [3, 6, 9, 11], "teacher_layers": [3, 6, 9, 11], "token_weight": 0.5}
PUBLISHED_METHOD = {
    "adaptive_cnn": {**AUTO_AUGMENT, **CUTOUT, "cutmix_alpha": 1.0, "mix_probability": 1.0},
    "resnet18": {**AUTO_AUGMENT, **CUTOUT, "cutmix_alpha": 1.0, "mix_probability": 1.0},
    "convnextv2": {**AUTO_AUGMENT, **CUTOUT, "cutmix_alpha": 1.0, "drop_path_rate": 0.1},
    "mnist": {"rotation_degrees": 10, "translate_fraction": 0.1, "cutout_size": 8, "label_smoothing_factor": 0.1},
    "vit": {
        **RANDAUGMENT, **CUTOUT, **SMALL_STUDENT, "mixup_alpha": 0.8, "mix_probability": 1.0, "inference_head": "cls",
    },
    "kd_adaptive_cnn": {
        **RANDAUGMENT, **CUTOUT, **SMALL_STUDENT, "mixup_alpha": 0.8, "distillation_type": "hard", "alpha": 0.6,
        "alpha_start": 0.0, "alpha_schedule": "cosine", "distillation_warmup_epochs": 5, "temperature": 3.0,
    },
    "kd_resnet18": {**AUTO_AUGMENT, **CUTOUT, **SOFT, "cutmix_alpha": 1.0, "mix_probability": 1.0, "mlp_ratio": 4},
    "kd_convnextv2": {**AUTO_AUGMENT, **CUTOUT, **SOFT, "cutmix_alpha": 1.0, "mix_probability": 1.0, "mlp_ratio": 4},
    "cka": {
        **AUTO_AUGMENT, **CUTOUT, **DINO, **FOUR_LAYERS, "relation_weight": 0.05, "cka_weight": 0.5,
        "cka_warmup_epochs": 5, "cka_scope": "tokens", "cka_estimator": "published", "gram_weight": 0.0,
    },
    "gram": {
        **AUTO_AUGMENT, **CUTOUT, **DINO, **FOUR_LAYERS, "relation_weight": 0.05, "gram_weight": 0.5,
        "gram_normalization": "published", "cka_weight": 0.0,
    },
    "token_relation": {
        **AUTO_AUGMENT, **CUTOUT, **DINO, **SMALL_STUDENT, "student_layers": [6, 11], "teacher_layers": [6, 11],
        "token_weight": 1.0, "relation_weight": 0.1, "cka_weight": 0.0, "gram_weight": 0.0,
    },
    "ce_only": {**RANDAUGMENT, **CUTOUT, **SMALL_STUDENT, "mixup_alpha": 0.8, "mix_probability": 1.0},
}  # fmt: skip
EVERY_PUBLISHED_RUN = {"weight_decay_scope": "all", "selection_split": "test", "max_grad_norm": 1.0, "ema_decay": 0.0}


def recipe_of(path):
    return json.loads(path.read_text("utf-8"))


def parsed(path):
    """Every key of a recipe with its value, defaults included."""
    classes = DISTILL.get(recipe_of(path).get("method"), TRAIN)
    instances = parse_recipe([str(path)], *classes)
    return {f.name: getattr(instance, f.name) for instance in instances for f in fields(instance)}


def names(folder):
    return {path.stem for path in folder.glob("*.json")}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Image folders under the names the recipes use; each class has a colour of its own."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    shapes = {"uoft-cs/cifar10": (CIFAR10, (32, 32, 3)), "ylecun/mnist": (DIGITS, (28, 28))}
    for name, (classes, shape) in shapes.items():
        for split, count in (("train", 4), ("test", 1)):
            for label, class_name in enumerate(classes):
                folder = root / name / split / class_name
                folder.mkdir(parents=True)
                for i in range(count):
                    pixels = rng.integers(0, 60, shape) + 18 * label
                    Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Narrow models of the architectures that recipes start from or learn from."""
    root = tmp_path_factory.mktemp("weights")
    set_seed(0)
    labels = torch.arange(40) % 10
    colours = (torch.randint(0, 60, (40, 3, 32, 32)) + 18 * labels[:, None, None, None]).to(torch.uint8)
    split = ImageSplit(colours, labels, CIFAR10)
    model_args = ModelArguments(architecture="resnet18_cifar_w16")
    model, processor = build_student(model_args, CIFAR10, (32, 32), [0.5] * 3, [0.25] * 3)
    args = SupervisedTrainingArguments(
        str(root / "cnn"), max_steps=30, per_device_train_batch_size=20, learning_rate=3e-3, report_to="none",
        save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = SupervisedTrainer(model, args, train_dataset=split, processing_class=processor)
    trainer.train()
    trainer.save_model()

    convnext = ConvNextV2Config(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], image_size=224)
    ConvNextV2ForImageClassification(convnext).save_pretrained(root / "facebook/convnextv2-tiny-1k-224")
    dino = Dinov2Config(hidden_size=16, num_hidden_layers=12, num_attention_heads=2, mlp_ratio=1, image_size=518)
    Dinov2Model(dino).save_pretrained(root / "facebook/dinov2-small")
    small = {"hidden_size": 16, "num_hidden_layers": 12, "num_attention_heads": 2, "intermediate_size": 16}
    dinov3 = DINOv3ViTConfig(**small, image_size=224, num_register_tokens=4)
    DINOv3ViTModel(dinov3).save_pretrained(root / DINOV3[0])
    dinov3 = DINOv3ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], image_size=224)
    DINOv3ConvNextModel(dinov3).save_pretrained(root / DINOV3[1])
    processor = BitImageProcessor(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    for name in ("facebook/convnextv2-tiny-1k-224", "facebook/dinov2-small", *DINOV3):
        processor.save_pretrained(root / name)
    return root


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.json")), ids=lambda p: "-".join(p.parts[-2:]))
def test_every_recipe_trains_one_step_and_evaluates_what_it_saves(path, images, weights, tmp_path, monkeypatch):
    recipe = recipe_of(path)
    script = "distill.py" if "method" in recipe else "train.py"
    overrides = {
        "output_dir": str(tmp_path / "run"), "max_steps": 1, "per_device_train_batch_size": 4, "use_cpu": "true",
        "per_device_eval_batch_size": 10, "disable_tqdm": "true", "logging_steps": 1,
        "analyses_after_training": "none",
    }  # fmt: skip
    if recipe["dataset_name"] != "sklearn:digits":
        overrides["dataset_name"] = str(images / recipe["dataset_name"])
        if recipe.get("selection_split") != "test":
            overrides["validation_fraction"] = 0.25
    else:
        overrides |= {"max_train_samples": 100, "max_eval_samples": 20}
    if "teacher_model" in recipe:
        of_digits = recipe["dataset_name"] == "sklearn:digits"
        local = weights / recipe["teacher_model"]
        overrides["teacher_model"] = str(local if local.exists() else weights / "cnn")
        if of_digits:  # the stand-in knows other classes and pixels
            overrides |= {"teacher_assume_same_label_order": "true", "teacher_control": "untrained"}
    argv_of_teachers = []
    if "teacher_models" in recipe:
        places = [weights / entry["teacher_model"] for entry in recipe["teacher_models"]]
        local = [str(place if place.exists() else weights / "cnn") for place in places]
        entries = zip(recipe["teacher_models"], local, strict=True)
        argv_of_teachers = ["--teacher_models", *(json.dumps(entry | {"teacher_model": x}) for entry, x in entries)]
    if "model_name_or_path" in recipe:
        overrides["model_name_or_path"] = str(weights / recipe["model_name_or_path"])
    argv = [script, str(path), *(str(word) for key, value in overrides.items() for word in (f"--{key}", value))]
    argv += argv_of_teachers
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", argv)
    runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")

    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    history = json.loads((tmp_path / "run" / "training_history.json").read_text())
    assert evaluation["train_steps"] == 1
    assert 0 <= evaluation["test"]["accuracy"] <= 1
    assert next(entry["loss"] for entry in history if "loss" in entry) > 0
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [
        ("adaptive_cnn", 17_629_514),
        ("resnet18", 11_173_962),
        ("convnextv2", 27_870_730),
        ("mnist", 709_034),
        ("deit", 5_365_076),
        ("ce_only", 5_365_076),
        ("cka", 5_365_076),
        ("paper/kd_adaptive_cnn", 4_340_660),
        ("paper/cka", 5_365_076),
    ],
)
def test_the_models_have_the_studys_sizes(recipe, parameters):
    keys = recipe_of(RECIPES / f"{recipe}.json")
    known = ModelArguments.__dataclass_fields__
    args = ModelArguments(**{k: v for k, v in keys.items() if k in known and k != "model_name_or_path"})
    channels = 1 if keys.get("color_mode") == "grayscale" else 3
    size = (28, 28) if channels == 1 else (32, 32)
    model, _ = build_student(args, CIFAR10, size, [0.5] * channels, [0.25] * channels)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_every_published_run_has_a_recipe():
    assert names(RECIPES / "paper") == PUBLISHED_TRAINING.keys() == PUBLISHED_METHOD.keys()


@pytest.mark.parametrize("name", PUBLISHED_TRAINING)
def test_a_paper_recipe_has_the_published_hyper_parameters(name):
    found = parsed(RECIPES / "paper" / f"{name}.json")
    expected = dict(zip(_COLUMNS, PUBLISHED_TRAINING[name], strict=True))
    warmup, min_lr, optim = expected.pop("warmup_epochs"), expected.pop("min_lr"), expected.pop("optim")
    assert found["warmup_steps"] * found["num_train_epochs"] == pytest.approx(warmup)
    assert found["lr_scheduler_type"] == "cosine_with_min_lr"
    assert found["lr_scheduler_kwargs"] == {"min_lr": min_lr}
    assert found["optim"].startswith(optim)
    assert found["optim_args"] == ("momentum=0.9,nesterov=true" if optim == "sgd" else None)
    expected |= PUBLISHED_METHOD[name] | EVERY_PUBLISHED_RUN
    assert {key: found[key] for key in expected} == expected


TEACHER_KEYS = {"method", "alpha", "temperature", "distilled_heads"}


@pytest.mark.parametrize("folder", [RECIPES, RECIPES / "micro"], ids=["full", "micro"])
def test_every_student_differs_from_its_control_only_in_what_the_teacher_needs(folder):
    control = recipe_of(folder / "ce_only.json")
    students = [folder / f"{name}.json" for name in ("kd_adaptive_cnn", "kd_resnet18", "kd_convnextv2", "cka", "gram")]
    for name in students + (sorted((RECIPES / "teachers").glob("*.json")) if folder == RECIPES else []):
        keys = recipe_of(name)
        extra = keys.keys() - control.keys()
        assert {k: keys[k] for k in control} == control, name
        prefixes = ("teacher_", "cka_", "gram_", "feature_mse_", "student_layers", "center_positions")
        assert all(k in TEACHER_KEYS or k.startswith(prefixes) for k in extra), extra


def test_every_recipe_has_a_twin_for_two_cores():
    assert names(RECIPES) == names(RECIPES / "micro")
    for name in names(RECIPES):
        full, small = recipe_of(RECIPES / f"{name}.json"), recipe_of(RECIPES / "micro" / f"{name}.json")
        assert full.get("method") == small.get("method")
        assert full["dataset_name"] == small["dataset_name"]


def test_a_recipe_is_for_the_script_its_name_says():
    for path in RECIPES.glob("*.json"):
        assert (path.stem in TRAIN_FROM_LABELS) == ("method" not in recipe_of(path))


def test_no_recipe_sets_precision_or_compiling():
    for path in RECIPES.rglob("*.json"):
        assert not recipe_of(path).keys() & {"bf16", "fp16", "tf32", "torch_compile", "torch_compile_backend"}, path


@pytest.mark.parametrize(
    ("name", "kind", "processes"),
    [
        ("one_device", "NO", 1),
        ("ddp", "MULTI_GPU", 8),
        ("fsdp2", "FSDP", 8),
        ("deepspeed_zero2", "DEEPSPEED", 8),
        ("several_machines", "MULTI_GPU", 16),
    ],
)
def test_launch_configs_are_what_accelerate_reads(name, kind, processes):
    config = load_config_from_file(str(RECIPES / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type.value == kind
    assert config.num_processes == processes
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == 2
    assert config.num_machines == (2 if name == "several_machines" else 1)
