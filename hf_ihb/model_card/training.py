"""How a model was trained, in the words of its card."""

from dataclasses import fields
from typing import Any

from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.fields import flaws_among
from hf_ihb.config.names import LOCAL_PREFIX
from hf_ihb.markdown import EMPTY, Markdown, called, counted, is_number, percent
from hf_ihb.methods import METHODS
from hf_ihb.model_card.files import RunFiles, Taught, defaults_of, is_hub_id
from hf_ihb.runs.folder import HISTORY_FILE
from hf_ihb.trainer.arguments import SupervisedTrainingArguments

_CONTROLS = {"none": "", "untrained": "its weights drawn anew", "shuffled": "shown another image of the batch"}
_VIEWS = {
    "shared": "shown the stored images, its tokens following the student's augmentation",
    "clean": "shown the stored images",
    "identical": "shown the student's augmented images",
}
# of a training with a teacher, what changes no number, or is said in a sentence
_UNSAID = {"teacher_cache_dir", "teacher_dtype", "distillation_warmup_type", "method", "task_loss_weight"}
_UNSAID |= {"student_layers", "teacher_layers", "teacher_view", "teacher_logits_view", "teacher_models"}
_OF_TEACHER = {"teacher_model", "teacher_revision", "teacher_image_size", "teacher_control"}


def named(name: str, revision: str | None = None, kind: str = "") -> Markdown:
    """A model or data set with where it is: a link where it is a repo of the Hub.

    Args:
        name: As it is published.
        revision: Commit on the Hub; None for anything else.
        kind: ``datasets/`` for a data set.
    """
    if name.startswith(LOCAL_PREFIX):
        return Markdown("{} (a local folder)").format(called(name))
    if revision is not None and is_hub_id(name):
        return Markdown("[{}](https://huggingface.co/" + kind + name + ")").format(name)
    return Markdown("{}").format(name)


def pinned(name: str, revision: str | None, kind: str = "") -> Markdown:
    """`named`, with the whole revision."""
    at = EMPTY if revision is None else Markdown(" at {}").format(revision)
    return named(name, revision, kind) + at


def method(taught: Taught) -> Markdown:
    """What was learned by from a teacher, in a few words."""
    methods = taught.methods
    phrases = [Markdown(phrase).format(**taught.keys) for m in methods if (phrase := m.phrase()) is not None]
    if losses := [Markdown(m.label) for m in methods if m.phrase() is None]:
        text = Markdown(("a {} loss" if len(losses) == 1 else "{} losses") + " between layers")
        phrases.append(text.format(Markdown(" + ").join(losses)))
    return Markdown(" and ").join(phrases)


def _loss(run: RunFiles) -> Markdown:
    """Every part of the loss with its weight."""
    keys = run.keys
    label = "cross-entropy on the labels (weight {weight:g}"
    label += ", smoothing {label_smoothing_factor:g})" if keys["label_smoothing_factor"] else ")"
    parts = [Markdown(label).format(**keys, weight=label_weight(run))]
    for taught in run.taught:
        whose = "" if taught.number is None else f" of teacher {taught.number}"
        parts += [Markdown(m.describe()).format(**taught.keys) + Markdown(whose) for m in taught.methods]
    return Markdown(" + ").join(parts)


def _layers(taught: Taught) -> Markdown:
    """Which layers were compared; empty where none were."""
    if not any(m.needs.layers or m.needs.final for m in taught.methods):
        return EMPTY
    students, teachers = taught.keys["student_layers"], taught.keys["teacher_layers"] or taught.keys["student_layers"]
    pairs = [Markdown("{} with {}").format(*pair) for pair in zip(students, teachers, strict=True)]
    return Markdown(", ").join(pairs) + Markdown(" (student's with teacher's, from 0)")


def label_weight(run: RunFiles) -> float:
    """Weight of the cross-entropy on the labels."""
    if run.teacher is None:
        return 1.0
    shares = [taught.keys["alpha"] or 0.0 for taught in run.taught]
    return run.keys["task_loss_weight"] * max(0.0, 1 - sum(shares))


