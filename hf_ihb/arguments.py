"""Every key of a recipe: dataclasses with a help text, a unit and a range for each key of ours."""

import functools
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils import is_torch_tf32_available


@dataclass(frozen=True)
class Range:
    """An interval of numbers; open bounds are excluded."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return (isinstance(value, int) or math.isfinite(value)) and above and below

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'>' if self.low_open else '>='} {self.low:g}"
        return f"in {'(' if self.low_open else '['}{self.low:g}, {self.high:g}{')' if self.high_open else ']'}"


POSITIVE = Range(0, low_open=True)
NON_NEGATIVE = Range(0)
AT_LEAST_ONE = Range(1)
FRACTION = Range(0, 1)
FRACTION_BELOW_ONE = Range(0, 1, high_open=True)

# Ranges of keys that belong to `TrainingArguments`, which does not check them itself.
TRAINING_RANGES = {
    "per_device_train_batch_size": AT_LEAST_ONE,
    "per_device_eval_batch_size": AT_LEAST_ONE,
    "gradient_accumulation_steps": AT_LEAST_ONE,
    "num_train_epochs": POSITIVE,
    "learning_rate": NON_NEGATIVE,
    "weight_decay": NON_NEGATIVE,
    "max_grad_norm": NON_NEGATIVE,
    "warmup_steps": NON_NEGATIVE,
    "adam_beta1": FRACTION_BELOW_ONE,
    "adam_beta2": FRACTION_BELOW_ONE,
    "adam_epsilon": POSITIVE,
    "label_smoothing_factor": FRACTION_BELOW_ONE,
    "seed": Range(0, 2**32 - 1),
    "dataloader_num_workers": NON_NEGATIVE,
    "save_total_limit": AT_LEAST_ONE,
}


def key(
    default: Any,
    help: str,
    *,
    within: Range | None = None,
    unit: str | None = None,
    published: dict[Any, str] | None = None,
) -> Any:
    """A dataclass field of a recipe.

    Args:
        default: Its default.
        help: What it does, for ``--help``.
        within: Range that is checked.
        unit: Unit, for ``--help``.
        published: Values that repeat a flaw of the published study, each with what is wrong; a run says so once.
    """
    notes = "; ".join(str(note) for note in (unit, within) if note)
    metadata: dict[str, Any] = {"help": f"{help} ({notes})" if notes else help}
    if within is not None:
        metadata["range"] = within
    if published is not None:
        metadata["published"] = published
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def range_of(dataclass_type: type, name: str) -> Range | None:
    """Range of a key of one of our dataclasses or of `TrainingArguments`."""
    own = {f.name: f.metadata.get("range") for f in fields(dataclass_type)}
    return own.get(name) or (TRAINING_RANGES.get(name) if issubclass(dataclass_type, TrainingArguments) else None)


def out_of_range(dataclass_type: type, name: str, value: Any) -> Range | None:
    """The range that a value, or an item of a list of values, falls out of; None if there is nothing to say."""
    allowed = range_of(dataclass_type, name)
    values = value if isinstance(value, (list, tuple)) else [value]
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return allowed if allowed is not None and any(v not in allowed for v in numbers) else None


def published_flaws(instances: Iterable[Any]) -> list[str]:
    """One line for each key whose value repeats a flaw of the published study."""
    return [
        f"{name}={value} repeats a flaw of the published study: {reason}"
        for instance in instances
        for name, value, reason in flaws_among(type(instance), vars(instance))
    ]


def flaws_among(dataclass_type: type, values: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    """Name, value and what is wrong, of each key of a dataclass that repeats a flaw of the published study."""
    return [
        (f.name, values[f.name], reason)
        for f in fields(dataclass_type)
        for flawed, reason in f.metadata.get("published", {}).items()
        if values.get(f.name) == flawed
    ]


class _Checked:
    """Checks the range of every key when a dataclass is made from Python."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if (allowed := out_of_range(type(self), f.name, value)) is not None:
                raise ValueError(f"key '{f.name}': expected a number {allowed}, found {value}")


@dataclass
class RunArguments(_Checked):
    """What may happen to the run folder, and what its model card says."""

    _argument_group_name = "run"

    overwrite_output_dir: bool = key(False, "Replace an earlier run of ours in output_dir (checkpoints included).")
    license: str = key("apache-2.0", "License of the trained model, by the Hub's identifier, for its card.")
    baseline_model: str | None = key(
        None,
        "Hub id or folder of the matched control, trained without a teacher; with push_to_hub the card shows the gain "
        "over it.",
    )


