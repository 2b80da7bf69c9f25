"""Is the number on the card what `pipeline` gives? Image by image, for students of many families.

python benchmarks/card_is_pipeline.py [--images 200] [--results benchmarks/results]

Made-up photographs, PNG and JPEG, of many sizes, none of them square, one in five turned by EXIF. Students are trained
for a few steps: from scratch, from small random weights as a recipe does (they are saved with an image processor of
whole images), and from Python with the weights' own image processor, which crops, rescales otherwise, turns channels
around or does not resize. Three decisions are taken for each test image: that of the run (what its card says), that of
`evaluate_model` on the saved folder, and that of `transformers.pipeline` in a plain loop over the files. The last
column says what is at stake: how many would be others if mean, deviation and size were all that was read of the image
processor.
"""

import argparse
import datetime
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import (
    AutoImageProcessor,
    BeitConfig,
    BeitForImageClassification,
    BeitImageProcessor,
    BitImageProcessor,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTImageProcessor,
    Dinov2Config,
    Dinov2ForImageClassification,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    EfficientNetImageProcessor,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    MobileNetV2ImageProcessor,
    MobileViTConfig,
    MobileViTForImageClassification,
    MobileViTImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    SegformerConfig,
    SegformerForImageClassification,
    SegformerImageProcessor,
    SwinConfig,
    SwinForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTImageProcessor,
    pipeline,
    set_seed,
)
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.data import DataArguments
from hf_ihb.config.model import ModelArguments
from hf_ihb.config.recipe import parse_recipe
from hf_ihb.config.run import RunArguments
from hf_ihb.data import ImageData, load_image_split, open_image_data
from hf_ihb.evaluation import evaluate_model
from hf_ihb.models.pretrained import load_pretrained
from hf_ihb.models.processing import PixelFormat, pixel_format
from hf_ihb.models.student import build_student
from hf_ihb.run import run_training
from hf_ihb.runs.environment import environment
from hf_ihb.runs.files import write_json
from hf_ihb.runs.tables import markdown_table
from hf_ihb.trainer import SupervisedTrainer
from hf_ihb.trainer.arguments import SupervisedTrainingArguments

CLASSES = ("amber", "birch", "cedar", "dune")
ARGUMENTS = (RunArguments, DataArguments, AugmentationArguments, ModelArguments, SupervisedTrainingArguments)
SIDE = {"height": 32, "width": 32}
EDGE, WIDER = {"shortest_edge": 32}, {"shortest_edge": 40}
SMALL_VIT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
LABELS = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}

SCRATCH: dict[str, dict[str, Any]] = {
    "deit": {"architecture": "deit", "hidden_size": 24, "num_hidden_layers": 2},
    "deit_cls": {"architecture": "deit_cls", "hidden_size": 24, "num_hidden_layers": 2},
    "vit": {"architecture": "vit", "hidden_size": 24, "num_hidden_layers": 2},
    "adaptive_cnn": {"architecture": "adaptive_cnn", "hidden_sizes": [8, 16], "depths": [1, 1]},
    "convnextv2": {"architecture": "convnextv2", "hidden_sizes": [8, 16, 24], "depths": [1, 1, 1]},
    "resnet18_cifar_w16 (timm)": {"architecture": "resnet18_cifar_w16"},
    "mobilenetv3_small_050 (timm)": {"architecture": "mobilenetv3_small_050"},
}


def _timm() -> tuple[Any, Any]:
    config = TimmWrapperConfig(
        architecture="resnet18_cifar_w16",
        pretrained_cfg={
            "input_size": [3, 32, 32],
            "mean": [0.5] * 3,
            "std": [0.25] * 3,
            "interpolation": "bilinear",
            "crop_pct": 0.875,
        },
        **LABELS,
    )
    return TimmWrapperForImageClassification(config), TimmWrapperImageProcessor(config.pretrained_cfg)