def flaws(run: RunFiles) -> list[Markdown]:
    """The flaws of the published study that a key of the run repeats."""
    each = [taught.keys for taught in run.taught] or [run.keys]
    found = [flaw for arguments in run.argument_classes for keys in each for flaw in flaws_among(arguments, keys)]
    found = list(dict.fromkeys(found))
    return [Markdown("{}: ").format(f"{name}={value}") + Markdown(reason) for name, value, reason in found]


def training_rows(run: RunFiles) -> list[tuple[str, Markdown]]:
    """What a run depends on, each with its title; what is not known is left out."""
    keys, environment = run.keys, run.environment
    titles = {"train": "training", "validation": "validation", "test": "test"}
    sizes = [Markdown(f"{{:,}} {title}").format(n) for split, title in titles.items() if (n := run.dataset[split])]
    data = pinned(run.dataset["name"], run.dataset["revision"], "datasets/")
    several = len(run.taught) > 1
    rows = {
        "recipe": run.recipe["recipe"] and Markdown("{}").format(run.recipe["recipe"].removeprefix(LOCAL_PREFIX)),
        "data": data + Markdown(": ") + Markdown(", ").join(sizes) + Markdown(" images"),
        **{
            taught.of("teacher").replace("_", " "): pinned(taught.teacher["name"], taught.teacher["revision"])
            + _teacher_view(run, taught)
            for taught in run.taught
        },
        "starting weights": keys["model_name_or_path"] and pinned(keys["model_name_or_path"], keys["model_revision"]),
        "loss": _loss(run),
        **{taught.of("layers compared").replace("_", " of teacher "): _layers(taught) for taught in run.taught},
        "other settings of the loss": run.teacher and _changed(run, run.training_class, SupervisedTrainingArguments),
        **{f"those of teacher {taught.number}": _own_settings(run, taught) for taught in run.taught if several},
        "length": _length(run),
        "batch": _batch(run),
        "optimizer": _optimizer(keys),
        "learning rate": _learning_rate(keys),
        "augmentation": _changed(run, AugmentationArguments) or Markdown("none"),
        "regularisation": _regularisation(keys),
        "averaged weights": _averaging(keys),
        "kept": selection(run),
        "seed": Markdown("{seed} (split of the data: {split_seed})").format(**keys),
        "precision": _precision(environment["mixed_precision"]),
        "hardware": _hardware(environment),
        "time": run.evaluation and Markdown("{:.1f} minutes").format(run.evaluation["train_seconds"] / 60),
        "`hf_ihb`": environment["commit"] and Markdown("commit {}").format(environment["commit"]),
        "versions": Markdown(", ").join(
            f"{package} {number}" for package, number in environment["versions"].items() if number is not None
        ),
    }
    return [(Markdown(title), text) for title, text in rows.items() if text]


def _teacher_view(run: RunFiles, taught: Taught) -> Markdown:
    """What the teacher was, and what it saw."""
    keys, size = taught.keys, taught.keys["teacher_image_size"]
    views = {}
    if any(m.needs.layers or m.needs.final for m in taught.methods):
        views["features"] = _VIEWS[keys["teacher_view"]]
    if any(m.needs.logits for m in taught.methods):
        views["class scores"] = _VIEWS[keys["teacher_logits_view"]]
    if len(set(views.values())) > 1:
        views = {what: f"for its {what} {view}" for what, view in views.items()}
    parts = [Markdown(_CONTROLS[keys["teacher_control"]]), *map(Markdown, dict.fromkeys(views.values()))]
    if size is not None:
        parts.append(Markdown("at {0} x {0} px").format(size))
    if views := (run.evaluation or {}).get(taught.of("teacher_views")):
        kept = "its scores kept by epoch and image, begun by the run {}"
        parts.append(Markdown(kept).format(called(views["begun_by"] or "of before")))
    if taught.teacher.get("crop_left_out"):
        parts.append(Markdown("whole ones, without the crop of its image processor, as places are compared"))
    return Markdown("").join(Markdown(", ") + part for part in parts if part)


def _own_settings(run: RunFiles, taught: Taught) -> Markdown:
    """Keys of the loss that one of several teachers has for itself, and that are not in a sentence already."""
    said = _UNSAID.union(*(m.said for m in METHODS)) | _OF_TEACHER
    own = {name: value for name, value in taught.keys.items() if value != run.keys[name] and name not in said}
    return Markdown(", ").join(Markdown("{}").format(f"{name}={value}") for name, value in own.items())