@dataclass
class DataArguments(_Checked):
    """Which images, and how they are split."""

    _argument_group_name = "data"

    dataset_name: str = key(
        "uoft-cs/cifar10",
        "Image-classification set: a Hub id, a local folder that `datasets.load_dataset` reads (an image folder too), "
        "or 'sklearn:digits', which needs no network.",
    )
    dataset_config_name: str | None = key(None, "Configuration of the data set, where it has several.")
    dataset_revision: str | None = key(None, "Branch, tag or commit of the data set on the Hub.")
    image_column_name: str | None = key(None, "Column of the images; found by its type if not given.")
    label_column_name: str | None = key(None, "Column of the labels; found by its type if not given.")
    train_split: str = key("train", "Name of the training split.")
    test_split: str = key("test", "Name of the test split; evaluated once, at the end.")
    validation_split: str | None = key(
        None, "Name of the validation split; if not given, a split named 'validation', 'valid' or 'val' is used."
    )
    validation_fraction: float = key(
        0.1,
        "Share of the training split that becomes the validation split, stratified by class, where the set has none.",
        within=Range(0, 1, low_open=True, high_open=True),
    )
    split_seed: int = key(0, "Seed of that split; apart from `seed`, so that runs share it.", within=NON_NEGATIVE)
    max_train_samples: int | None = key(
        None, "Train on a stratified part of the training split.", within=AT_LEAST_ONE, unit="images"
    )
    max_eval_samples: int | None = key(
        None, "Evaluate on stratified parts of the validation and test splits.", within=AT_LEAST_ONE, unit="images"
    )
    image_size: int | None = key(
        None, "Side of the decoded images; the size of the first image if not given.", within=AT_LEAST_ONE, unit="px"
    )
    color_mode: Literal["rgb", "grayscale"] = key("rgb", "Decode images to three channels or to one.")
    decode: Literal["auto", "once", "stream"] = key(
        "auto",
        "When images are decoded. 'once': before training, into memory, or into a file that is mapped into it and kept "
        "for later runs where they take more than decoded_memory_fraction. 'stream': whenever they are asked for, by "
        "dataloader_num_workers processes; needs no room. 'auto': 'once' where memory or disk has the room.",
    )
    decoded_memory_fraction: float = key(
        0.5,
        "Share of the memory that is available which decoded images may take, in all processes of a machine together; "
        "0 keeps them in a file.",
        within=FRACTION,
    )
    decoded_cache_dir: str | None = key(
        None,
        "Folder of decoded images, shared by runs; 'hf_ihb/decoded' in HF_HOME if not given. What is in it may be "
        "deleted.",
    )
    preprocessing_num_workers: int | None = key(
        None, "Threads that decode images; one for each core if not given.", within=AT_LEAST_ONE
    )
    selection_split: Literal["validation", "test"] = key(
        "validation",
        "What epochs are compared on. 'test' holds no training images out and selects on the test split.",
        published={"test": "epochs are selected, and training is stopped, on the images that are reported"},
    )


