"""What the teacher says of a batch, live or from its cache, brought to where the student looks."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm
from transformers import Trainer, TrainingArguments

from hf_ihb.data import StoredSplit, host_index, placement
from hf_ihb.errors import DataError, NumericsError, RecipeError, TeacherMismatchError
from hf_ihb.functional.gram import TokenGram
from hf_ihb.functional.resampling import Resampler
from hf_ihb.functional.tokens import TokenMean, pool_tokens, standardize_tokens
from hf_ihb.methods import Method
from hf_ihb.models.correspondence import Correspondence
from hf_ihb.models.features import FeatureMap
from hf_ihb.step import Preparation, Step, TeacherOutputs, TeacherTokens, Views
from hf_ihb.trainer.compiling import compiled
from hf_ihb.trainer.phi_s import measure_phi_s
from hf_ihb.trainer.teacher_attention import TeacherAttention
from hf_ihb.trainer.teacher_cache import TeacherCache, cache_root
from hf_ihb.trainer.teacher_rows import TeacherRows
from hf_ihb.trainer.teacher_views import TeacherViews
from hf_ihb.trainer.view_cache import ViewCache

# Relative error between a row of the cache and the same row computed anew: storage and, in bfloat16, kernels that round
# differently in another batch.
_TOLERANCES = {torch.float32: 1e-2, torch.bfloat16: 5e-2, torch.float16: 5e-2}

_SHARE_OF_DISK = 0.25  # that 'auto' may take of what is free


class Parts(NamedTuple):
    """What a teacher says of a batch, before it is brought to where the student looks.

    Attributes:
        logits: ``(B, K)`` class scores; None where they were not asked for.
        layers: ``(B, N, D)`` of each layer, the final tokens last, or their `TokenGram` or `TokenMean`, of those layers
            that are learned from; None likewise.
        attentions: ``(B, N, N)`` attention between patches of each layer; None likewise.
    """

    logits: Tensor | None = None
    layers: Sequence[Tensor | TokenGram | TokenMean] | None = None
    attentions: Sequence[Tensor] | None = None


class TeacherSide:
    """Asks a trainer's teacher once for each distinct view, and keeps the cache of what it says of stored images.

    Args:
        trainer: Gives teacher, images and the device; its arguments are read when it is asked.
        args: Of the training.
        methods: That learn from it.
        layers: How its layers fit the student's; None where no method learns from features.
    """

    def __init__(
        self, trainer: Trainer, args: TrainingArguments, methods: Sequence[Method], layers: Correspondence | None
    ) -> None:
        self.trainer, self.methods, self.layers = trainer, list(methods), layers
        self.cache: TeacherCache | None = None
        self.statistics: list[tuple[Tensor, Tensor]] | None = None
        self.rotations: list[Tensor] | None = None
        needs = [method.needs for method in methods]
        self.asks_attention = any(need.teacher_attention for need in needs)
        self._attention = TeacherAttention(trainer.teacher, layers) if self.asks_attention else None
        self.asks_logits = any(need.logits for need in needs)
        self.preparations: list[Preparation] = list(dict.fromkeys(n.preparation for n in needs if n.layers))
        self._align = compiled(self._aligned, args)
        self.rows, self.views = TeacherRows(self), TeacherViews(self)

    @property
    def sees_whole_images(self) -> bool:
        """Whether the teacher is shown all of each image, where its image processor would crop.

        Tokens are compared place by place, so that it must be known where they look. Scores are those of the same
        forward.
        """
        return self.layers is not None

    @property
    def leaves_crop_out(self) -> bool:
        """Whether that is not what the teacher's image processor does."""
        pixels = self.trainer.teacher.pixels
        return self.sees_whole_images and pixels is not None and pixels.crops

    # ---- Asking ----

    def outputs(self, step: Step, *, shuffled: bool) -> TeacherOutputs:
        """What the teacher says of a training batch.

        Args:
            step: Of the batch.
            shuffled: Whether each image is answered for by the next one of the batch.
        """
        parts = self._read(step, shuffled)
        logits, layers = self.views(step, shuffled=shuffled)
        parts = Parts(parts.logits if logits is None else logits, parts.layers if layers is None else layers)
        wanted = (self.asks_logits and parts.logits is None, self.layers is not None and parts.layers is None)
        live = self._ask(step.inputs, step.views, *wanted, shuffled=shuffled)
        logits = live.logits if parts.logits is None else parts.logits
        if self.layers is None:
            return TeacherOutputs(logits)
        follows = step.views is not None and self.trainer.args.teacher_view == "shared"
        layers = live.layers if parts.layers is None else parts.layers
        aligned = self._align(layers, step.views.affine if follows else None, live.attentions)
        return TeacherOutputs(logits, *aligned)

    def logits(self, inputs: Mapping[str, Any]) -> Tensor:
        """``(B, K)`` class scores of images as they are stored."""
        return self._ask(inputs, None, True, False).logits

    def _ask(
        self, inputs: Mapping[str, Any], views: Views | None, logits: bool, layers: bool, *, shuffled: bool = False
    ) -> Parts:
        """Scores and features, as far as they are wanted, with one forward where both see the same."""
        args = self.trainer.args
        augmented = (args.teacher_logits_view == "identical", args.teacher_view == "identical")
        if logits and layers and (augmented[0] == augmented[1] or views is None):
            pixels = self._pixels(inputs, views, augmented[0], shuffled)
            with self._attention_to(pixels) as attentions:
                scores, maps = self.forward(pixels, logits=True, layers=True)
            return Parts(scores, self.pooled(maps), attentions)
        scores = maps = attentions = None
        if logits:
            scores, _ = self.forward(self._pixels(inputs, views, augmented[0], shuffled), logits=True)
        if layers:
            pixels = self._pixels(inputs, views, augmented[1], shuffled)
            with self._attention_to(pixels) as attentions:
                _, maps = self.forward(pixels, layers=True)
        return Parts(scores, None if maps is None else self.pooled(maps), attentions)

    def _attention_to(self, pixels: Tensor) -> AbstractContextManager[list[Tensor] | None]:
        """A list of the attention maps of a forward inside; None where no method needs them."""
        return nullcontext() if self._attention is None else self._attention.taken(pixels)

    def _pixels(self, inputs: Mapping[str, Any], views: Views | None, augmented: bool, shuffled: bool) -> Tensor:
        """What the teacher sees of a batch, normalised; one view serves its scores and its features."""
        teacher = self.trainer.teacher
        if "teacher_pixel_values" in inputs:
            pixels = inputs["teacher_pixel_values"]
        elif views is not None:
            pixels = teacher.prepare(views.seen if augmented else views.images, self.sees_whole_images)
        elif inputs["pixel_values"].dtype == torch.uint8:
            pixels = teacher.prepare(inputs["pixel_values"], self.sees_whole_images)
        elif teacher.pixels is None or teacher.pixels == self.trainer.batches.pixels:
            pixels = inputs["pixel_values"]
        else:
            raise TeacherMismatchError(
                f"batches of float 'pixel_values': expected 'teacher_pixel_values' beside them, as teacher "
                f"'{teacher.name}' has an image processor that is not the student's, found none"
            )
        return pixels.roll(-1, dims=0) if shuffled else pixels

    def forward(
        self, pixels: Tensor, *, logits: bool = False, layers: bool = False
    ) -> tuple[Tensor | None, list[FeatureMap]]:
        """Scores ``(B, K)`` and features of prepared pixels, as far as they are wanted."""
        teacher, norm = self.trainer.teacher, self.trainer.args.teacher_norm
        with torch.no_grad(), self.trainer.accelerator.autocast():
            if not layers:
                return teacher.logits(pixels), []
            if logits:
                scores, maps = teacher.logits_and_features(pixels, self.layers.teacher_layers, norm)
            else:
                scores, maps = None, teacher.features(pixels, self.layers.teacher_layers, norm)
        return scores, [m._replace(tokens=m.tokens.float()) for m in maps]

    def pooled(self, maps: Sequence[FeatureMap]) -> list[Tensor]:
        """Patch tokens of each layer, and last the final ones, where there are any."""
        tokens = self.layers.pool(maps)
        if self.layers.has_final:
            final = self._final_map(maps)
            tokens.append(pool_tokens(final.patch_tokens, final.grid, self.layers.grids[-1])[0])
        return tokens

    def _final_map(self, maps: Sequence[FeatureMap]) -> FeatureMap:
        """The deepest layer after the teacher's final norm."""
        deepest = self.layers.deepest(maps)
        return deepest if self.trainer.args.teacher_norm else self.trainer.teacher.normed(deepest)

    def _aligned(
        self,
        layers: Sequence[Tensor | TokenGram | TokenMean],
        affine: Tensor | None,
        attentions: Sequence[Tensor] | None,
    ) -> tuple[dict[Preparation, list[TeacherTokens]], TeacherTokens | None, list[Tensor] | None]:
        """Tokens of each layer, prepared and at the places where the student's look, and attention between them.

        One graph where it is compiled.
        """
        move, geometry = Resampler(affine), self.layers

        def moved(layer: int, preparation: Preparation) -> TeacherTokens:
            ready = isinstance(layers[layer], TokenGram)  # prepared before its inner products were taken
            tokens = layers[layer] if ready else self.prepared(layers[layer], layer, preparation)
            return TeacherTokens(*move(tokens, geometry.teacher_grids[layer], geometry.grids[layer]))

        count = len(geometry.teacher_layers)
        prepared = {p: [moved(layer, p) for layer in range(count)] for p in self.preparations}
        final = None
        if geometry.has_final:
            final = TeacherTokens(*move(layers[-1], geometry.teacher_grids[-1], geometry.grids[-1]))
        if attentions is None:
            return prepared, final, None

        def between(attention: Tensor, layer: int) -> Tensor:
            grids = geometry.teacher_grids[layer], geometry.grids[layer]
            rows, _ = move(attention, *grids)
            return move(rows.mT, *grids)[0].mT

        return prepared, final, [between(attention, layer) for layer, attention in enumerate(attentions)]

    def prepared(self, tokens: Tensor, layer: int, preparation: Preparation) -> Tensor:
        """Tokens ``(B, N, D)`` of a layer without the mean of their position, or standardized, as a method wants."""
        if preparation == "plain":
            return tokens
        mean, std = self.statistics[layer]
        if preparation == "centered":
            return tokens - mean
        if self.rotations is not None:
            with torch.autocast(tokens.device.type, enabled=False):
                return (tokens.float() - mean) @ self.rotations[layer]
        return standardize_tokens(tokens, mean, std)

    # ---- Statistics ----

    def _take_statistics(self, cache: TeacherCache | None, views: ViewCache | None) -> None:
        """Those that methods need, and codes of rows.

        The cache that holds features, one of the two at most, keeps them: it is named after the layers.
        """
        self.statistics = None
        stored, of_views = (cache.layout.features if cache else ""), (views.row.features if views else "")
        features = stored or of_views
        prepares = not set(self.preparations) <= {"plain"}
        if not prepares and features in ("", "gram"):
            return
        measure = self.measure_final_statistics if features == "mean" else self.measure_statistics
        statistics = (cache if stored else views).statistics(measure) if features else measure()
        statistics = {name: tensor.to(self.trainer.args.device) for name, tensor in statistics.items()}
        pairs = [(statistics[f"mean.{layer}"], statistics[f"std.{layer}"]) for layer in range(len(statistics) // 2)]
        if prepares:
            self.statistics = pairs[: len(self.layers.teacher_layers)]
        if self.rotates:
            images = spread(self.trainer.train_dataset, self.trainer.args.teacher_statistics_samples)
            self.rotations = [matrix.to(self.trainer.args.device) for matrix in measure_phi_s(self, images)]
        if stored:
            cache.codes = self.rows.codes(stored, pairs)
        elif of_views.endswith("mean"):
            views.row = replace(views.row, code=self.rows.codes("mean", pairs)[0])

    @property
    def rotates(self) -> bool:
        """Whether tokens are compared that PHI-S standardises."""
        return self.trainer.args.teacher_standardization == "phi_s" and "standardized" in self.preparations

    @torch.no_grad()
    def measure_statistics(self) -> dict[str, Tensor]:
        """For each layer the mean of each position ``(N, D)``, pooled like the tokens, and the channels' deviations.

        The deviations ``(D,)`` are around the means of the teacher's own grid. Where there are final tokens, theirs are
        the last ones.
        """
        trainer, args = self.trainer, self.trainer.args
        subset = spread(trainer.train_dataset, args.teacher_statistics_samples)
        loader = DataLoader(subset, args.per_device_eval_batch_size, collate_fn=trainer.data_collator)
        sums: list[list[Any]] = [[0, 0] for _ in self.layers.grids]
        count = 0
        for inputs in tqdm(loader, desc="Teacher statistics", disable=trainer.is_quiet):
            pixels = self._pixels(trainer._prepare_inputs(inputs), None, False, False)
            _, maps = self.forward(pixels, layers=True)
            maps = maps + [self._final_map(maps)] * self.layers.has_final
            # float64 on the CPU: not every accelerator has it, and this is done once
            tokens = [m.patch_tokens.cpu().double() for m in maps]
            sums = [[a + t.sum(0), b + t.square().sum(0)] for (a, b), t in zip(sums, tokens, strict=True)]
            count += len(tokens[0])
        if not all(first.isfinite().all() and second.isfinite().all() for first, second in sums):
            raise NumericsError(
                f"teacher '{trainer.teacher.name}': expected finite features, found NaN or Inf in {self.precision}: "
                "its weights are damaged, or too large for that precision"
            )
        statistics = {}
        for layer, ((first, second), feature_map, grid) in enumerate(zip(sums, maps, self.layers.grids, strict=True)):
            mean = first / count
            variance = (second / count - mean.square()).clamp_min(0).mean(dim=0)
            # a channel that never varies must not be divided by its rounding noise
            floor = 1e-6 * variance.max().sqrt().clamp_min(1e-12)
            statistics[f"mean.{layer}"] = pool_tokens(mean[None], feature_map.grid, grid)[0][0].float()
            statistics[f"std.{layer}"] = variance.sqrt().clamp_min(floor).float()
        return statistics

    def measure_final_statistics(self) -> dict[str, Tensor]:
        """Those of the final tokens alone, by the names of the first layer."""
        last = len(self.layers.grids) - 1
        measured = self.measure_statistics()
        return {f"{name}.0": measured[f"{name}.{last}"] for name in ("mean", "std")}

    # ---- The cache ----

    def open(self) -> None:
        """Opens or builds the cache and takes the statistics, as the arguments ask.

        Raises:
            RecipeError: If a cache is asked for that cannot serve this training.
            CacheError: If it cannot be written, or does not hold what the teacher says.
        """
        self.cache = None
        trainer, args = self.trainer, self.trainer.args
        pixels = trainer.teacher.pixels
        if self.leaves_crop_out and trainer.is_world_process_zero():
            print(
                f"teacher '{trainer.teacher.name}': shown whole images, brought to {pixels.size[0]} x {pixels.size[1]} "
                "px without the crop of its image processor, as features are compared place by place",
                flush=True,
            )
        cache, reason = self._choose_cache()
        views, why = self.views.choose(_SHARE_OF_DISK)
        if args.teacher_cache == "auto" and trainer.is_world_process_zero():
            kinds = " and ".join(([cache.layout.kind] if cache else []) + ([views.kind] if views else [])) or "off"
            reasons = [reason] if cache or not views else []
            print(f"teacher_cache auto: {kinds} ({'; '.join(reasons + ([why] if why else []))})", flush=True)
        # what is drawn in training must not depend on whether the teacher had to be asked before
        with torch.random.fork_rng(devices=[args.device] if args.device.type == "cuda" else []):
            self._take_statistics(cache, views)
            if cache is not None:
                cache.open(
                    lambda batches: self._rows(cache, batches),
                    args.per_device_eval_batch_size,
                    tolerance=_TOLERANCES[self.precision],
                    show=not trainer.is_quiet,
                )
                cache.place(args.device, placement(cache.num_bytes, args.device))
                self.cache = cache
            self.views.open(views, _TOLERANCES[self.precision])

    def _choose_cache(self) -> tuple[TeacherCache | None, str]:
        """The cache to read from, if any, and why."""
        asked = self.trainer.args.teacher_cache
        if asked == "off":
            return None, "asked for"
        if (obstacle := self._obstacle()) is not None:
            if asked not in ("auto", "views"):
                raise RecipeError(f"key 'teacher_cache': expected 'off', found '{asked}': {obstacle}")
            return None, obstacle
        kind = self.rows.kind(asked)
        cache = TeacherCache(
            cache_root(self.trainer.args.teacher_cache_dir),
            self.rows.description(kind),
            self.rows.layout(kind),
            len(self.trainer.train_dataset),
        )
        if asked not in ("auto", "views"):
            return cache, "asked for"
        to_go, live = cache.num_rows - cache.written(), self.images_to_see()
        forwards = f"{to_go:,} teacher forwards instead of {live:,}"
        if to_go >= live:
            return None, f"a cache would take {forwards}"
        if (trouble := cache.trouble(_SHARE_OF_DISK)) is not None:
            return None, trouble
        return cache, f"{self.rows.reason(kind)}; {forwards}"

    def _obstacle(self) -> str | None:
        """Why what the teacher says of a training image is not a constant, or cannot be looked up."""
        if self.asks_attention and self.rows.stored[1]:  # its forward says all the rest, too
            return "attention maps of the teacher are learned from, which no cache holds"
        if not isinstance(self.trainer.train_dataset, StoredSplit):
            return "the training set is not one of stored images"
        if not any(self.rows.stored):
            return "the teacher sees the student's augmented image, a new one in every epoch"
        return None

    def images_to_see(self) -> int:
        """Images that a training asks the teacher about, one epoch after the other."""
        args = self.trainer.args
        if args.max_steps > 0:
            return args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return math.ceil(args.num_train_epochs * len(self.trainer.train_dataset))

    @property
    def precision(self) -> torch.dtype:
        """In which the teacher calculates."""
        precision = self.trainer.accelerator.mixed_precision
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        return mixed or self.trainer.teacher.model.dtype

    @torch.no_grad()
    def _rows(self, cache: TeacherCache, batches: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Rows of the cache for batches of training images."""
        trainer = self.trainer
        loader = DataLoader(
            trainer.train_dataset,
            batch_sampler=batches,
            collate_fn=trainer.data_collator,
            num_workers=trainer.args.dataloader_num_workers if len(batches) > 1 else 0,
        )
        features = cache.layout.features
        for inputs in loader:
            parts = self._ask(trainer._prepare_inputs(inputs), None, cache.layout.has_logits, bool(features))
            yield cache.pack(parts.logits, self.rows.parts(features, parts.layers) if features else [])

    def _read(self, step: Step, shuffled: bool) -> Parts:
        """What the cache holds of a training batch; nothing where there is none."""
        if self.cache is None or step.views is None:
            return Parts()
        index = step.inputs["index"]
        device = index.device
        if self.cache.device != device:
            index = torch.from_numpy(host_index(step.inputs))
        parts, layout = self.cache(index.roll(-1) if shuffled else index, device), self.cache.layout
        logits = parts.pop(0)[:, 0] if layout.has_logits else None
        if layout.has_mean:
            parts[-1] = TokenMean(parts[-1][:, 0])
        return Parts(logits, parts or None)


def spread(dataset: Dataset, count: int) -> Dataset:
    """`count` items at even distances, so that a set sorted by class is not cut to its first classes."""
    if not hasattr(dataset, "__len__"):
        raise DataError("expected a training set with a length, to score the teacher or take its statistics from it")
    rows = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().unique()
    return Subset(dataset, rows.tolist())
