"""What every distillation trainer shares: the frozen teacher, what it sees, and the cache of what it says."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedModel, TrainingArguments

from hf_ihb.data import StoredSplit, host_index, placement
from hf_ihb.errors import DataError, RecipeError
from hf_ihb.models.processing import pixel_format
from hf_ihb.models.teacher import Teacher
from hf_ihb.runs.environment import library_versions
from hf_ihb.teacher_cache import Kind, Layout, TeacherCache, cache_root, describe_teacher
from hf_ihb.trainer.arguments import DistillationTrainingArguments
from hf_ihb.trainer.supervised import SupervisedTrainer
from hf_ihb.views import Views

# Relative error between a row of the cache and the same row computed anew: storage and, in bfloat16, kernels that round
# differently in another batch.
_TOLERANCES = {torch.float32: 1e-2, torch.bfloat16: 5e-2, torch.float16: 5e-2}

_SHARE_OF_DISK = 0.25  # that 'auto' may take of what is free


class DistillationTrainer(SupervisedTrainer):
    """Base of the distillation trainers: owns the frozen teacher, what it sees, and the cache of what it says.

    Where the teacher sees the stored image, what it says of it is a constant: it is computed once, kept on disk by the
    image's place in the training set, and read in every step (`teacher_cache`). That needs a training set of stored
    images, a `StoredSplit`.

    A teacher whose `control` is ``shuffled`` sees the next image of the per-device batch in training: pairs are lost,
    the distribution of what it says stays. In evaluation, and where statistics are taken, it sees its own.

    Args:
        teacher_model: A `Teacher`, or a model of transformers, which is frozen in place.
        teacher_processor: The image processor of a `teacher_model` that is not a `Teacher`; needed for stored images.
        **kwargs: As in `SupervisedTrainer`. A batch of the user's own may bring ``teacher_pixel_values``; otherwise
            the teacher sees its ``pixel_values``.
    """

    arguments_class = DistillationTrainingArguments
    needs_logits = False

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        teacher_model: Teacher | PreTrainedModel,
        teacher_processor: Any = None,
        **kwargs: Any,
    ) -> None:
        ready = isinstance(teacher_model, Teacher)
        pixels = None if teacher_processor is None else pixel_format(teacher_processor)
        self.teacher = teacher_model if ready else Teacher(teacher_model, pixels)
        self.teacher_cache: TeacherCache | None = None
        self._breaks_pairs = False
        if self.teacher.control == "shuffled" and args.per_device_train_batch_size < 2:
            raise RecipeError(
                "keys 'teacher_control' and 'per_device_train_batch_size' contradict: one image has no next"
            )
        super().__init__(model, args, *positional, **kwargs)
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(self.args.teacher_dtype)
        if self.args.teacher_dtype == "auto" and self.accelerator.mixed_precision == "bf16":
            dtype = torch.bfloat16
        self.teacher.to(self.args.device, dtype)
        if self.needs_logits and not ready:
            self.teacher.align_labels(list(self.student.config.id2label.values()))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `SupervisedTrainer.train`, after `prepare_teacher`."""
        self.prepare_teacher()
        return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As `SupervisedTrainer.training_step`; the only place where a ``shuffled`` teacher is."""
        self._breaks_pairs = self.teacher.control == "shuffled"
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._breaks_pairs = False

    def _teacher_pixels(self, inputs: dict[str, Any], views: Views | None) -> Tensor:
        """What the teacher sees of a batch, normalised."""
        if "teacher_pixel_values" in inputs:
            pixels = inputs["teacher_pixel_values"]
        elif views is not None:
            identical = self.args.teacher_view == "identical"
            pixels = self.teacher.prepare(views.seen if identical else views.images)
        else:
            pixels = inputs["pixel_values"]
            pixels = self.teacher.prepare(pixels) if pixels.dtype == torch.uint8 else pixels
        return pixels.roll(-1, dims=0) if self._breaks_pairs else pixels

    # ---- The cache ----

    def prepare_teacher(self) -> None:
        """Opens or builds the teacher's cache and takes its statistics, as the arguments ask.

        `train` calls it; calling it before is for those who time single steps.

        Raises:
            RecipeError: If a cache is asked for that cannot serve this training.
            CacheError: If it cannot be written, or does not hold what the teacher says.
        """
        self.teacher_cache = None
        cache, reason = self._wanted_cache()
        if self.args.teacher_cache == "auto" and self.is_world_process_zero():
            print(f"teacher_cache auto: {'off' if cache is None else cache.layout.kind} ({reason})", flush=True)
        device = self.args.device
        # what is drawn in training must not depend on whether the teacher had to be asked before
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            self._open(cache)

    def _open(self, cache: TeacherCache | None) -> None:
        self._take_statistics(cache)
        if cache is not None:
            cache.open(
                lambda batches: self._teacher_rows(cache.layout, batches),
                self.args.per_device_eval_batch_size,
                tolerance=_TOLERANCES[self._teacher_precision],
                show=self.is_world_process_zero() and not self.args.disable_tqdm,
            )
            cache.place(self.args.device, placement(cache.num_bytes, self.args.device))
            self.teacher_cache = cache

    def _wanted_cache(self) -> tuple[TeacherCache | None, str]:
        """The cache to read from, if any, and why."""
        asked = self.args.teacher_cache
        if asked == "off":
            return None, "asked for"
        if (obstacle := self._cache_obstacle()) is not None:
            if asked != "auto":
                raise RecipeError(f"key 'teacher_cache': expected 'off', found '{asked}': {obstacle}")
            return None, obstacle
        kind = self._smallest_cache() if asked == "auto" else asked
        layout = self._cache_layout(kind)
        description = {
            "teacher": describe_teacher(self.teacher),
            "precision": f"{self._teacher_precision} on {self.args.device.type}",
            "images": self.train_dataset.fingerprint(),
            "versions": library_versions("torch", "transformers", "timm"),
            **self._cache_description(kind),
        }
        cache = TeacherCache(cache_root(self.args.teacher_cache_dir), description, layout, len(self.train_dataset))
        if asked != "auto":
            return cache, "asked for"
        to_go, live = cache.num_rows - cache.written(), self._images_to_see()
        forwards = f"{to_go:,} teacher forwards instead of {live:,}"
        if to_go >= live:
            return None, f"a cache would take {forwards}"
        if (trouble := cache.trouble(_SHARE_OF_DISK)) is not None:
            return None, trouble
        return cache, f"{self._cache_reason(kind)}; {forwards}"

    def _cache_obstacle(self) -> str | None:
        """Why what the teacher says of a training image is not a constant, or cannot be looked up."""
        if not isinstance(self.train_dataset, StoredSplit):
            return "the training set is not one of stored images"
        if self.args.teacher_view == "identical":
            return "the teacher sees the student's augmented image, a new one in every epoch"
        return None

    def _images_to_see(self) -> int:
        args = self.args
        if args.max_steps > 0:
            return args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return math.ceil(args.num_train_epochs * len(self.train_dataset))

    @property
    def _teacher_precision(self) -> torch.dtype:
        """In which the teacher calculates."""
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        return mixed or self.teacher.model.dtype

    @torch.no_grad()
    def _teacher_rows(self, layout: Layout, batches: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Rows of the cache for batches of training images."""
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers if len(batches) > 1 else 0,
        )
        for inputs in loader:
            answer = self._teacher_answer(self._prepare_inputs(inputs), None)
            yield layout.pack(self._storable(answer, layout.kind))

    def _cached_answer(self, inputs: dict[str, Any], views: Views | None) -> list[Any] | None:
        """What `_teacher_answer` would say of a training batch, from the cache; None if there is none."""
        if self.teacher_cache is None or views is None:
            return None
        index = inputs["index"]
        device = index.device
        if self.teacher_cache.device != device:
            index = torch.from_numpy(host_index(inputs))
        return self.teacher_cache(index.roll(-1) if self._breaks_pairs else index, device)

    # ---- What a method says about its cache ----

    def _take_statistics(self, cache: TeacherCache | None) -> None:
        """Takes what the losses need to know of the teacher on the whole training set."""

    def _smallest_cache(self) -> Kind:
        raise NotImplementedError

    def _cache_layout(self, kind: Kind) -> Layout:
        raise NotImplementedError

    def _cache_reason(self, kind: Kind) -> str:
        """Why it is this one."""
        raise NotImplementedError

    def _cache_description(self, kind: Kind) -> dict[str, Any]:
        """What determines a row beside teacher, precision and images."""
        return {}

    def _teacher_answer(self, inputs: dict[str, Any], views: Views | None) -> list[Tensor]:
        """What the teacher says of a batch, asked live: for each layer ``(B, N, D)``."""
        raise NotImplementedError

    def _storable(self, answer: list[Tensor], kind: Kind) -> list[Tensor]:
        """What a row of the cache is packed from."""
        return answer


def spread(dataset: Dataset, count: int) -> Dataset:
    """`count` items at even distances, so that a set sorted by class is not cut to its first classes."""
    if not hasattr(dataset, "__len__"):
        raise DataError("expected a training set with a length, to score the teacher or take its statistics from it")
    rows = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().unique()
    return Subset(dataset, rows.tolist())
