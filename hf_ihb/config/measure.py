"""Keys of evaluating and analysing a finished model."""

from dataclasses import dataclass
from typing import Literal

import torch

from hf_ihb.config.fields import AT_LEAST_ONE, NON_NEGATIVE, Checked, Range, key


@dataclass
class MeasurementArguments(Checked):
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


def analyses_of(key_name: str, text: str) -> list[str]:
    """The analyses that a key names, with commas between them, in the order they are made.

    Raises:
        ValueError: If there is no such analysis.
    """
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in ANALYSES]:
        raise ValueError(f"key '{key_name}': expected some of {','.join(ANALYSES)}, found '{unknown[0]}'")
    return sorted(names, key=ANALYSES.index)


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
        analyses_of("metrics", self.metrics)

    @property
    def analyses(self) -> list[str]:
        """Which analyses, in the order they are made."""
        return analyses_of("metrics", self.metrics)
