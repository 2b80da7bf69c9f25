"""The files of a made-up run, and a card as a reader sees it."""

import re

from markdown_it import MarkdownIt

MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
SHA = "0123456789abcdef0123456789abcdef01234567"
ENVIRONMENT = {
    "versions": {"python": "3.11.7", "hf_ihb": "0.1.0", "torch": "2.11.0"},
    "commit": "c" * 40,
    "device": "Some CPU",
    "cpu_threads": 2,
    "num_processes": 1,
    "mixed_precision": "no",
}


def model_summary(name, parameters, revision=None, digest="aa"):
    return {
        "name": name,
        "revision": revision,
        "class": "DeiTForImageClassificationWithTeacher",
        "num_parameters": parameters,
        "weights_sha256": digest,
    }


def head(accuracy):
    return {"accuracy": accuracy, "top_5_accuracy": 0.8937, "nll": 1.659498094904454, "ece": 0.04401420448443497}


def records():
    """The files of a run of a two-head student with a teacher from the Hub, as the scripts write them."""
    data = {"name": "uoft-cs/cifar10", "revision": SHA, "split": "test", "num_images": 10000}
    recipe = {
        "recipe": "recipes/cka.json",
        "keys": {
            "license": "mit",
            "dataset_name": "uoft-cs/cifar10",
            "dataset_config_name": "plain_text",
            "architecture": "deit",
            "method": "structural",
            "teacher_model": "facebook/dinov2-small",
            "cka_weight": 1.0,
            "student_layers": [0, 1],
            "teacher_layers": [5, 11],
            "teacher_control": "none",
            "teacher_view": "shared",
            "per_device_train_batch_size": 64,
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 3,
            "max_steps": -1,
            "learning_rate": 0.001,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,
            "optim": "adamw_torch",
            "weight_decay": 0.05,
            "horizontal_flip": 0.5,
            "load_best_model_at_end": True,
            "metric_for_best_model": "accuracy",
            "greater_is_better": True,
            "seed": 7,
        },
        "dataset": {"name": "uoft-cs/cifar10", "revision": SHA, "label_names": ["cat", "dog"]}
        | {"train": 45000, "validation": 5000, "test": 10000},
        "teacher": {"name": "facebook/dinov2-small", "revision": SHA},
        "environment": ENVIRONMENT,
    }
    layers = [
        {"layer": i, "distance": 3.0 + i / 7, "distance_relative": 0.7 + i / 7, "distance_px": 12.0 + i / 7}
        | {"entropy": 3.5 + i / 7, "special_token_mass": 0.02 + i / 7}
        for i in range(2)
    ]
    own = model_summary("me/cka", 308820)
    return {
        "recipe.json": recipe,
        "config.json": {
            "architectures": ["DeiTForImageClassificationWithTeacher"],
            "model_type": "deit",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 4,
            "image_size": 32,
        },
        "preprocessor_config.json": {"size": {"height": 32, "width": 32}},
        "training_history.json": [
            {"loss": 2.0, "step": 10},
            {"eval_accuracy": 0.31, "epoch": 1.0},
            {"eval_accuracy": 0.35, "epoch": 2.0},
            {"eval_accuracy": 0.35, "epoch": 3.0},
        ],
        "evaluation.json": {
            "validation": {"accuracy": 0.35, "num_images": 5000},
            "test": {"loss": 1.5, "accuracy": 0.3851, "cls_accuracy": 0.3842, "distillation_accuracy": 0.3839}
            | {"num_images": 10000, "teacher_agreement": 0.4374},
            "num_parameters": 308820,
            "num_train_images": 45000,
            "train_steps": 703,
            "train_seconds": 470.0,
            "seed": 7,
            "teacher_validation_accuracy": 0.6424,
        },
        "metrics.json": {
            "model": own,
            "teacher": model_summary("facebook/dinov2-small", 22056576, SHA),
            "baseline": model_summary("me/ce", 308820, SHA),
            "data": data | {"label_names": ["cat", "dog"]},
            "environment": ENVIRONMENT,
            "heads": {"averaged": head(0.3851), "cls": head(0.3842), "distillation": head(0.3839)},
            "fidelity": {"agreement": 0.4374, "kl_divergence": 0.703188496983648},
            "transfer": {
                "student_accuracy": 0.3851,
                "teacher_accuracy": 0.641,
                "baseline_accuracy": 0.346,
                "transfer_efficiency": 0.6007,
                "gap_closed": 0.132542372881356,
                "gain": 0.0391,
                "gain_ci_low": 0.031129,
                "gain_ci_high": 0.04707,
                "confidence_level": 0.95,
            },
        },
        "analysis.json": {
            "model": own,
            "teacher": model_summary("facebook/dinov2-small", 22056576, SHA),
            "data": data | {"num_images": 2048, "seed": 0, "indices": [0, 1]},
            "environment": ENVIRONMENT,
            "attention": {
                "grid": [8, 8],
                "patch_size_px": [4, 4],
                "num_images": 2048,
                "uniform_distance": 4.136482711405379,
                "mean_distance": 3.0714285714,
                "layers": layers,
                "untrained": {
                    "mean_distance": 4.14,
                    "layers": [{"layer": i, "distance": 4.1 + i / 70} for i in range(2)],
                },
            },
            "cka": {
                "num_images": 2048,
                "rows_per_batch": 256,
                "features": "mean over patch tokens",
                "matrices": [
                    {"rows": {"name": "me/cka", "layers": [0, 1]}, "columns": {"name": "me/cka", "layers": [0, 1]}}
                    | {"linear": [[1.0, 0.5], [0.5, 1.0]]},
                    {"rows": {"name": "me/cka", "layers": [0, 1]}, "columns": {"name": "t", "layers": [0, 1, 2]}}
                    | {"linear": [[0.1, 0.8765, 0.2], [0.3, None, 0.4321]]},
                ],
            },
            "hessian": {
                "num_images": 1024,
                "trace": 1234.5,
                "trace_standard_error": 12.3,
                "num_probes": 30,
                "largest_eigenvalue": 99.5,
                "smallest_eigenvalue": -3.25,
            },
        },
    }


def on_labels(files):
    """The same run without a teacher."""
    files["recipe.json"]["teacher"] = None
    keys = files["recipe.json"]["keys"]
    for name in [name for name in keys if name.startswith(("teacher_", "cka_", "student_")) or name == "method"]:
        del keys[name]
    files["evaluation.json"].pop("teacher_validation_accuracy")
    files["evaluation.json"]["test"].pop("teacher_agreement")
    files["metrics.json"] |= {"teacher": None, "baseline": None, "fidelity": None, "transfer": None}
    files["analysis.json"]["teacher"] = None
    del files["analysis.json"]["cka"]["matrices"][1]
    return files


def body_of(text):
    return re.sub(r"\A---\n.*?\n---\n", "", text, count=1, flags=re.DOTALL)


def inline_text(token):
    return "".join(child.content for child in token.children)


def tables_of(text):
    """Rows of cells of every table, as a reader sees them."""
    tables, tokens = [], MARKDOWN.parse(body_of(text))
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type in ("th_open", "td_open"):
            tables[-1][-1].append(inline_text(following))
    return tables


def fences_of(text, language):
    return [t.content for t in MARKDOWN.parse(body_of(text)) if t.type == "fence" and t.info == language]


def plain(text):
    """The body's words, one space between them."""
    return " ".join(body_of(text).split())