# Family -> what is special about its image processor, and the model with it.
WEIGHTS: dict[str, tuple[str, Callable[[], tuple[Any, Any]]]] = {
    "DeiT": (
        "resizes to 36 x 36, crops 32 x 32",
        lambda: (
            DeiTForImageClassification(DeiTConfig(image_size=32, patch_size=8, **SMALL_VIT, **LABELS)),
            DeiTImageProcessor(size={"height": 36, "width": 36}, crop_size=SIDE),
        ),
    ),
    "ConvNeXt": (
        "shorter edge to 36, crops 32 x 32 (crop_pct 7/8)",
        lambda: (
            ConvNextForImageClassification(ConvNextConfig(**STAGES, **LABELS)),
            ConvNextImageProcessor(size=EDGE, crop_pct=0.875),
        ),
    ),
    "EfficientNet": (
        "levels in [-1, 1] by rescale_offset, normalised twice (include_top); config says 600 px",
        lambda: (
            EfficientNetForImageClassification(
                EfficientNetConfig(
                    width_coefficient=0.15, depth_coefficient=0.1, hidden_dim=192, initializer_range=0.3, **LABELS
                )
            ),
            EfficientNetImageProcessor(size=SIDE, rescale_factor=1 / 127.5, rescale_offset=True, include_top=True),
        ),
    ),
    "MobileViT": (
        "BGR, shorter edge to 40, crops 32 x 32",
        lambda: (
            MobileViTForImageClassification(
                MobileViTConfig(
                    image_size=32,
                    hidden_sizes=[16, 24, 32],
                    neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
                    initializer_range=0.5,
                    **LABELS,
                )
            ),
            MobileViTImageProcessor(size=WIDER, crop_size=SIDE),
        ),
    ),
    "MobileNetV2": (
        "does not resize, crops 24 x 24; config says 224 px",
        lambda: (
            MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.25, **LABELS)),
            MobileNetV2ImageProcessor(do_resize=False, crop_size={"height": 24, "width": 24}),
        ),
    ),
    "Swin": (
        "levels from 0 to 255 (do_rescale false), bicubic",
        lambda: (
            SwinForImageClassification(
                SwinConfig(
                    image_size=32,
                    patch_size=2,
                    embed_dim=8,
                    depths=[1, 1],
                    num_heads=[1, 2],
                    window_size=4,
                    drop_path_rate=0.0,
                    **LABELS,
                )
            ),
            ViTImageProcessor(size=SIDE, do_rescale=False, image_mean=[127.0] * 3, image_std=[64.0] * 3, resample=3),
        ),
    ),
    "Segformer": (
        "bilinear, rescale_factor 1/127.5",
        lambda: (
            SegformerForImageClassification(
                SegformerConfig(
                    hidden_sizes=[8, 16, 16, 32],
                    depths=[1, 1, 1, 1],
                    num_attention_heads=[1, 1, 2, 2],
                    decoder_hidden_size=32,
                    **LABELS,
                )
            ),
            SegformerImageProcessor(size=SIDE, rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[0.5] * 3),
        ),
    ),
    "DINOv2": (
        "shorter edge to 40, crops 32 x 32; config says 28 px",
        lambda: (
            Dinov2ForImageClassification(
                Dinov2Config(
                    image_size=28, patch_size=4, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, **LABELS
                )
            ),
            BitImageProcessor(size=WIDER, crop_size=SIDE),
        ),
    ),
    "ResNet": (
        "shorter edge to 40, crops 32 x 32 (crop_pct 4/5)",
        lambda: (
            ResNetForImageClassification(ResNetConfig(embedding_size=8, layer_type="basic", **STAGES, **LABELS)),
            ConvNextImageProcessor(size=EDGE, crop_pct=0.8),
        ),
    ),
    "BEiT": (
        "not normalised, crops 32 x 32 out of 44 x 44",
        lambda: (
            BeitForImageClassification(BeitConfig(image_size=32, patch_size=8, **SMALL_VIT, **LABELS)),
            BeitImageProcessor(
                size={"height": 44, "width": 44}, do_center_crop=True, crop_size=SIDE, do_normalize=False
            ),
        ),
    ),
    "ResNet-18 (timm)": ("timm: shorter edge to 36 in Pillow, crops 32 x 32 (crop_pct 7/8)", _timm),
}


# ---- Images ----


def make_images(folder: Path, *, train: int, test: int, turned: bool = True, seed: int = 0) -> list[Path]:
    """An image folder of made-up photographs; returns the test files in the order that `datasets` has them."""
    generator = np.random.default_rng(seed)
    for split, count in (("train", train), ("test", test)):
        for i in range(count):
            label = i % len(CLASSES)
            path = folder / split / CLASSES[label] / f"{i:04d}.{'jpg' if generator.random() < 0.5 else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image, exif = _picture(label, generator), Image.Exif()
            if turned and i % 5 == 0:
                exif[0x0112] = int(generator.integers(2, 9))
            image.save(path, exif=exif, **({"quality": 90} if path.suffix == ".jpg" else {}))
    return sorted((folder / "test").glob("*/*"))


