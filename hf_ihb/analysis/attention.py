"""How far the patches of a ViT look, layer by layer."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ihb.analysis.base import Analysis, Results, Section, SharedArguments, batches
from hf_ihb.config.fields import NON_NEGATIVE, key
from hf_ihb.data import StoredSplit
from hf_ihb.functional.attention import uniform_attention_distance
from hf_ihb.markdown import Markdown, is_number, measured_on, table, value_or_nothing
from hf_ihb.models.attention import (
    AttentionAccumulator,
    attention_geometry,
    capture_attention,
    cls_attention_maps,
    has_attention,
)
from hf_ihb.models.features import size_arguments
from hf_ihb.models.pretrained import Pretrained, untrained_twin

_THUMBNAIL_PX = 64
_MAP_LAYERS = 4
# Key of a layer's statistics -> title of the column, format.
_STATISTICS = {
    "distance": ("distance (patches)", "{:.3f}"),
    "distance_relative": ("relative to uniform", "{:.3f}"),
    "distance_px": ("distance (px)", "{:.2f}"),
    "entropy": ("entropy (nats)", "{:.3f}"),
    "special_token_mass": ("special-token mass", "{:.3f}"),
}
_CARD = """\
How far a patch looks: its distance to every patch, weighted by the attention it pays, in patches of {patch}
on a grid of {grid}; a mean over heads, query patches and the {on}. Attention without any
preference has distance {uniform}: a layer near that (relative value 1) looks everywhere alike, one well below
it looks nearby. {means}