@dataclass
class AugmentationArguments(_Checked):
    """What a training image goes through, drawn per image and epoch."""

    _argument_group_name = "augmentation"

    random_crop_padding: int = key(
        0, "Zero padding on each side before a random crop of the original size.", within=NON_NEGATIVE, unit="px"
    )
    horizontal_flip: float = key(0.0, "Probability of a horizontal flip.", within=FRACTION)
    rotation_degrees: float = key(
        0.0, "Random rotation, uniform between -x and x.", within=Range(0, 180), unit="degrees"
    )
    translate_fraction: float = key(
        0.0,
        "Random shift along each axis, uniform between -x and x as a share of the side, to whole pixels.",
        within=FRACTION,
    )
    scale_jitter: float = key(0.0, "Random scale, uniform between 1 - x and 1 + x.", within=FRACTION_BELOW_ONE)
    shear_degrees: float = key(
        0.0, "Random horizontal shear, uniform between -x and x.", within=Range(0, 90, high_open=True), unit="degrees"
    )
    brightness: float = key(0.0, "Brightness factor, uniform between 1 - x and 1 + x.", within=FRACTION)
    contrast: float = key(0.0, "Contrast factor, uniform between 1 - x and 1 + x.", within=FRACTION)
    saturation: float = key(0.0, "Saturation factor, uniform between 1 - x and 1 + x.", within=FRACTION)
    hue: float = key(0.0, "Hue shift, uniform between -x and x.", within=Range(0, 0.5), unit="turns of the hue circle")
    auto_augment: Literal["none", "randaugment", "autoaugment_cifar10", "trivialaugment_wide"] = key(
        "none", "Policy of random operations."
    )
    randaugment_num_ops: int = key(2, "Operations RandAugment applies to an image.", within=AT_LEAST_ONE)
    randaugment_magnitude: int = key(9, "Strength of RandAugment, one of 31 bins.", within=Range(0, 30))
    interpolation: Literal["nearest", "bilinear"] = key(
        "bilinear", "How rotations, shears, shifts and scalings resample; the published runs used 'nearest'."
    )
    cutout_size: int = key(
        0, "Side of one square covered with the mean colour, clipped at the border.", within=NON_NEGATIVE, unit="px"
    )
    random_erasing: float = key(
        0.0,
        "Probability of covering one rectangle (2 to 33 per cent of the area, ratio 0.3 to 3.3) with the mean colour.",
        within=FRACTION,
    )
    mixup_alpha: float = key(0.0, "MixUp: Beta parameter of the mixing weight; 0 turns it off.", within=NON_NEGATIVE)
    cutmix_alpha: float = key(0.0, "CutMix: Beta parameter of the box's area; 0 turns it off.", within=NON_NEGATIVE)
    mix_probability: float = key(1.0, "Probability that an image is mixed, where mixing is on.", within=FRACTION)
    mix_switch_probability: float = key(
        0.5, "Share of mixed images that get CutMix where both kinds are on.", within=FRACTION
    )

    @property
    def mixes(self) -> bool:
        """Whether any image is mixed with another."""
        return self.mix_probability > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)


