"""The body of a card: ``templates/model_card.md``, filled with what the files of a run folder say.

What always reads the same stands in the template; tables, and sentences that depend on the run, are made in Python.
Whatever is not `Markdown` of ours is a name when it is printed, and shown as code.
"""

import re
import shlex
from importlib import resources
from typing import Any, Unpack

from jinja2 import Environment, StrictUndefined

from hf_ihb.config.names import LOCAL_PREFIX
from hf_ihb.errors import DataError
from hf_ihb.markdown import EMPTY, Markdown, called, code, listing, table, to_markdown, visible
from hf_ihb.model_card import evidence, training
from hf_ihb.model_card.analyses import AnalysisSection, analysis_sections, analysis_topics
from hf_ihb.model_card.files import PLOTS, RunFiles
from hf_ihb.model_card.header import CardOptions, answering_accuracy, card_data, title_of
from hf_ihb.runs.folder import (
    ANALYSIS_FILE,
    CONFIG_FILE,
    EVALUATION_FILE,
    HISTORY_FILE,
    METRICS_FILE,
    PROCESSOR_FILE,
    RECIPE_FILE,
    WEIGHTS_FILE,
)

# Class of the model -> what it is, and how it answers.
_ARCHITECTURES = {
    "DeiTForImageClassificationWithTeacher": ("A DeiT", "a cls and a distillation head whose logits are averaged"),
    "DeiTForImageClassification": ("A DeiT", "one head at the cls token"),
    "ViTForImageClassification": ("A ViT", "one head at the cls token"),
    "FlexibleDeiTForImageClassification": ("A DeiT", "a cls and a distillation head"),
    "AdaptiveCNNForImageClassification": ("An AdaptiveCNN", "squeeze-and-excitation in residual blocks"),
    "ConvNextV2ForImageClassification": ("A ConvNeXt V2", ""),
}
# Key of a config -> what it says.
_SHAPE = {
    "num_hidden_layers": "{} layers",
    "hidden_size": "width {}",
    "num_attention_heads": "{} attention heads",
    "patch_size": "patches of {} px",
    "depths": "{} blocks in its stages",
    "hidden_sizes": "widths {}",
    "conv_stem": "convolutional stem: {}",
    "layer_scale_init_value": "LayerScale from {}",
}
# What an architecture has in its name -> what it stands on, and its arXiv id.
_MARKS = {
    "deit": ("DeiT: Touvron et al., 2021", "2012.12877"),
    "vitfor": ("ViT: Dosovitskiy et al., 2021", "2010.11929"),
    "convnextv2": ("ConvNeXt V2: Woo et al., 2023", "2301.00808"),
    "resnet": ("ResNet: He et al., 2016", "1512.03385"),
}
_FILES = {
    CONFIG_FILE: "architecture and class names",
    WEIGHTS_FILE: "weights",
    PROCESSOR_FILE: "size and normalisation of the images",
    RECIPE_FILE: "every key as it was resolved, revisions, versions, commit, hardware",
    HISTORY_FILE: "losses and evaluations along the way",
    EVALUATION_FILE: "results at the end of training",
    METRICS_FILE: "all metrics, per class and head, and the confusion matrix",
}


def render_card(run: RunFiles, **options: Unpack[CardOptions]) -> str:
    """The text of a run's README.md.

    Args:
        run: What its files say; what it lacks beside ``recipe.json`` is left out of the card.
        **options: See `CardOptions`.

    Returns:
        YAML header and Markdown body; the same files give the same text.

    Raises:
        DataError: If a file is not what its name says, or an option is not the Hub id it should be.
    """
    try:
        header, body = card_data(run, **options).to_yaml(), _body(run, options)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DataError(
            f"{run.folder}: expected the records that hf_ihb writes, found something else ({reason})"
        ) from error
    return f"---\n{header}\n---\n\n{body.strip()}\n"