def _picture(label: int, generator: np.random.Generator) -> Image.Image:
    """A tint and a disc that say the class, weakly, where a crop may miss it; noise, and a shape of its own."""
    height, width = (int(side) for side in generator.integers(26, 50, 2))
    width += 7 * (height == width)
    tint = 110 + 35 * np.array([label & 1, 0.3, label >> 1]) + generator.normal(0, 22, 3)
    image = Image.fromarray((tint + generator.normal(0, 30, (height, width, 3))).clip(0, 255).astype(np.uint8))
    x, y = (float(generator.uniform(0, side)) for side in (width, height))
    radius, other = float(generator.uniform(3, 9)), 60 + 120 * np.array([label >> 1, label & 1, 0.5])
    box = (x - radius, y - radius, x + radius, y + radius)
    ImageDraw.Draw(image).ellipse(box, fill=tuple(int(level) for level in other))
    return image


# ---- Students ----


def train(folder: Path, recipe: dict[str, Any], weights: tuple[Any, Any] | None = None) -> tuple[Any, ImageData]:
    """Trains as `scripts/train.py` does; `weights` are a model and the image processor a user has chosen for it."""
    path = folder.with_suffix(".json")
    write_json(path, recipe | {"output_dir": str(folder), "analyses_after_training": "none"})
    parsed = parse_recipe([str(path)], *ARGUMENTS, description="")
    _, data_args, augmentation, model_args, args = parsed
    set_seed(args.seed)
    source = open_image_data(data_args)
    names, size = source.label_names, source.train.image_size
    model, processor = weights or build_student(model_args, names, size, *source.train.statistics())
    data = source.decoded(pixel_format(processor).geometry)
    trainer = SupervisedTrainer(
        model,
        args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=processor,
        augmentation=augmentation,
    )
    run_training(trainer, data, path, parsed)
    return trainer, data


def of_the_run(trainer: Any, data: ImageData) -> np.ndarray:
    """``(N, K)`` logits of the run's evaluation; they are those its records were made of."""
    logits = trainer.predict(data.test).predictions
    recorded = json.loads((Path(trainer.args.output_dir) / "evaluation.json").read_text())["test"]["accuracy"]
    if abs(float((logits.argmax(1) == data.test.labels.numpy()).mean()) - recorded) > 1e-6:
        raise AssertionError(f"predictions are not those of evaluation.json ({recorded})")
    return logits


def of_evaluate_model(folder: Path, dataset: Path, *, plain: bool = False) -> np.ndarray:
    """``(N, K)`` logits that `evaluate_model` judges; `plain` with mean, deviation and size of the processor alone."""
    model = load_pretrained(str(folder))
    model = model._replace(pixels=_plain(folder, model.pixels.size)) if plain else model
    split, _ = load_image_split(_data_arguments(dataset), "test", model.pixels.geometry)
    found: list[torch.Tensor] = []
    handle = model.model.register_forward_hook(lambda module, inputs, outputs: found.append(outputs.logits))
    results = evaluate_model(model, split)
    handle.remove()
    logits = torch.cat(found).numpy()
    judged = next(iter(results["heads"].values()))["accuracy"]
    if abs(float((logits.argmax(1) == split.labels.numpy()).mean()) - judged) > 1e-6:
        raise AssertionError(f"logits are not those that were judged ({judged})")
    return logits


def _plain(folder: Path, size: tuple[int, int]) -> PixelFormat:
    processor = AutoImageProcessor.from_pretrained(folder)
    written = getattr(processor, "data_config", None) or {
        "mean": processor.image_mean if processor.do_normalize else [0.0] * 3,
        "std": processor.image_std if processor.do_normalize else [1.0] * 3,
    }
    return PixelFormat(tuple(written["mean"]), tuple(written["std"]), size)


def of_the_pipeline(folder: Path, files: list[Path]) -> np.ndarray:
    """``(N, K)`` logits of `pipeline`, a file at a time."""
    classifier = pipeline("image-classification", model=str(folder), device="cpu")
    order = {name: i for i, name in enumerate(CLASSES)}
    logits = np.zeros((len(files), len(CLASSES)), np.float32)
    for row, path in zip(logits, files, strict=True):
        for answer in classifier(str(path), function_to_apply="none", top_k=len(CLASSES)):
            row[order[answer["label"]]] = answer["score"]
    return logits