def _changed(run: RunFiles, arguments: type, base: type = object) -> Markdown:
    """Keys of a dataclass, but not of its base, that differ from their defaults and are not in a sentence already."""
    said = _UNSAID.union(*(m.said for m in METHODS))
    inherited = {f.name for f in fields(base)} if base is not object else set()
    parts = [
        Markdown("{}").format(f"{name}={run.keys[name]}")
        for name, default in defaults_of(arguments).items()
        if name not in inherited | said and run.keys[name] != default
    ]
    return Markdown(", ").join(parts)


def _length(run: RunFiles) -> Markdown:
    keys = run.keys
    if run.evaluation is None:
        asked = "{max_steps:,} steps" if keys["max_steps"] > 0 else "{num_train_epochs:g} epochs"
        return Markdown(asked + " asked for").format(**keys)
    steps, images = run.evaluation["train_steps"], run.evaluation["num_train_images"]
    return Markdown("{:,} steps, {:.1f} epochs").format(steps, steps * _images_per_step(run) / images)


def _images_per_step(run: RunFiles) -> int:
    per_device = run.keys["per_device_train_batch_size"] * run.keys["gradient_accumulation_steps"]
    return per_device * run.environment["num_processes"]


def _batch(run: RunFiles) -> Markdown:
    text = "{:,} images (per device {per_device_train_batch_size}, accumulated {gradient_accumulation_steps}, "
    processes = run.environment["num_processes"]
    return Markdown(text + "processes {processes})").format(_images_per_step(run), processes=processes, **run.keys)


def _optimizer(keys: dict[str, Any]) -> Markdown:
    text = "{optim}, weight decay {weight_decay:g} on {decayed}, gradient norm clipped at {max_grad_norm:g}"
    decayed = "every parameter" if keys["weight_decay_scope"] == "all" else "weight matrices"
    return Markdown(text).format(**keys, decayed=Markdown(decayed))


def _learning_rate(keys: dict[str, Any]) -> Markdown:
    text, warmup = Markdown("{learning_rate:g}, {lr_scheduler_type} schedule").format(**keys), keys["warmup_steps"]
    if warmup == 0:
        return text
    length = percent(warmup, 0) + Markdown(" of the steps") if warmup < 1 else counted(round(warmup), "step")
    return text + Markdown(", warm-up over ") + length


def _regularisation(keys: dict[str, Any]) -> Markdown:
    texts = {"drop_path_rate": "drop path {:g}", "cls_token_dropout": "cls-token dropout {:g}"}
    return Markdown(", ").join(Markdown(text).format(keys[name]) for name, text in texts.items() if keys[name])


def _averaging(keys: dict[str, Any]) -> Markdown:
    if keys["ema_decay"]:
        return Markdown("exponential moving average, decay {ema_decay:g}").format(**keys)
    if keys["swa_start"] is not None:
        return Markdown("SWA from {} of training").format(percent(keys["swa_start"], 0))
    return EMPTY


def _precision(mixed_precision: str | None) -> Markdown:
    return Markdown("float32") if mixed_precision in (None, "no") else Markdown("{} (mixed)").format(mixed_precision)


def _hardware(environment: dict[str, Any]) -> Markdown:
    threads = counted(environment["cpu_threads"], "CPU thread")
    return Markdown("{}, ").format(environment["device"]) + threads + Markdown(" a process")


def selection(run: RunFiles) -> Markdown:
    """Which weights were kept, as far as the history says: those of the best evaluation, or the last."""
    keys = run.keys
    metric = (keys["metric_for_best_model"] or "loss").removeprefix("eval_")
    scored = [row for row in run.contents.get(HISTORY_FILE, []) if is_number(row.get(f"eval_{metric}"))]
    if not keys["load_best_model_at_end"] or not scored:
        return EMPTY
    best = (max if keys["greater_is_better"] else min)(scored, key=lambda row: row[f"eval_{metric}"])
    value = best[f"eval_{metric}"]
    value = percent(value) if "accuracy" in metric else Markdown("{:.4f}").format(value)
    text = "the best of {} by {} on the {} split: epoch {:.4g}, {}"
    count = counted(len(scored), "evaluation")
    return Markdown(text).format(count, metric, keys["selection_split"], best["epoch"], value)
