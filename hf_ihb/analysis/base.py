"""What every analysis has: settings, a computation, and how its numbers are shown."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_ihb.config.fields import NON_NEGATIVE, Checked, Range, key
from hf_ihb.config.measure import MeasurementArguments
from hf_ihb.data import StoredSplit
from hf_ihb.errors import ModelLoadError
from hf_ihb.markdown import Markdown
from hf_ihb.models.features import extract_features, layout_of, size_arguments
from hf_ihb.models.files import UNREADABLE, one_line
from hf_ihb.models.pretrained import Pretrained

Section = Mapping[str, Any]
Results = Mapping[str, Mapping[str, Any]]


@dataclass
class SharedArguments(MeasurementArguments):
    """Keys that all analyses share."""

    compare: list[str] = key(
        [], "Models to put side by side, Hub ids or folders; analyses they hold already are read where they fit."
    )
    max_images: int = key(
        2048,
        "Images that a model is shown, stratified by class, the same for every model and analysis but the Hessian.",
        within=Range(8),
    )
    analysis_seed: int = key(0, "Of the choice of images, of probes and of untrained twins.", within=NON_NEGATIVE)


@dataclass
class Analysis(Checked):
    """A look at a model's inside.

    A subclass is a dataclass; its fields, made by `key`, are its settings and become keys of `AnalysisArguments`. Their
    names are those of no other analysis. What it computes is a dictionary of plain numbers, its section of
    analysis.json; whatever shows them (table, plots, card) reads that section alone.

    Attributes:
        name: Of its section, and in the key `metrics`.
        summary: What it is, for ``--help``.
        topic: What it is about, in a list of such.
        title: Heading of its section of the card.
        shared_settings: Keys of `SharedArguments` that its numbers depend on, beside those that choose the images.
        free_settings: Own keys that its numbers do not depend on, such as what bounds its memory.
        in_default_metrics: Whether it is made where `metrics` is not given.
        compares_teacher: Whether its numbers are of the teacher as well; another teacher ends them.
        shows_teaching: Whether a reader may take its numbers for what the teacher did to a student.
        plots: Name of each of its plots, without folder and ending -> what it shows.
        card_plot: The plot in its section of the card, and the text in its place.
        references: What it stands on, for the card: what and by whom, and the arXiv id.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    topic: ClassVar[str]
    title: ClassVar[str]
    shared_settings: ClassVar[tuple[str, ...]] = ()
    free_settings: ClassVar[tuple[str, ...]] = ()
    in_default_metrics: ClassVar[bool] = True
    compares_teacher: ClassVar[bool] = False
    shows_teaching: ClassVar[bool] = False
    plots: ClassVar[Mapping[str, str]] = {}
    card_plot: ClassVar[tuple[str, str] | None] = None
    references: ClassVar[tuple[tuple[str, str], ...]] = ()

    @classmethod
    def of(cls, args: SharedArguments) -> Self:
        """The analysis with its settings of `AnalysisArguments`."""
        return cls(**{f.name: getattr(args, f.name) for f in fields(cls)})

    @classmethod
    def deciding_settings(cls) -> tuple[str, ...]:
        """The keys that its numbers depend on, beside the model and the images."""
        own = (f.name for f in fields(cls) if f.name not in cls.free_settings)
        return (*own, *cls.shared_settings)

    @classmethod
    def applies_to(cls, model: Any, pixels: Tensor) -> bool:
        """Whether it can be made of a model, judged by a normalised batch ``(B, C, H, W)``."""
        return True

    def compute(
        self,
        subject: Pretrained,
        split: StoredSplit,
        rows: Tensor,
        args: SharedArguments,
        teacher: Pretrained | None = None,
    ) -> dict[str, Any]:
        """Looks at a model.

        Args:
            subject: The model, on the device to work on; it is left as it is.
            split: Images.
            rows: ``(N,)``, int64: which images of the split.
            args: What all analyses share, such as the batch size.
            teacher: A second model on the same device.

        Returns:
            Its section of analysis.json: what JSON can hold.

        Raises:
            ModelLoadError: If it does not apply to the model.
            NumericsError: If a loss or a product is not finite.
        """
        raise NotImplementedError

    @classmethod
    def columns(cls) -> dict[str, Callable[[Section], str]]:
        """Title of each column of the printed table -> what it shows of a section."""
        return {}

    @classmethod
    def plot(cls, results: Results, path_of: Callable[[str], Path], *, is_single: bool) -> None:
        """Draws what it has the numbers for.

        matplotlib is imported by those who draw alone: nothing else that deals with analyses needs it.

        Args:
            results: Name of a model -> its analysis, each with this section.
            path_of: Where to write the plot of this name; called for those that are drawn.
            is_single: Whether the picture is of one model, not of several side by side.
        """

    @classmethod
    def card_text(cls, result: Mapping[str, Any]) -> Markdown | None:
        """What the card says of a result that has this section; None where there is nothing to say."""
        return None

    @classmethod
    def card_metrics(cls, section: Section) -> Iterator[dict[str, Any]]:
        """Entries of the card's model index: ``metric_type``, ``metric_value``, ``metric_name``, ``metric_args``."""
        yield from ()


def batches(
    subject: Pretrained, split: StoredSplit, rows: Tensor, batch_size: int, description: str = ""
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised pixels and labels on the model's device; with a progress bar where there is a description.

    Args:
        subject: The model that the pixels are for.
        split: Images, shown as the model's image processor makes them.
        rows: ``(N,)``: which of them, in this order.
        batch_size: Images in a batch; the last may be smaller.
        description: What the progress bar says.

    Yields:
        Pixels ``(B, C, H, W)``, labels ``(B,)``.
    """
    device, split = subject.model.device, split.through(subject.pixels.geometry)
    with tqdm(total=len(rows), desc=description, unit="img", disable=not description) as bar:
        for some in rows.split(batch_size):
            batch = split.__getitems__(some)
            images = batch["pixel_values"].to(device)
            yield subject.pixels.apply(images, split.geometry), batch["labels"].to(device)
            bar.update(len(some))


@torch.no_grad()
def mean_patch_tokens(subject: Pretrained, pixels: Tensor) -> list[Tensor]:
    """``(B, width)`` of each layer: block outputs averaged over patch tokens (over positions for a CNN).

    Raises:
        ModelLoadError: If its blocks cannot be found, or it does not take such images.
    """
    arguments = size_arguments(subject.model, pixels)
    try:
        layout_of(subject.model, pixels, **arguments)
    except UNREADABLE as error:
        raise ModelLoadError(
            f"model '{subject.name}': expected one that takes images of {tuple(pixels.shape[1:])} and returns its "
            f"blocks, found: {one_line(error)}"
        ) from error
    _, maps = extract_features(subject.model, pixels, None, **arguments)
    return [feature_map.patch_tokens.mean(dim=1) for feature_map in maps]