def compare(trainer: Any, data: ImageData, dataset: Path, files: list[Path]) -> dict[str, Any]:
    """Decisions of the three, and how far their logits are apart."""
    folder = Path(trainer.args.output_dir)
    card, measured, plain = (
        of_the_run(trainer, data),
        of_evaluate_model(folder, dataset),
        of_the_pipeline(folder, files),
    )
    misread = of_evaluate_model(folder, dataset, plain=True)
    labels = data.test.labels.numpy()
    decisions = [logits.argmax(1) for logits in (card, measured, plain, misread)]
    return {
        "accuracy": {
            name: float((d == labels).mean())
            for name, d in zip(("card", "evaluate_model", "pipeline"), decisions, strict=False)
        },
        "images": len(files),
        "classes_decided": len(set(decisions[2].tolist())),
        "card_differs": int((decisions[0] != decisions[2]).sum()),
        "evaluate_model_differs": int((decisions[1] != decisions[2]).sum()),
        "logit_distance": float(max(np.abs(card - plain).max(), np.abs(measured - plain).max())),
        "misread_differs": int((decisions[3] != decisions[2]).sum()),
    }


def _data_arguments(dataset: Path) -> DataArguments:
    return DataArguments(str(dataset), image_size=32, validation_fraction=0.2)


def run_all(work: Path, images: int, steps: int) -> list[dict[str, Any]]:
    """Every student; a row each."""
    dataset = work / "set"
    files = make_images(dataset, train=200, test=images)
    recipe = {
        "dataset_name": str(dataset),
        "image_size": 32,
        "validation_fraction": 0.2,
        "max_steps": steps,
        "per_device_train_batch_size": 32,
        "learning_rate": 2e-3,
        "optim": "adamw_torch",
        "report_to": "none",
        "save_strategy": "no",
        "eval_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    rows = []

    def add(family: str, start: str, processor: str, name: str, keys: dict[str, Any], weights: Any = None) -> None:
        trainer, data = train(work / name, recipe | keys, weights)
        found = compare(trainer, data, dataset, files)
        rows.append({"family": family, "start": start, "processor": processor, **found})
        print(json.dumps(rows[-1]), flush=True)

    for i, (family, keys) in enumerate(SCRATCH.items()):
        add(family, "from scratch", "whole images, made with the student", f"scratch-{i}", keys)
    for i, (family, (processor, make)) in enumerate(WEIGHTS.items()):
        torch.manual_seed(i)
        model, own = make()
        saved = work / f"weights-{i}"
        model.save_pretrained(saved)
        own.save_pretrained(saved)
        keys = {"model_name_or_path": str(saved)}
        add(family, "from weights, by a recipe", "whole images, levels of the weights' own", f"recipe-{i}", keys)
        add(family, "from weights, by Python", processor, f"python-{i}", {}, (model, own))
    return rows


def report(rows: list[dict[str, Any]], facts: dict[str, Any], command: str) -> str:
    """Markdown of the rows."""
    table = [["family", "start", "image processor that is saved", "card %", "evaluate_model %", "pipeline %"]]
    table[0] += ["other decisions", "largest difference of a logit", "misread"]
    for row in rows:
        accuracy = [f"{100 * value:.1f}" for value in row["accuracy"].values()]
        differs = f"{row['card_differs']} / {row['evaluate_model_differs']}"
        numbers = [differs, f"{row['logit_distance']:.1e}", str(row["misread_differs"])]
        table.append([row["family"], row["start"], row["processor"], *accuracy, *numbers])
    families = len({row["family"] for row in rows})
    wrong = sum(row["card_differs"] + row["evaluate_model_differs"] for row in rows)
    lines = [
        "# The card is the pipeline",
        "",
        f"`{command}`, commit {facts['commit']}, {facts['device']}.",
        "",
        f"{len(rows)} students of {families} families, {rows[0]['images']} test images each: {wrong} decisions of card "
        "or `evaluate_model` are not those of `pipeline`. *Other decisions*: images where card / `evaluate_model` "
        "decide otherwise than `pipeline`. *Misread*: where it would if whole images were brought to the "
        "network's size and normalised by mean and deviation, whatever else the image processor says.",
        "",
        markdown_table(table),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Trains and compares; writes JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200, help="Test images.")
    parser.add_argument("--steps", type=int, default=30, help="Steps of each training.")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="Where to write.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        rows = run_all(Path(work), args.images, args.steps)
    facts = environment(torch.device("cpu"))
    name = args.results / f"{datetime.date.today().isoformat()}-card-is-pipeline"
    args.results.mkdir(parents=True, exist_ok=True)
    write_json(name.with_suffix(".json"), {"rows": rows, "environment": facts})
    command = f"python benchmarks/card_is_pipeline.py --images {args.images} --steps {args.steps}"
    name.with_suffix(".md").write_text(report(rows, facts, command), "utf-8")
    print(f"wrote {name}.md")


if __name__ == "__main__":
    main()