def _body(run: RunFiles, options: CardOptions) -> str:
    text = resources.files("hf_ihb").joinpath("templates", "model_card.md").read_text("utf-8")
    analyses = analysis_sections(run)
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=to_markdown)
    return environment.from_string(text).render(
        title=_plain_or_code(title_of(run, **options)),
        usage=_usage(run, options.get("repo_id") or run.name),
        introduction=_introduction(run),
        control=_control(run),
        classes=listing(run.dataset["label_names"]),
        results=evidence.results(run),
        analyses=analyses,
        training=table([(Markdown("setting"), Markdown("value")), *training.training_rows(run)]),
        flaws=training.flaws(run),
        limits=_limits(run, analyses),
        files=[(name, _file_text(name, run)) for name in run.listed],
        software=_software(run.environment),
        references=_references(run, analyses),
        run=run,
    )


def _plain_or_code(name: str) -> Markdown:
    """A name as plain text where it is a tame one, no longer than a repo's."""
    is_tame = re.fullmatch(r"[A-Za-z0-9]+(?:[-_ ][A-Za-z0-9]+)*", name) and len(name) <= 96
    return Markdown(name) if is_tame else code(name)


def _usage(run: RunFiles, source: str) -> dict[str, Any]:
    """What the usage example says; `source` is what the model is loaded by."""
    height, width = _image_size(run) or (32, 32)
    return {
        "import_us": run.needs_us,
        "source": Markdown(f'"{source}"' if re.fullmatch(r"[\w./-]+", source, re.ASCII) else ascii(source)),
        "trust": Markdown(", trust_remote_code=True" if run.is_custom_code else ""),
        "size": Markdown(f"({width}, {height})"),
        **_evaluation(run, source),
    }


def _evaluation(run: RunFiles, source: str) -> dict[str, Any]:
    """How the results are made again; nothing where there are none."""
    if (answer := answering_accuracy(run)) is None:
        return {}
    data, local_data = answer[1], None
    words = ["python", "scripts/evaluate_model.py", source]
    if data["name"].startswith(LOCAL_PREFIX):
        words += ["--dataset_name", "FOLDER"]
        local_data = data["name"].removeprefix(LOCAL_PREFIX)
    elif data["name"] != run.dataset["name"]:
        words += ["--dataset_name", data["name"]]
    words += ["--split", data["split"]] * (data["split"] != "test")
    return {"command": Markdown(shlex.join(map(visible, words))), "local_data": local_data}


def _image_size(run: RunFiles) -> tuple[int, int] | None:
    """Height and width of the images that the model sees, in px."""
    size = run.contents.get(PROCESSOR_FILE, {}).get("size") or {}
    if "height" in size:
        return int(size["height"]), int(size["width"])
    if "pretrained_cfg" in run.config:
        return tuple(map(int, run.config["pretrained_cfg"]["input_size"][-2:]))
    return None


def _introduction(run: RunFiles) -> Markdown:
    """What the model is, what it was trained on, and by whom."""
    weights = run.keys["model_name_or_path"]
    start = Markdown("from scratch") if weights is None else Markdown("from the weights of ") + training.named(weights)
    if run.teacher is None:
        source = Markdown("the labels alone, without a teacher")
    else:
        several = len(run.taught) > 1
        who = f"{len(run.taught)} frozen teachers: {{}}" if several else "a frozen teacher, {}"
        each = [
            Markdown("{}, by {}").format(training.named(x.teacher["name"], x.teacher["revision"]), training.method(x))
            for x in run.taught
        ]
        text = f"the labels and {who}" if training.label_weight(run) else who if several else "{}"
        source = Markdown(text).format(Markdown("; ").join(each))
    data = training.named(run.dataset["name"], run.dataset["revision"], "datasets/")
    trained = Markdown("It was trained {} on {:,} images of {}, and learned from {}.")
    return _description(run) + Markdown(" ") + trained.format(start, run.dataset["train"], data, source)


