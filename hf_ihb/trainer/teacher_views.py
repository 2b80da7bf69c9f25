"""What the teacher says of the student's augmented images, or what it said of the same views before."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hf_ihb.data import StoredSplit, host_index
from hf_ihb.errors import RecipeError
from hf_ihb.functional.gram import TokenGram
from hf_ihb.functional.tokens import TokenMean
from hf_ihb.methods.rows import FeatureRow
from hf_ihb.step import Step
from hf_ihb.trainer.score_rows import MOST_CLASSES, ScoreRow
from hf_ihb.trainer.teacher_cache import cache_root
from hf_ihb.trainer.view_cache import ViewCache
from hf_ihb.trainer.view_rows import ViewRow


class TeacherViews:
    """Answers for a teacher that is learned from under the ``identical`` view.

    A view is a function of augmentation, its seed, epoch and image: partners of MixUp and CutMix are drawn from the
    whole split by the same numbers, and what an operation does to an image does not depend on its batch.

    Args:
        side: `TeacherSide` whose teacher it is.
    """

    def __init__(self, side: Any) -> None:
        self.side, self.trainer = side, side.trainer
        self.cache: ViewCache | None = None
        self._epoch: int | None = None

    @property
    def _wanted(self) -> tuple[bool, bool]:
        """Whether scores, and whether features, are wanted of augmented images."""
        args, side = self.trainer.args, self.side
        logits = side.asks_logits and args.teacher_logits_view == "identical"
        return logits, side.layers is not None and args.teacher_view == "identical"

    # ---- Asking ----

    def __call__(self, step: Step, *, shuffled: bool) -> tuple[Tensor | None, list[TokenGram | TokenMean] | None]:
        """Scores ``(B, K)``, inner products of layers and mean tokens of a training batch, to the storage precision.

        Args:
            step: Of the batch.
            shuffled: Whether each image is answered for by the next one of the batch.

        Returns:
            None for each where no cache is open, or holds it.
        """
        if self.cache is None or step.views is None or "teacher_pixel_values" in step.inputs:
            return None, None
        index = host_index(step.inputs)
        scores, layers = self.cache(step.epoch, index, lambda where: self._ask(step, where), step.views.seen.device)
        if step.epoch != self._epoch:
            self._epoch = step.epoch
            self._complete(step.epoch - min(2, self.trainer.args.world_size))
        if shuffled:
            scores = None if scores is None else scores.roll(-1, dims=0)
            layers = layers and [type(layer)(*(part.roll(-1, dims=0) for part in layer)) for layer in layers]
        return scores, layers

    def _ask(self, step: Step, where: Tensor | None) -> Tensor:
        """Rows of some of the images of a batch, with one forward."""
        side, (logits, features) = self.side, self._wanted
        seen = step.views.seen if where is None else step.views.seen.index_select(0, where)
        pixels = self.trainer.teacher.prepare(seen, side.sees_whole_images)
        scores, maps = side.forward(pixels, logits=logits, layers=features)
        row = self.cache.row
        parts = side.rows.parts(row.features, side.pooled(maps)) if features else []
        return row.pack(scores, parts[: len(row.tokens)], parts[-1][:, 0] if row.mean else None)

    def _complete(self, epoch: int) -> None:
        """Asks for the few images that `dataloader_drop_last` left out of an epoch.

        Otherwise a run that leaves out others would lack some in every batch. Of several processes all are sure to have
        written an epoch when the second after it begins.
        """
        args = self.trainer.args
        if epoch < 0 or not self.cache.writes:
            return
        missing = self.cache.missing(epoch)
        if len(missing) < args.per_device_train_batch_size * args.world_size:  # else it was not trained on whole
            share = missing[missing % args.world_size == args.process_index]  # whoever comes first
            if len(share) > 0:
                self.cache.add(epoch, share, self._fresh(epoch, share))

    @torch.no_grad()
    def _fresh(self, epoch: int, rows: np.ndarray) -> Tensor:
        """Rows of some images' views of an epoch, asked for as in training."""
        trainer = self.trainer
        batch = np.resize(rows, max(len(rows), trainer.args.per_device_train_batch_size))  # one graph where compiled
        own = torch.Generator()  # what is drawn in training must not depend on it
        images, collate = trainer.train_dataset, trainer.data_collator
        loader = DataLoader(images, batch_sampler=[batch.tolist()], collate_fn=collate, generator=own)
        inputs = trainer._prepare_inputs(next(iter(loader)))
        return self._ask(trainer.batches.step(inputs, True, epoch, trainer.train_dataset), None)[: len(rows)]

    # ---- The cache ----

    def choose(self, share_of_disk: float) -> tuple[ViewCache | None, str]:
        """The cache to read and write, if any, and why.

        With 'auto' there is one where the seed of the augmentation is given: other runs will show the same views then.
        Not where rows hold some of the scores alone: that is another loss at temperatures above 1.

        Args:
            share_of_disk: That 'auto' may take of what is free.

        Raises:
            RecipeError: If it is asked for and cannot serve this training.
        """
        trainer, asked = self.trainer, self.trainer.args.teacher_cache
        if not any(self._wanted) or asked not in ("auto", "views"):
            return None, ""
        if asked == "auto" and trainer.augmentation.augmentation_seed is None:
            return None, "'views' would keep what it says of each for other runs"
        if (obstacle := self._obstacle()) is not None:
            if asked == "views":
                raise RecipeError(f"key 'teacher_cache': expected 'auto' or 'off', found 'views': {obstacle}")
            return None, obstacle
        cache = self._made()
        if asked == "auto" and not cache.row.is_whole:
            return None, f"'views' would keep {cache.row.describe()}"
        if (
            asked == "auto"
            and not cache.written()
            and (trouble := cache.trouble(self._views, share_of_disk)) is not None
        ):
            return None, trouble
        return cache, "what it says of each view is kept, by epoch and image"

    def _made(self) -> ViewCache:
        trainer, side, (logits, features) = self.trainer, self.side, self._wanted
        scores = ScoreRow(trainer.student.config.num_labels) if logits else None
        shapes = side.layers.teacher_shapes if features else ()
        kept = side.rows.smallest if features else FeatureRow()
        tokens = tuple(count for count, _ in shapes[: len(side.layers.teacher_layers)]) if kept.layers else ()
        return ViewCache(
            cache_root(trainer.args.teacher_cache_dir),
            side.rows.description(kept.name if features else "logits")
            | {"views": trainer.batches.describe_views(trainer.train_dataset)},
            ViewRow(scores, tokens, shapes[-1][1] if kept.final else 0),
            len(trainer.train_dataset),
            run=str(trainer.args.output_dir),
        )

    def _obstacle(self) -> str | None:
        """Why what the teacher says of a view cannot be looked up."""
        images, (logits, features) = self.trainer.train_dataset, self._wanted
        if not isinstance(images, StoredSplit):
            return "the training set is not one of stored images"
        if self.trainer.augmentation.mixes and not hasattr(images, "images"):
            return "images are decoded when they are asked for, and are mixed with the next of their batch"
        if features and self.side.asks_attention:
            return "attention maps of the teacher are learned from, which no cache holds"
        if features and (because := self.side.rows.because) is not None:
            return f"'{because}' needs the tokens of augmented images themselves, which are many"
        if features and self.side.rows.smallest.layers == "tokens":
            return "the losses take the tokens of augmented images in several ways"
        if logits and self.trainer.student.config.num_labels > MOST_CLASSES:
            return f"more than {MOST_CLASSES:,} classes"
        return None

    @property
    def _views(self) -> int:
        """Views of whole epochs that the training makes."""
        count = len(self.trainer.train_dataset)
        return math.ceil(self.side.images_to_see() / count) * count

    def open(self, cache: ViewCache | None, tolerance: float) -> None:
        """Opens the one that was chosen.

        Args:
            cache: None where there is none.
            tolerance: See `ViewCache.open`.
        """
        self.close()
        self.cache, self._epoch = cache, None
        if cache is not None:
            show = self.trainer.is_world_process_zero()
            cache.open(self._fresh, self._views, tolerance=tolerance, show=show)

    def flush(self) -> None:
        """Writes what was asked so far: what a checkpoint stands for must not be lost with the process."""
        if self.cache is not None:
            self.cache.flush()

    def close(self) -> None:
        """Writes what is left, and lets another run write."""
        if self.cache is not None:
            self.cache.close()