{table}"""


@dataclass
class AttentionAnalysis(Analysis):
    """Attention distance, entropy and attention to special tokens (Dosovitskiy et al., 2021, appendix D.7).

    Beside the model stands the same architecture without training.

    References:
        Dosovitskiy et al., 2021, https://arxiv.org/abs/2010.11929.
    """

    untrained_reference: bool = key(True, "Measure the same architecture with random weights as well.")
    num_maps: int = key(4, "Images whose attention maps are drawn.", within=NON_NEGATIVE)

    name: ClassVar = "attention"
    summary: ClassVar = "attention (distance, entropy)"
    topic: ClassVar = "attention"
    title: ClassVar = "Attention distance"
    shows_teaching: ClassVar = True
    plots: ClassVar = {
        "attention_distance": "attention distance of each layer and head",
        "attention_statistics": "entropy and mass on special tokens, layer by layer",
        "attention_maps": "where some images are looked at",
    }
    card_plot: ClassVar = ("attention_distance", "Mean attention distance of each layer")
    references: ClassVar = (("ViT, attention distance (appendix D.7): Dosovitskiy et al., 2021", "2010.11929"),)

    @classmethod
    def applies_to(cls, model: Any, pixels: Tensor) -> bool:
        """Whether the model has self-attention over all patches."""
        return has_attention(model, pixels)

    def compute(
        self,
        subject: Pretrained,
        split: StoredSplit,
        rows: Tensor,
        args: SharedArguments,
        teacher: Pretrained | None = None,
    ) -> dict[str, Any]:
        """How far patches look in each layer, for the model and for the same architecture without training.

        Returns:
            Grid, patch size and prefix tokens; ``uniform_distance`` of attention without preference; ``layers`` in the
            form of `AttentionAccumulator.layers`; ``untrained`` likewise; ``maps`` of a few images. Distances are in
            patches.

        Raises:
            ModelLoadError: If the model has no self-attention over all patches.
        """
        measured = _statistics(subject, split, rows, args.batch_size, "Attention")
        geometry = measured.geometry
        layers = measured.layers()
        untrained = None
        if self.untrained_reference:
            twin = subject._replace(model=untrained_twin(subject.model, args.analysis_seed))
            reference = _statistics(twin, split, rows, args.batch_size, "Attention, untrained")
            untrained = {
                "seed": args.analysis_seed,
                "mean_distance": reference.mean_distance,
                "layers": reference.layers(),
            }
        return {
            "grid": list(geometry.grid),
            "patch_size_px": [geometry.patch_size, geometry.patch_size],
            "num_prefix_tokens": geometry.num_prefix_tokens,
            "num_images": measured.num_images,
            "uniform_distance": uniform_attention_distance(geometry.grid),
            "mean_distance": measured.mean_distance,
            "layers": layers,
            "untrained": untrained,
            "maps": _maps(subject, split, rows, self.num_maps, len(layers), geometry.has_cls),
        }

    @classmethod
    def columns(cls) -> dict[str, Callable[[Section], str]]:
        """Means over layers."""
        return {
            "mean distance, patches": lambda section: f"{section['mean_distance']:.3f}",
            "of uniform": lambda section: f"{section['mean_distance'] / section['uniform_distance']:.3f}",
            "untrained": lambda section: (
                "" if section["untrained"] is None else f"{section['untrained']['mean_distance']:.3f}"
            ),
            "entropy, nats": lambda section: f"{_mean(section, 'entropy'):.3f}",
            "special tokens": lambda section: f"{_mean(section, 'special_token_mass'):.3f}",
        }

    @classmethod
    def plot(cls, results: Results, path_of: Callable[[str], Path], *, is_single: bool) -> None:
        """Distance and other statistics by layer; maps of a single model alone."""
        from hf_ihb.plots import attention_distance_plot, attention_map_plot, attention_statistics_plot

        attention_distance_plot(results, path_of("attention_distance"))
        attention_statistics_plot(results, path_of("attention_statistics"))
        single = next(iter(results.values())) if is_single else None
        if single is not None and single["attention"]["maps"]:
            attention_map_plot(single, path_of("attention_maps"))

    @classmethod
    def card_text(cls, result: Mapping[str, Any]) -> Markdown:
        """How far patches look, layer by layer."""
        section = result["attention"]
        untrained = section["untrained"] or {}
        titles = [title for title, _ in _STATISTICS.values()]
        rows: list[list[Any]] = [[Markdown(title) for title in ("layer", *titles, "untrained twin")]]
        for row, twin in zip(section["layers"], untrained.get("layers", [{}] * len(section["layers"])), strict=True):
            values = [value_or_nothing(row[name], text) for name, (_, text) in _STATISTICS.items()]
            rows.append([row["layer"], *values, value_or_nothing(twin.get("distance"), "{:.3f}")])
        means = Markdown("The mean over layers is {} patches").format(
            value_or_nothing(section["mean_distance"], "{:.3f}")
        )
        if untrained:
            mean = value_or_nothing(untrained["mean_distance"], "{:.3f}")
            means += Markdown("; of the untrained twin, the same architecture with random weights, {}").format(mean)
        return Markdown(_CARD).format(
            on=measured_on(result["data"]),
            grid=Markdown("{} x {}").format(*section["grid"]),
            patch=Markdown("{} x {} px").format(*section["patch_size_px"]),
            uniform=value_or_nothing(section["uniform_distance"], "{:.3f}"),
            means=means + Markdown("."),
            table=table(rows),
        )

    @classmethod
    def card_metrics(cls, section: Section) -> Iterator[dict[str, Any]]:
        """The mean attention distance of each layer, in patches."""
        shared = {
            "unit": "patches",
            "reduction": "mean over heads, query patches and images",
            "uniform_distance": section["uniform_distance"],
            "num_images": section["num_images"],
        }
        for row in section["layers"]:
            if is_number(row["distance"]):
                yield {
                    "metric_type": "mean_attention_distance",
                    "metric_value": float(row["distance"]),
                    "metric_name": f"Mean attention distance, layer {row['layer']}",
                    "metric_args": {"layer": row["layer"], **shared},
                }


def _mean(section: Section, name: str) -> float:
    layers = section["layers"]
    return sum(layer[name] for layer in layers) / len(layers)


def _statistics(
    subject: Pretrained, split: StoredSplit, rows: Tensor, batch_size: int, description: str
) -> AttentionAccumulator:
    model, accumulator = subject.model, None
    for pixels, _ in batches(subject, split, rows, batch_size, description):
        accumulator = accumulator or AttentionAccumulator(attention_geometry(model, pixels))
        _add_batch(model, pixels, accumulator)
    return accumulator


def _add_batch(model: Any, pixels: Tensor, accumulator: AttentionAccumulator) -> None:
    capture_attention(
        model,
        pixels,
        lambda layer, attention: accumulator.update(layer, accumulator.geometry.statistics(attention)),
        **size_arguments(model, pixels),
    )


def _maps(
    subject: Pretrained, split: StoredSplit, rows: Tensor, most: int, num_layers: int, has_cls: bool
) -> list[dict[str, Any]]:
    """Where at most so many images of different classes are looked at, in layers spread over the depth."""
    count = min(most, len(rows))
    if count == 0:
        return []
    some = rows[_one_of_each_class(split.labels[rows])[:count]]
    chosen = sorted({round(i) for i in torch.linspace(0, num_layers - 1, min(_MAP_LAYERS, num_layers)).tolist()})
    pixels, labels = next(batches(subject, split, some, count))
    maps = cls_attention_maps(subject.model, pixels, **size_arguments(subject.model, pixels))
    images = split.__getitems__(some)["pixel_values"].float()
    if max(images.shape[-2:]) > _THUMBNAIL_PX:
        scale = _THUMBNAIL_PX / max(images.shape[-2:])
        images = F.interpolate(images, scale_factor=scale, mode="area")
    images = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).round().to(torch.uint8)
    return [
        {
            "index": int(some[i]),
            "label": split.label_names[int(labels[i])],
            "image": images[i].tolist(),
            "prefix_token": "cls" if has_cls else None,
            "layers": chosen,
            "weights": [[[round(w, 6) for w in row] for row in maps[layer][i].tolist()] for layer in chosen],
        }
        for i in range(count)
    ]


def _one_of_each_class(labels: Tensor) -> list[int]:
    """Positions of the first image of every class, then of the second of every class, and so on."""
    seen: Counter[int] = Counter()
    turns = []
    for label in labels.tolist():
        turns.append((seen[label], label))
        seen[label] += 1
    return sorted(range(len(turns)), key=turns.__getitem__)