def _control(run: RunFiles) -> str:
    """Which control a run is: what all of its teachers were."""
    controls = {taught.keys["teacher_control"] for taught in run.taught}
    return controls.pop() if len(controls) == 1 else "none"


def _description(run: RunFiles) -> Markdown:
    """Kind, size and shape of the network, as far as its config says."""
    config = run.config
    saved = (config.get("architectures") or [run.keys["architecture"] or "DeiT"])[0]
    # what timm calls a network says more than the class that wraps it
    fallback = (Markdown("A {}").format(config.get("architecture", saved)), "")
    kind, head = _ARCHITECTURES.get(saved, fallback)
    shape = [
        Markdown(text).format(Markdown(", ").join(value) if isinstance(value, list) else value)
        for name, text in _SHAPE.items()
        if (value := config.get(name)) is not None
    ]
    if run.evaluation is not None:
        shape.insert(0, Markdown("{:,} parameters").format(run.evaluation["num_parameters"]))
    shape += [Markdown(head)] if head else []
    if config.get("inference_head", "average") != "average":
        shape.append(Markdown("it answers with {}").format(config["inference_head"]))
    size = _image_size(run)
    images = Markdown("images" if size is None else f"{size[0]} x {size[1]} px images")
    what = Markdown("{} image classifier for {} of {:,} classes").format(
        Markdown(kind), images, len(run.dataset["label_names"])
    )
    return what + (Markdown(" (") + Markdown(", ").join(shape) + Markdown(")") if shape else EMPTY) + Markdown(".")


def _file_text(name: str, run: RunFiles) -> Markdown:
    """What a file of the run holds."""
    texts = _FILES | PLOTS | {ANALYSIS_FILE: analysis_topics(run)}
    return Markdown(texts.get(name, "code of the model class"))


def _limits(run: RunFiles, analyses: list[AnalysisSection]) -> dict[str, Any]:
    size = _image_size(run)
    return {
        "size": None if size is None else Markdown("{} x {} px").format(*size),
        "data": called(run.dataset["name"]),
        "is_local": run.dataset["revision"] is None,
        "seed": run.keys["seed"],
        "may_show_teaching": run.teacher is not None and any(s.analysis.shows_teaching for s in analyses),
    }


def _software(environment: dict[str, Any]) -> Markdown:
    parts = {"version": environment["versions"]["hf_ihb"], "commit": environment["commit"]}
    known = [Markdown(f"{what} {{}}").format(value) for what, value in parts.items() if value is not None]
    return Markdown(", ").join(known) or Markdown("version not known")


def _references(run: RunFiles, analyses: list[AnalysisSection]) -> list[tuple[Markdown, Markdown]]:
    """What the run stands on, each with where to read it: network, methods, teacher, analyses."""
    saved = f"{run.config.get('architectures')} {run.config.get('architecture')} {run.keys['architecture']}".lower()
    stands_on = {number: text for mark, (text, number) in _MARKS.items() if mark in saved}
    for method in run.methods:
        stands_on |= {number: text for text, number in (*method.references, *method.shared.references)}
    if run.keys.get("teacher_dropping"):
        stands_on["2408.05088"] = "Teacher dropping: UNIC, Sariyildiz et al., 2024"
    if any(taught.keys["teacher_standardization"] == "phi_s" for taught in run.taught):
        stands_on["2410.01680"] = "PHI-S: Ranzinger et al., 2024"
    measured = (run.metrics or {}).get("teacher") or {}
    teachers = [taught.teacher["name"] for taught in run.taught]
    if teachers and "dinov2" in f"{teachers} {measured.get('class')}".lower():
        stands_on |= {"2304.07193": "DINOv2: Oquab et al., 2023"}
    for section in analyses:  # says more of a paper than the network that comes from it
        stands_on |= {number: text for text, number in section.analysis.references}
    return [
        (Markdown(text), Markdown(f"[arXiv:{number}](https://arxiv.org/abs/{number})"))
        for number, text in stands_on.items()
    ]
