"""Keys of measuring a finished model, and of evaluating it; those of analysing it are in `hf_ihb.analysis`."""

from dataclasses import dataclass
from typing import Literal

import torch

from hf_ihb.config.fields import AT_LEAST_ONE, Checked, key


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
        "Side to which whole images are brought for it; if not given, its image processor's own steps are followed.",
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