@dataclass
class ModelArguments(_Checked):
    """The model that is trained."""

    _argument_group_name = "model"

    architecture: str | None = key(
        None,
        "From scratch: 'deit' (if not given: cls and distillation tokens and heads), 'deit_cls' (one head, at the cls "
        "token), 'vit' (no distillation token), 'adaptive_cnn', 'convnextv2' (patch 2, for small images), or the name "
        "of a timm model such as 'resnet18_cifar'.",
    )
    model_name_or_path: str | None = key(
        None,
        "Start from these weights (Hub id or folder) instead of from scratch; only the head is new (with architecture "
        "'convnextv2' the stem too, where its patch differs).",
    )
    model_revision: str | None = key(None, "Branch, tag or commit of those weights on the Hub.")
    hidden_size: int | None = key(None, "Width of a ViT from scratch; 192 if not given.", within=AT_LEAST_ONE)
    num_hidden_layers: int | None = key(None, "Blocks of a ViT from scratch; 12 if not given.", within=AT_LEAST_ONE)
    num_attention_heads: int | None = key(None, "Heads of a ViT from scratch; 3 if not given.", within=AT_LEAST_ONE)
    intermediate_size: int | None = key(
        None, "MLP width of a ViT from scratch; mlp_ratio x hidden_size if not given.", within=AT_LEAST_ONE
    )
    mlp_ratio: float | None = key(
        None, "MLP width of a ViT from scratch as a multiple of hidden_size; 4 if not given.", within=POSITIVE
    )
    patch_size: int | None = key(
        None,
        "Side of a patch from scratch; 4 for a ViT and 2 for 'convnextv2' if not given.",
        within=AT_LEAST_ONE,
        unit="px",
    )
    hidden_sizes: list[int] | None = key(
        None, "Width of each stage of 'adaptive_cnn' or 'convnextv2'; the study's if not given.", within=AT_LEAST_ONE
    )
    depths: list[int] | None = key(
        None, "Blocks of each stage of 'adaptive_cnn' or 'convnextv2'; the study's if not given.", within=AT_LEAST_ONE
    )
    conv_stem: bool = key(
        False, "DeiT: two 3 x 3 convolutions at full resolution before the patches; a registered model of ours."
    )
    layer_scale_init: float | None = key(
        None,
        "DeiT: LayerScale on both residual branches, from this value; a registered model of ours.",
        within=POSITIVE,
    )
    cls_token_dropout: float = key(
        0.0,
        "DeiT: probability that the final cls token of a training image is replaced by the mean of its patch tokens.",
        within=FRACTION_BELOW_ONE,
    )
    inference_head: Literal["average", "cls", "distillation"] = key(
        "average",
        "DeiT: what the saved model answers with. 'cls' is saved as a DeiT with one head, 'distillation' as a "
        "registered model of ours.",
    )
    drop_path_rate: float = key(
        0.0, "Stochastic depth: drop rate of the last block, rising linearly from 0.", within=FRACTION_BELOW_ONE
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_name_or_path is not None:
            shape = (
                "architecture",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
                "mlp_ratio",
                "patch_size",
                "hidden_sizes",
                "depths",
                "layer_scale_init",
            )
            if self.architecture == "convnextv2":  # the weights' stages behind a stem for small images
                shape = tuple(name for name in shape if name not in ("architecture", "patch_size"))
            if given := [name for name in shape if getattr(self, name) is not None]:
                raise ValueError(f"keys 'model_name_or_path' and '{given[0]}' contradict: the weights fix the shape")
        elif self.hidden_size is not None or self.num_attention_heads is not None:
            width, heads = self.hidden_size or 192, self.num_attention_heads or 3
            if width % heads:
                raise ValueError(
                    f"key 'hidden_size': expected a multiple of num_attention_heads={heads}, found {width}"
                )
        if self.mlp_ratio is not None and self.intermediate_size is not None:
            raise ValueError("keys 'mlp_ratio' and 'intermediate_size' contradict: both fix the MLP's width")


@dataclass
class TeacherArguments(_Checked):
    """The frozen model that is learned from."""

    _argument_group_name = "teacher"

    teacher_model: str | None = key(None, "Hub id or folder of the teacher (transformers or timm, safetensors).")
    teacher_revision: str | None = key(None, "Branch, tag or commit of the teacher on the Hub.")
    teacher_image_size: int | None = key(
        None,
        "Side of the images the teacher sees; its image processor's if not given.",
        within=AT_LEAST_ONE,
        unit="px",
    )
    teacher_normalization: Literal["own", "dataset"] = key(
        "own",
        "Mean and standard deviation of the teacher's pixels: its own image processor's, or those of the data set.",
        published={"dataset": "the teacher sees colours shifted from those it was trained on"},
    )
    teacher_control: Literal["none", "untrained", "shuffled"] = key(
        "none",
        "Controls: 'untrained' draws the teacher's weights anew from `seed`; 'shuffled' shows it the next image of the "
        "per-device batch instead of the student's.",
    )
    teacher_assume_same_label_order: bool = key(
        False, "Trust that the teacher's classes are in the data set's order where its names cannot tell."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_model is None:
            raise ValueError("key 'teacher_model': expected a Hub id or a folder, found nothing")


@dataclass
class MeasurementArguments(_Checked):
    """What a finished model is shown, and where the results go."""

    _argument_group_name = "measurement"

    model_revision: str | None = key(None, "Branch, tag or commit of MODEL on the Hub.")
    split: Literal["test", "validation", "train"] = key("test", "Which split of the data set.")
    batch_size: int = key(256, "Images in one forward; results do not depend on it.", within=AT_LEAST_ONE)
    device: str | None = key(None, "Such as 'cpu' or 'cuda:1'; the machine's accelerator if not given.")
    output_dir: str | None = key(
        None, "Folder of the results; MODEL itself where it is a folder, outputs/<name> for one of the Hub."
    )
    teacher_model: str | None = key(None, "Hub id or folder of a model to compare with (transformers or timm).")
    teacher_revision: str | None = key(None, "Branch, tag or commit of it on the Hub.")
    teacher_image_size: int | None = key(
        None,
        "Side of the images it sees; its image processor's if not given.",
        within=AT_LEAST_ONE,
        unit="px",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device is not None:
            try:
                torch.device(self.device)
            except RuntimeError as error:
                raise ValueError(f"key 'device': expected a device such as cpu, found '{self.device}'") from error


@dataclass
class EvaluationArguments(MeasurementArguments):
    """How a model is evaluated."""

    baseline_model: str | None = key(
        None,
        "Hub id or folder of the matched control, trained without a teacher: gives the gain over it and, beside a "
        "teacher, how much of the gap is closed.",
    )
    teacher_assume_same_label_order: bool = key(
        False, "Trust that the teacher's classes are in the data set's order where its names cannot tell."
    )


ANALYSES = ("attention", "cka", "hessian")


@dataclass
class AnalysisArguments(MeasurementArguments):
    """What is measured of a model's inside."""

    compare: list[str] = key(
        [], "Models to put side by side, Hub ids or folders; analyses they hold already are read where they fit."
    )
    metrics: str = key(
        "attention,cka,hessian", "Which analyses, with commas: attention (distance, entropy), cka, hessian."
    )
    max_images: int = key(
        2048, "Images for attention and CKA, stratified by class, the same for every model.", within=Range(8)
    )
    analysis_seed: int = key(0, "Of the choice of images, of probes and of untrained twins.", within=NON_NEGATIVE)
    num_maps: int = key(4, "Images whose attention maps are drawn.", within=NON_NEGATIVE)
    untrained_reference: bool = key(True, "Measure the same architecture with random weights as well.")
    rows_per_batch: int = key(
        256, "Images that one term of the minibatch CKA is computed of, whatever batch_size is.", within=Range(8)
    )
    hessian_images: int = key(1024, "Images the loss is a mean over, for the Hessian.", within=AT_LEAST_ONE)
    hessian_batch_size: int = key(
        64,
        "Images in one micro-batch of it, which bounds its memory; results do not depend on it.",
        within=AT_LEAST_ONE,
    )
    max_probes: int = key(100, "Probes of the Hessian's trace at most.", within=Range(2))
    trace_tolerance: float = key(
        0.05, "Stop when the trace's standard error is below this share of it.", within=NON_NEGATIVE
    )
    lanczos_steps: int = key(
        40, "Steps of Lanczos at most; each keeps one vector of the model's size.", within=Range(2)
    )
    lanczos_starts: int = key(2, "Random starts that the spectral density is the mean of.", within=AT_LEAST_ONE)
    hessian_dtype: Literal["float32", "float64"] = key("float32", "Precision of the Hessian.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.analyses:
            if name not in ANALYSES:
                raise ValueError(f"key 'metrics': expected some of {','.join(ANALYSES)}, found '{name}'")

    @property
    def analyses(self) -> list[str]:
        """Which analyses, in the order they are made."""
        asked = [name.strip() for name in self.metrics.split(",")]
        return sorted(asked, key=lambda name: ANALYSES.index(name) if name in ANALYSES else 0)


@dataclass
class PublishArguments(_Checked):
    """Where a finished run goes on the Hub."""

    _argument_group_name = "publishing"

    hub_model_id: str | None = key(None, "Repo to push to, such as me/deit-tiny-cka; made where there is none.")
    private: bool = key(
        False, "Make the repo private when it is made; otherwise the owner's default holds. An existing one stays."
    )
    revision: str | None = key(None, "Branch to push to, made where there is none; the main branch if not given.")
    create_pr: bool = key(False, "Open a pull request instead of committing to the branch.")
    commit_message: str = key("Student, card and evidence", "Message of the commit.")
    dry_run: bool = key(False, "Render everything into a folder, print what would be pushed, and send nothing.")
    output_dir: str | None = key(None, "Folder of a dry run; RUN/hub if not given.")
    license: str | None = key(None, "License of the model, by the Hub's identifier; the run's if not given.")
    overwrite: bool = key(False, "Push into a repo that holds something other than a run of ours.")


@dataclass
class SupervisedTrainingArguments(_Checked, TrainingArguments):
    """`TrainingArguments` with the defaults that image batches made on the device need.

    Changed defaults: `remove_unused_columns=False` (augmentation needs the sample index), `dataloader_drop_last=True`
    (a short last batch would weigh more per image; evaluation always sees every image),
    `logging_nan_inf_filter=False` (a NaN is an error, not a gap), `ddp_find_unused_parameters=False` (every parameter
    gets a gradient), `tf32=False` (losses are in float32; stock bfloat16 with `torch_compile` turns it on for them),
    `data_seed=seed`.

    One process with several visible GPUs is refused: `torch.nn.DataParallel` would take another batch than was asked
    for, and no autocast.
    """

    _argument_group_name = "training"

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Remove columns the model does not take from a `datasets.Dataset`."}
    )
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Drop the last incomplete batch of training; evaluation sees every image."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave NaN and Inf out of the logged loss (they stop the run anyway)."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Passed to DistributedDataParallel; every parameter gets a gradient here."}
    )
    tf32: bool | None = field(
        default=False,
        metadata={"help": "TF32 in float32 matrix products, those of the losses too; convolutions use it either way."},
    )
    weight_decay_scope: Literal["weights", "all"] = key(
        "weights",
        "'weights': no decay on norms, biases, tokens and positions; 'all': on every parameter.",
        published={"all": "norms, biases, tokens and positions are decayed"},
    )
    ema_decay: float = key(
        0.0,
        "Decay of a moving average of the weights, per optimizer step; the average is evaluated and saved. It rises as "
        "(1 + step) / (10 + step) up to this value. 0 turns it off.",
        within=FRACTION_BELOW_ONE,
    )
    swa_start: float | None = key(
        None,
        "SWA: share of training after which the weights at the end of each epoch are averaged; the average is "
        "evaluated and saved.",
        within=FRACTION_BELOW_ONE,
    )
    swa_learning_rate: float | None = key(
        None,
        "SWA: learning rate that is approached over ten epochs from its start and then held; the schedule goes on as "
        "it is if not given.",
        within=NON_NEGATIVE,
    )
    early_stopping_patience: int | None = key(
        None,
        "Stop after so many evaluations in which metric_for_best_model has not improved.",
        within=AT_LEAST_ONE,
        unit="evaluations",
    )
    early_stopping_threshold: float = key(
        0.0, "How much it must improve to count.", within=NON_NEGATIVE, unit="the metric's own"
    )

    def __post_init__(self) -> None:
        _Checked.__post_init__(self)
        own_config = self.accelerator_config is None
        TrainingArguments.__post_init__(self)
        if self.ema_decay > 0 and self.swa_start is not None:
            raise ValueError("keys 'ema_decay' and 'swa_start' contradict: one average is evaluated and saved")
        if self.swa_learning_rate is not None and self.swa_start is None:
            raise ValueError("key 'swa_learning_rate': expected 'swa_start' with it, found none")
        if self.early_stopping_patience is not None and (
            self.eval_strategy == "no" or self.metric_for_best_model is None
        ):
            raise ValueError(
                "key 'early_stopping_patience': expected 'eval_strategy' and 'metric_for_best_model' with it, found "
                f"{self.eval_strategy} and {self.metric_for_best_model}"
            )
        if self.push_to_hub and self.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                "key 'hub_strategy': expected 'end' or 'every_save', found "
                f"'{HubStrategy(self.hub_strategy).value}': the optimizer's state in a checkpoint is never pushed"
            )
        # ranks are given different seeds for drop path; the order of the data must not follow them
        if self.data_seed is None:
            self.data_seed = self.seed
        if self.n_gpu > 1:
            raise ValueError(
                f"expected one process for each GPU, found one that sees {self.n_gpu}; start it as `accelerate launch "
                f"--multi_gpu --num_processes {self.n_gpu} {sys.argv[0] or 'SCRIPT'} ...`, or on one GPU "
                "with CUDA_VISIBLE_DEVICES=0"
            )
        self.set_float32_precision()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # pinning is for copies to an accelerator; without one torch only warns
        elif self.device.type == "cuda" and self.dataloader_pin_memory and own_config:
            self.accelerator_config.non_blocking = True  # what a batch is copied with, or every step begins with a wait

    @functools.cached_property  # every step asks several times
    def device(self) -> torch.device:
        """As `TrainingArguments.device`; without the index that one of several CPU processes is given.

        torch before 2.14 cannot load a checkpoint onto ``cpu:0``.
        """
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    def set_float32_precision(self) -> None:
        """Sets torch's switches as `tf32` says.

        transformers sets the new ones, convolutions' with them; unless the old ones agree, reading those raises. And an
        `Accelerator` for float32 with `torch_compile` turns TF32 on again, whatever was said.
        """
        if is_torch_tf32_available():
            torch.backends.cuda.matmul.allow_tf32 = bool(self.tf32)
            torch.backends.cudnn.allow_tf32 = True


@dataclass
class DistillationTrainingArguments(SupervisedTrainingArguments):
    """What every distillation shares."""

    distillation_warmup_type: Literal["linear", "step"] = key(
        "linear", "How distillation losses reach their weight over their warm-up epochs."
    )
    teacher_cache_dir: str | None = key(
        None, "Folder of teacher caches, shared by runs; 'hf_ihb/teacher_cache' in HF_HOME if not given."
    )
    teacher_dtype: Literal["auto", "float32", "bfloat16"] = key(
        "auto", "Precision of the teacher's weights; 'auto': bfloat16 where training runs in it, float32 elsewhere."
    )


@dataclass
class LogitDistillationTrainingArguments(DistillationTrainingArguments):
    """Cross-entropy on the cls head, distillation on the distillation head (on the same head where there is one)."""

    _argument_group_name = "training (method: logits)"

    method: Literal["logits"] = key("logits", "Learn from the teacher's class scores.")
    alpha: float = key(
        0.5,
        "Weight of the distillation loss (with a schedule: at the end); the task loss gets 1 - alpha.",
        within=FRACTION,
    )
    alpha_schedule: Literal["constant", "linear", "cosine"] = key(
        "constant", "How alpha goes from alpha_start to alpha between the warm-up and the end of training."
    )
    alpha_start: float = key(0.0, "Where a linear or cosine alpha_schedule begins.", within=FRACTION)
    distilled_heads: Literal["distillation", "both"] = key(
        "distillation",
        "'distillation': labels teach the cls head and the teacher the distillation head; 'both': both teach both.",
    )
    temperature: float = key(1.0, "Softmax temperature of student and teacher.", within=POSITIVE, unit="dimensionless")
    distillation_type: Literal["soft", "hard"] = key(
        "soft", "'soft': temperature^2 x KL divergence; 'hard': cross-entropy to the teacher's decision."
    )
    distillation_warmup_epochs: float = key(
        0.0, "Epochs over which alpha rises from 0 (see distillation_warmup_type).", within=NON_NEGATIVE, unit="epochs"
    )
    teacher_view: Literal["identical", "clean"] = key(
        "identical", "The teacher sees the student's augmented image ('identical') or the stored one ('clean')."
    )
    teacher_cache: Literal["auto", "off", "logits"] = key(
        "auto",
        "Ask the teacher once for each training image and keep its scores on disk ('logits', if teacher_view is "
        "'clean'), in every step ('off'), or whichever needs fewer teacher forwards ('auto').",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_cache == "logits" and self.teacher_view == "identical":
            raise ValueError(
                "keys 'teacher_cache' and 'teacher_view' contradict: the teacher sees a new image in every epoch, "
                "expected teacher_view 'clean' or teacher_cache 'off'"
            )

    def check_with(self, others: Iterable[Any]) -> None:
        """Refuses what contradicts other arguments of the run.

        Raises:
            ValueError: If the teacher would see a clean image where the student sees two mixed ones.
        """
        if self.teacher_view == "clean" and any(isinstance(o, AugmentationArguments) and o.mixes for o in others):
            raise ValueError(
                "keys 'teacher_view' and 'mixup_alpha' or 'cutmix_alpha' contradict: a clean view is not mixed"
            )


@dataclass
class StructuralDistillationTrainingArguments(DistillationTrainingArguments):
    """Task loss plus CKA, Gram and token losses between blocks of student and teacher."""

    _argument_group_name = "training (method: structural)"

    method: Literal["structural"] = key("structural", "Learn from the structure of the teacher's features.")
    task_loss_weight: float = key(1.0, "Weight of the cross-entropy on the labels.", within=NON_NEGATIVE)
    cka_weight: float = key(0.0, "Weight of 1 - CKA.", within=NON_NEGATIVE)
    gram_weight: float = key(0.0, "Weight of the distance of token similarity matrices.", within=NON_NEGATIVE)
    token_weight: float = key(
        0.0,
        "Weight of 1 - cosine of linearly mapped student tokens and standardised teacher tokens.",
        within=NON_NEGATIVE,
    )
    relation_weight: float = key(
        0.0,
        "Weight of the divergence between the similarities of each image to the others of the batch (mean tokens of "
        "the student's last block and of the deepest of teacher_layers, each after its model's final norm).",
        within=NON_NEGATIVE,
    )
    cka_warmup_epochs: float = key(0.0, "Warm-up of cka_weight.", within=NON_NEGATIVE, unit="epochs")
    gram_warmup_epochs: float = key(0.0, "Warm-up of gram_weight.", within=NON_NEGATIVE, unit="epochs")
    token_warmup_epochs: float = key(0.0, "Warm-up of token_weight.", within=NON_NEGATIVE, unit="epochs")
    relation_warmup_epochs: float = key(0.0, "Warm-up of relation_weight.", within=NON_NEGATIVE, unit="epochs")
    student_layers: list[int] = key(
        [5, 8, 11], "Student blocks whose outputs are compared.", within=NON_NEGATIVE, unit="0-based block index"
    )
    teacher_layers: list[int] | None = key(
        None,
        "Teacher blocks (CNN: stages), one for each student block; student_layers if not given.",
        within=NON_NEGATIVE,
        unit="0-based block index",
    )
    cka_scope: Literal["tokens", "pooled", "images"] = key(
        "tokens",
        "CKA over the tokens of each image; over all tokens of the batch, pooled; or over its images (mean tokens). "
        "The batch is that of all processes; gradient accumulation does not widen it.",
    )
    cka_estimator: Literal["biased", "debiased", "published"] = key(
        "debiased",
        "Estimator of CKA; 'published' is the biased one of L2-normalised tokens with an absolute epsilon.",
        published={"published": "the epsilon drowns the value where the tokens of an image are alike"},
    )
    cka_kernel: Literal["linear", "rbf"] = key("linear", "Kernel of CKA; 'rbf' not with cka_scope 'pooled'.")
    rbf_bandwidth: float = key(
        1.0, "Width of the RBF kernel as a multiple of the median distance.", within=POSITIVE, unit="median distances"
    )
    gram_normalization: Literal["mean_square", "published"] = key(
        "mean_square",
        "Gram loss: squared differences over N^2 entries, or the published Frobenius norm over N^2.",
        published={"published": "the loss is about 0.001 and has no gradient to speak of"},
    )
    relation_temperature: float = key(
        0.1, "Softmax temperature of the relation loss.", within=POSITIVE, unit="dimensionless"
    )
    relation_include_self: bool = key(
        False,
        "Relation loss: keep each image's similarity to itself, which is always 1.",
        published={True: "the softmax is nearly one-hot at the image itself"},
    )
    center_positions: bool = key(
        True,
        "Remove position codes before CKA and Gram: the mean over the training images from the teacher's tokens, the "
        "mean over the batch of all processes from the student's.",
    )
    teacher_projector: Literal["none", "trainable"] = key(
        "none",
        "'trainable': MLP heads on both sides, a pair for each layer of each of the token, CKA and Gram losses.",
        published={"trainable": "the teacher's heads are trained too, so the loss can be met without any content"},
    )
    task_heads: Literal["inference", "cls"] = key(
        "inference",
        "Heads that the labels teach: those that inference uses, or the cls head alone.",
        published={"cls": "the distillation head stays random and is averaged in at inference"},
    )
    teacher_norm: bool = key(False, "Apply the teacher's final norm to the output of every block, as DINOv2 does.")
    teacher_view: Literal["shared", "clean", "identical"] = key(
        "shared",
        "'shared': the teacher sees the stored image and its tokens follow the student's crop and flip; 'clean': they "
        "do not; 'identical': it sees the student's augmented image.",
        published={"clean": "student and teacher tokens that are compared look at different places"},
    )
    teacher_statistics_samples: int = key(
        1024, "Training images from which the teacher's feature statistics are taken.", within=Range(2), unit="images"
    )
    teacher_cache: Literal["auto", "off", "tokens", "gram"] = key(
        "auto",
        "Ask the teacher once for each training image and keep on disk its tokens ('tokens') or their inner products "
        "('gram', enough for CKA and Gram losses over tokens and far smaller); ask in every step ('off'); or the "
        "smallest that will do, where it saves teacher forwards ('auto').",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_layers is not None and len(self.teacher_layers) != len(self.student_layers):
            raise ValueError(
                f"keys 'student_layers' and 'teacher_layers' contradict: expected as many blocks of each, found "
                f"{self.student_layers} and {self.teacher_layers}"
            )
        if not self.student_layers:
            raise ValueError("key 'student_layers': expected at least one block, found []")
        if self.teacher_cache in ("tokens", "gram") and self.teacher_view == "identical":
            raise ValueError(
                "keys 'teacher_cache' and 'teacher_view' contradict: the teacher sees a new image in every epoch, "
                "expected teacher_view 'shared' or 'clean', or teacher_cache 'off'"
            )
        if self.teacher_cache == "gram" and (need := self.needs_teacher_tokens()) is not None:
            raise ValueError(
                f"keys 'teacher_cache' and '{need}' contradict: inner products of an image's tokens are not enough, "
                "expected teacher_cache 'tokens'"
            )
        if self.cka_weight == self.gram_weight == self.token_weight == self.relation_weight == 0:
            raise ValueError(
                "keys 'cka_weight', 'gram_weight', 'token_weight' and 'relation_weight': expected one of them to be "
                "> 0, found 0"
            )
        if self.cka_kernel == "rbf" and self.cka_scope == "pooled":
            raise ValueError("keys 'cka_kernel' and 'cka_scope' contradict: an RBF kernel of all tokens has no room")
        if self.cka_estimator == "published" and (self.cka_scope == "pooled" or self.cka_kernel == "rbf"):
            raise ValueError(
                "keys 'cka_estimator' and 'cka_scope' contradict: 'published' compares tokens or images, linearly"
            )

    def needs_teacher_tokens(self) -> str | None:
        """The key because of which inner products within an image are not all that the losses need of the teacher."""
        if self.teacher_projector == "trainable":
            return "teacher_projector"
        if self.cka_weight > 0 and self.cka_scope != "tokens":
            return "cka_scope"
        return next((f"{name}_weight" for name in ("token", "relation") if getattr(self, f"{name}_weight") > 0), None)
