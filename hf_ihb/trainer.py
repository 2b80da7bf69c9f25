"""Trainers: supervised, and distillation by logits or by structure, each a `transformers.Trainer`."""

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from hf_ihb.arguments import (
    AugmentationArguments,
    DistillationTrainingArguments,
    LogitDistillationTrainingArguments,
    StructuralDistillationTrainingArguments,
    SupervisedTrainingArguments,
)
from hf_ihb.checkpoint import load_module, newest_checkpoint, save_module
from hf_ihb.data import collate_images
from hf_ihb.errors import CheckpointError, DataError, NumericsError, RecipeError, TeacherMismatchError
from hf_ihb.functional.augment import identity_affine
from hf_ihb.functional.tokens import resample_tokens
from hf_ihb.losses import TokenPair, logit_distillation_loss, structural_losses, task_loss, warmup_factor
from hf_ihb.models.features import FeatureMap, extract_features
from hf_ihb.models.processing import pixel_format
from hf_ihb.models.student import TOKEN_PARAMETERS, StudentModule, StudentOutput, input_size
from hf_ihb.models.teacher import Teacher
from hf_ihb.views import Augmenter, Views, as_float, class_targets


class _Hooks(TrainerCallback):
    """Calls back into the trainer where `Trainer` has no method to override."""

    def __init__(self, trainer: "SupervisedTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._begin_training()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._check_finite()


class SupervisedTrainer(Trainer):
    """Trains an image classifier on labels: CNN teachers, and the matched control of every distilled student.

    Takes what `Trainer` takes. A batch of stored images (uint8 ``pixel_values`` and ``index``, as `ImageSplit` gives)
    is augmented and normalised on the device; a batch of float ``pixel_values`` is used as it is.

    Args:
        model: An image classifier of transformers; saved in its own format. `student` is this object.
        args: `SupervisedTrainingArguments`.
        data_collator: As in `Trainer`.
        train_dataset: As in `Trainer`.
        eval_dataset: As in `Trainer`.
        processing_class: Image processor; gives mean, std and size for stored images, and is saved with the model.
        augmentation: What stored images go through in training; nothing if None.
        **kwargs: As in `Trainer`. `compute_metrics` sees the logits of inference; its metrics are added to ours.
    """

    arguments_class: type[TrainingArguments] = SupervisedTrainingArguments

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        *,
        augmentation: AugmentationArguments | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, self.arguments_class):
            raise TypeError(f"{type(self).__name__} takes {self.arguments_class.__name__}, got {type(args).__name__}")
        data_collator = data_collator or collate_images
        self._pixels = None if processing_class is None else pixel_format(processing_class)
        self._probe_source = (train_dataset if train_dataset is not None else eval_dataset, data_collator)
        if (model_init := kwargs.pop("model_init", None)) is not None:
            takes_trial = len(inspect.signature(model_init).parameters) > 0
            kwargs["model_init"] = lambda trial=None: self._module(
                model_init(trial) if takes_trial else model_init(), args
            )
        super().__init__(
            model=None if model is None else self._module(model, args),
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        # our losses are means over a micro-batch; saying so makes 8 x 4 images equal 32 x 1
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        self.label_smoother = None  # smoothing is done where labels are mixed
        if args.label_names is None:
            self.label_names = ["labels"]
        self.augmentation = augmentation or AugmentationArguments()
        self._augmenter: Augmenter | None = None
        self._user_metrics, self.compute_metrics = self.compute_metrics, self._compute_metrics
        if (user_hook := self.preprocess_logits_for_metrics) is not None:
            self.preprocess_logits_for_metrics = lambda outputs, labels: {
                **outputs, "logits": user_hook(outputs["logits"], labels),
            }  # fmt: skip
        self._metric_sums: dict[str, list[float]] = {}
        self._reset_window()
        self.add_callback(_Hooks(self))

    @property
    def student(self) -> PreTrainedModel:
        """The model that was passed in."""
        return self.accelerator.unwrap_model(self.model).student

    def _module(self, student: PreTrainedModel, args: TrainingArguments) -> StudentModule:
        if isinstance(student, StudentModule):
            return student
        if not isinstance(student, PreTrainedModel):
            raise TypeError(f"expected an image classifier of transformers, got {type(student).__name__}")
        size = input_size(student) or (self._pixels.size if self._pixels else None)
        if self._pixels is not None:
            self._pixels = self._pixels._replace(size=size)
        return StudentModule(student)

    # ---- Training ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As `Trainer.train`; ``True`` means the newest complete checkpoint.

        Raises:
            CheckpointError: If there is none, or it does not hold every tensor of the model.
            NumericsError: If the loss is not finite; the optimizer has not stepped on it.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise CheckpointError(f"{self.args.output_dir}: expected a complete checkpoint to resume, found none")
            resume_from_checkpoint = str(resume_from_checkpoint)
        elif resume_from_checkpoint and not Path(resume_from_checkpoint, "trainer_state.json").is_file():
            raise CheckpointError(
                f"{resume_from_checkpoint}: expected a complete checkpoint, found no trainer_state.json"
            )
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def _begin_training(self) -> None:
        self._reset_window()
        if self.args.world_size > 1:
            # ranks start from one seed; left so, drop path would drop the same rows on each of them
            torch.manual_seed(self.args.seed + self.args.process_index)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As `Trainer.training_step`, counting images."""
        self._window_images += len(inputs["labels"]) * self.args.world_size
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Training: the weighted losses. Evaluation: unsmoothed cross-entropy of the logits that inference returns."""
        pixel_values, views = self._student_view(inputs, train=model.training)
        outputs: StudentOutput = model(pixel_values=pixel_values)
        labels = inputs.get("labels")
        if not model.training:
            loss = (
                None
                if labels is None
                else task_loss([outputs.logits], class_targets(labels, outputs.logits.shape[1], 0, None))
            )
            return (loss, self._evaluation_outputs(outputs, inputs)) if return_outputs else loss
        targets = class_targets(labels, outputs.logits.shape[1], self.args.label_smoothing_factor, views)
        loss, components = self.training_losses(outputs, targets, inputs, views)
        self._record(loss, components)
        return (loss, {"logits": outputs.logits}) if return_outputs else loss

    def training_losses(
        self, outputs: StudentOutput, targets: Tensor, inputs: dict[str, Any], views: Views | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch and its parts.

        Args:
            outputs: Of the student.
            targets: ``(B, K)`` class probabilities, smoothed and mixed.
            inputs: The batch.
            views: What was made of stored images; None if the batch brought its own pixels.

        Returns:
            Scalar loss, and unweighted scalars to log.
        """
        task = self._task_loss(outputs.heads, outputs, targets, inputs)
        return task, {"task_loss": task}

    def _task_loss(self, heads: list[Tensor], outputs: StudentOutput, targets: Tensor, inputs: dict) -> Tensor:
        if self.compute_loss_func is not None:
            return self.compute_loss_func(outputs, inputs["labels"], num_items_in_batch=None)
        return task_loss(heads, targets)

    @property
    def _epoch(self) -> float:
        return self.state.epoch or 0.0

    def _student_view(self, inputs: dict[str, Any], train: bool) -> tuple[Tensor, Views | None]:
        images = inputs["pixel_values"]
        if images.dtype != torch.uint8:
            return images, None
        if self._pixels is None:
            raise DataError("stored (uint8) images: expected a 'processing_class' with mean and std, found none")
        if not train:
            return self._pixels.apply(as_float(images)), None
        views = self._augment(images, inputs.get("index"))
        return self._pixels.apply(views.augmented), views

    def _augment(self, images: Tensor, index: Tensor | None) -> Views:
        if self._augmenter is None:
            split = self.train_dataset
            if index is None or (self.augmentation.mixes and not hasattr(split, "images")):
                raise DataError("stored (uint8) images: expected an `ImageSplit` or batches with 'index' to augment")

            def fetch(rows: Tensor) -> tuple[Tensor, Tensor]:
                rows_here = rows.cpu()
                return split.images[rows_here].to(rows.device), split.labels[rows_here].to(rows.device)

            self._augmenter = Augmenter(self.augmentation, self.args.seed, self._pixels.mean, fetch, len(split))
        return self._augmenter(images, index, int(self._epoch))

    def _record(self, loss: Tensor, components: dict[str, Tensor]) -> None:
        for name, value in components.items():
            self._component_sums[name] = self._component_sums.get(name, 0) + value.detach()
        self._component_count += 1
        self._finite = torch.isfinite(loss.detach()) & self._finite

    def _check_finite(self) -> None:
        if not self._finite:
            parts = ", ".join(f"{k} {float(v) / self._component_count:.4g}" for k, v in self._component_sums.items())
            raise NumericsError(
                f"step {self.state.global_step + 1}: expected a finite loss, found NaN or Inf (means since the last log: "
                f"{parts}); the last checkpoint in {self.args.output_dir} is good"
            )

    def _reset_window(self) -> None:
        self._component_sums: dict[str, Any] = {}
        self._component_count = 0
        self._finite: Any = True
        self._window_images = 0
        self._window_start = time.perf_counter()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; training logs get every loss component and the images per second since the last one."""
        if "loss" in logs and self._component_count:
            names = sorted(self._component_sums)
            means = torch.stack([self._component_sums[name].float() for name in names]) / self._component_count
            logs.update(zip(names, self.accelerator.reduce(means, "mean").tolist(), strict=True))
            logs["images_per_second"] = round(self._window_images / (time.perf_counter() - self._window_start), 1)
            self._reset_window()
        super().log(logs, start_time)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Parameters with weight decay: no norms, biases, tokens or positions."""
        shapes = {name: parameter.ndim for name, parameter in model.named_parameters()}
        names = super().get_decay_parameter_names(model)
        return [n for n in names if shapes.get(n, 2) > 1 and n.rsplit(".", 1)[-1] not in TOKEN_PARAMETERS]

    # ---- Data ----

    def get_train_dataloader(self) -> DataLoader:
        """As `Trainer.get_train_dataloader`.

        Raises:
            DataError: If there are fewer images than one batch.
        """
        loader = super().get_train_dataloader()
        if hasattr(self.train_dataset, "__len__") and len(loader) == 0:
            raise DataError(
                f"0 steps: {len(self.train_dataset)} training images do not fill one batch of "
                f"{self._train_batch_size * self.args.world_size} (dataloader_drop_last={self.args.dataloader_drop_last})"
            )
        return loader

    @contextlib.contextmanager
    def _every_image(self) -> Iterator[None]:
        """`dataloader_drop_last` is about training; stock Trainer drops evaluation images by it as well."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As `Trainer.get_eval_dataloader`, over every image."""
        with self._every_image():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """As `Trainer.get_test_dataloader`, over every image."""
        with self._every_image():
            return super().get_test_dataloader(test_dataset)

    # ---- Evaluation ----

    def _evaluation_outputs(self, outputs: StudentOutput, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Logits, and for each metric of ours its value for each image."""
        found = {"logits": outputs.logits}
        if (labels := inputs.get("labels")) is None:
            return found
        labels = labels.argmax(-1) if labels.ndim == 2 else labels
        heads = {"accuracy": outputs.logits}
        if outputs.cls_logits is not None:
            heads |= {"cls_accuracy": outputs.cls_logits, "distillation_accuracy": outputs.distillation_logits}
        return found | {name: (logits.argmax(-1) == labels).float() for name, logits in heads.items()}

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, dict[str, Tensor] | None, Tensor | None]:
        """As `Trainer.prediction_step`; the second item holds the logits and our per-image metrics."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return (loss, None, None) if prediction_loss_only else (loss, outputs, inputs.get("labels"))

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.evaluation_loop`; `predictions` are the logits of inference."""
        started, self._metric_sums, self._eval_dataset = time.perf_counter(), {}, dataloader.dataset
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        self._window_start += time.perf_counter() - started  # not training time
        if isinstance(output.predictions, dict):
            output = output._replace(predictions=output.predictions["logits"])
        return output

    def _compute_metrics(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Ours, then the user's; called once, or batch by batch with `batch_eval_metrics`."""
        outputs = dict(prediction.predictions)
        logits = outputs.pop("logits")
        for name, values in outputs.items():
            self._metric_sums.setdefault(name, []).append(np.asarray(torch.as_tensor(values).cpu(), np.float64))
        metrics = {k: float(np.concatenate(v).mean()) for k, v in self._metric_sums.items()} if compute_result else {}
        if self._user_metrics is not None:
            user = EvalPrediction(logits, prediction.label_ids, inputs=prediction.inputs, losses=prediction.losses)
            more = {"compute_result": compute_result} if self.args.batch_eval_metrics else {}
            metrics.update(self._user_metrics(user, **more) or {})
        return metrics

    # ---- Checkpoints ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # no training_args.bin: it is a pickle that holds the Hub token
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        save_module(self.accelerator.unwrap_model(self.model), directory, state_dict, main_process=True)
        if self.processing_class is not None and not isinstance(self.processing_class, TimmWrapperImageProcessor):
            self.processing_class.save_pretrained(directory)  # timm's lives in config.json

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # their own files, read by the module's own names
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_module(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            load_module(self.accelerator.unwrap_model(self.model), Path(self.state.best_model_checkpoint))


class DistillationTrainer(SupervisedTrainer):
    """Base of the distillation trainers: owns the frozen teacher and what it sees.

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
        if not isinstance(teacher_model, Teacher):
            names = list(model.config.id2label.values()) if self.needs_logits and model is not None else None
            pixels = None if teacher_processor is None else pixel_format(teacher_processor)
            teacher_model = Teacher(teacher_model, pixels, names)
        self.teacher = teacher_model
        super().__init__(model, args, *positional, **kwargs)
        self.teacher.to(self.args.device)
        self._teacher_decisions: dict[int, tuple[Dataset, Tensor]] = {}

    def _teacher_pixels(self, inputs: dict[str, Any], views: Views | None) -> Tensor:
        """What the teacher sees of a training batch, normalised."""
        if "teacher_pixel_values" in inputs:
            return inputs["teacher_pixel_values"]
        if views is None:
            images = inputs["pixel_values"]
            return self.teacher.prepare(as_float(images)) if images.dtype == torch.uint8 else images
        return self.teacher.prepare(views.augmented if self.args.teacher_view == "identical" else views.stored)


class LogitDistillationTrainer(DistillationTrainer):
    """Distillation by class scores: cross-entropy on the cls head, the teacher on the distillation head.

    ``loss = (1 - alpha) * CE(cls, labels) + alpha * KD(distillation, teacher)``. A student with one head gets both on
    its `logits`. Before training the teacher is scored on the evaluation set (on training images if there is none);
    at chance it is refused.

    References:
        Hinton et al., 2015, https://arxiv.org/abs/1503.02531; Touvron et al., 2021, https://arxiv.org/abs/2012.12877
    """

    arguments_class = LogitDistillationTrainingArguments
    needs_logits = True
    _SCORED_TRAINING_IMAGES = 1000

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `SupervisedTrainer.train`.

        Raises:
            TeacherMismatchError: If the teacher's accuracy is at chance.
        """
        if self.args.teacher_view == "clean" and self.augmentation.mixes:
            raise RecipeError(
                "keys 'teacher_view' and 'mixup_alpha'/'cutmix_alpha' contradict: a clean view is not mixed"
            )
        self.teacher_accuracy = self.score_teacher()
        return super().train(*args, **kwargs)

    def _begin_training(self) -> None:
        super()._begin_training()
        if not any("teacher_accuracy" in entry for entry in self.state.log_history):
            self.log({"teacher_accuracy": self.teacher_accuracy})

    def score_teacher(self) -> float:
        """Accuracy of the teacher on the evaluation set.

        Raises:
            TeacherMismatchError: If it is not above chance by three standard errors.
        """
        if self.eval_dataset is not None:
            datasets = self.eval_dataset
            loader = self.get_eval_dataloader(next(iter(datasets.values())) if isinstance(datasets, dict) else None)
        else:
            loader = self.get_eval_dataloader(_spread(self.train_dataset, self._SCORED_TRAINING_IMAGES))
        correct, count = 0, 0
        bar = tqdm(
            loader, desc="Scoring the teacher", disable=self.args.disable_tqdm or not self.is_world_process_zero()
        )
        self._eval_dataset = loader.dataset
        for inputs in bar:
            inputs = self._prepare_inputs(inputs)
            labels = inputs["labels"].argmax(-1) if inputs["labels"].ndim == 2 else inputs["labels"]
            hits = self.accelerator.gather_for_metrics(self._teacher_decision(inputs) == labels)
            correct, count = correct + int(hits.sum()), count + len(hits)
        num_labels = self.student.config.num_labels
        accuracy, chance = correct / count, 1 / num_labels
        if accuracy <= chance + 3 * (chance * (1 - chance) / count) ** 0.5:
            raise TeacherMismatchError(
                f"teacher '{self.teacher.name}': expected an accuracy above chance ({chance:.3f}), found {accuracy:.3f} on "
                f"{count} images; its labels are probably in another order, or its images normalised in another way"
            )
        return accuracy

    def _teacher_decision(self, inputs: dict[str, Any]) -> Tensor:
        """``(B,)`` the teacher's classes for an evaluation batch; asked once for each stored image."""
        index = inputs.get("index")
        if index is None or inputs["pixel_values"].dtype != torch.uint8 or not hasattr(self._eval_dataset, "images"):
            return self._teacher_logits(inputs, None).argmax(-1)
        dataset = self._eval_dataset
        unknown = torch.full((len(dataset),), -1, device=index.device)
        _, known = self._teacher_decisions.setdefault(id(dataset), (dataset, unknown))
        if (known[index] < 0).any():
            known[index] = self._teacher_logits(inputs, None).argmax(-1)
        return known[index]

    def _teacher_logits(self, inputs: dict[str, Any], views: Views | None) -> Tensor:
        with torch.no_grad(), self.accelerator.autocast():
            return self.teacher.logits(self._teacher_pixels(inputs, views))

    def _evaluation_outputs(self, outputs: StudentOutput, inputs: dict[str, Any]) -> dict[str, Tensor]:
        agreement = (outputs.logits.argmax(-1) == self._teacher_decision(inputs)).float()
        return super()._evaluation_outputs(outputs, inputs) | {"teacher_agreement": agreement}

    def training_losses(
        self, outputs: StudentOutput, targets: Tensor, inputs: dict[str, Any], views: Views | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See the class."""
        args, distilled = self.args, outputs.heads[-1]
        teacher = self._teacher_logits(inputs, views)
        task = self._task_loss(outputs.heads[:1], outputs, targets, inputs)
        kd = logit_distillation_loss(distilled, teacher, args.distillation_type, args.temperature)
        factor = warmup_factor(self._epoch, args.distillation_warmup_epochs, args.distillation_warmup_type)
        alpha = args.alpha * factor
        agreement = (distilled.detach().argmax(-1) == teacher.argmax(-1)).float().mean()
        return (1 - alpha) * task + alpha * kd, {"task_loss": task, "kd_loss": kd, "teacher_agreement": agreement}


class StructuralDistillationTrainer(DistillationTrainer):
    """Distillation by the structure of features: CKA, Gram and token losses between chosen blocks.

    ``loss = w_task * CE + w_cka * (1 - CKA) + w_gram * Gram distance + w_token * (1 - cosine)``, each a mean over
    layers. Nothing trainable stands on the teacher's side; CKA and Gram use no projection at all. Every head that is
    averaged at inference is trained on the labels.

    Under the ``shared`` view the teacher sees the stored image and its tokens are resampled by the student's crop and
    flip; images that were mixed with another take no part in the structural losses then.
    """

    arguments_class = StructuralDistillationTrainingArguments

    def _module(self, student: PreTrainedModel, args: TrainingArguments) -> StudentModule:
        super()._module(student, args)
        self._teacher_layers = args.teacher_layers or args.student_layers
        students, teachers = self._probe(student, args)
        self._grids = [m.grid for m in students]
        self._statistics: list[tuple[Tensor, Tensor]] | None = None
        projections = []
        if args.token_weight > 0:
            # a stream of its own: the student's initialisation must not depend on the losses that are on
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(args.seed)
                projections = [
                    nn.Linear(s.tokens.shape[-1], t.tokens.shape[-1]) for s, t in zip(students, teachers, strict=True)
                ]
        return StudentModule(student, args.student_layers, projections)

    @torch.no_grad()
    def _probe(self, student: PreTrainedModel, args: TrainingArguments) -> tuple[list[FeatureMap], list[FeatureMap]]:
        """Feature maps of both models for one image: widths and grids, and whether the layers exist."""
        dataset, collate = self._probe_source
        if dataset is None:
            raise DataError(
                "structural distillation: expected a train or eval dataset to read the image size off, found none"
            )
        dataset = next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
        batch = collate([dataset[0]])
        device = next(student.parameters()).device
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        pixel_values, _ = self._student_view(batch, train=False)
        training, _ = student.training, student.eval()
        try:
            _, students = extract_features(student, pixel_values, args.student_layers)
        except ValueError as error:
            raise RecipeError(f"key 'student_layers': {error}") from error
        finally:
            student.train(training)
        teacher_pixels = self._teacher_pixels(batch, None).to(self.teacher.model.device)
        return students, self.teacher.features(teacher_pixels, self._teacher_layers, args.teacher_norm)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `SupervisedTrainer.train`; takes the teacher's feature statistics first where a loss needs them."""
        if self.args.token_weight > 0 or self.args.center_positions:
            self._statistics = self._teacher_statistics()
        return super().train(*args, **kwargs)

    @torch.no_grad()
    def _teacher_statistics(self) -> list[tuple[Tensor, Tensor]]:
        """For each layer the mean token of each position ``(N, D)`` and the standard deviation of each channel ``(D,)``."""
        subset = _spread(self.train_dataset, self.args.teacher_statistics_samples)
        loader = DataLoader(subset, self.args.per_device_eval_batch_size, collate_fn=self.data_collator)
        sums: list[list[Tensor]] = []
        count = 0
        for inputs in tqdm(
            loader, desc="Teacher statistics", disable=self.args.disable_tqdm or not self.is_world_process_zero()
        ):
            inputs = self._prepare_inputs(inputs)
            tokens = [m.patch_tokens.double() for m in self._teacher_features(inputs, None)]
            batch = [[t.sum(0), t.square().sum(0)] for t in tokens]
            sums = (
                batch
                if not sums
                else [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(sums, batch, strict=True)]
            )
            count += len(tokens[0])
        statistics = []
        for first, second in sums:
            mean = first / count
            variance = (second / count - mean.square()).clamp_min(0).mean(dim=0)
            # a channel that never varies must not be divided by its rounding noise
            floor = 1e-6 * variance.max().sqrt().clamp_min(1e-12)
            statistics.append((mean.float(), variance.sqrt().clamp_min(floor).float()))
        return statistics

    def _teacher_features(self, inputs: dict[str, Any], views: Views | None) -> list[FeatureMap]:
        pixels = self._teacher_pixels(inputs, views)
        with torch.no_grad(), self.accelerator.autocast():
            maps = self.teacher.features(pixels, self._teacher_layers, self.args.teacher_norm)
        return [m._replace(tokens=m.tokens.float()) for m in maps]

    def _pairs(self, outputs: StudentOutput, inputs: dict[str, Any], views: Views | None) -> list[TokenPair]:
        """Student and teacher tokens of each layer, looking at the same places."""
        affine = views.affine if views is not None and self.args.teacher_view == "shared" else None
        if affine is None:
            affine = identity_affine(len(outputs.logits), outputs.logits.device)
        pairs = []
        for layer, feature_map in enumerate(self._teacher_features(inputs, views)):
            tokens, grid, standardized = feature_map.patch_tokens, feature_map.grid, None
            if self._statistics is not None:
                mean, std = self._statistics[layer]
                centered, mask = resample_tokens(tokens - mean, grid, affine, self._grids[layer])
                standardized = centered / std
            if self.args.center_positions:
                tokens = centered
            else:
                tokens, mask = resample_tokens(tokens, grid, affine, self._grids[layer])
            projected = outputs.projected[layer] if outputs.projected is not None else None
            pairs.append(TokenPair(outputs.features[layer], tokens, mask, projected, standardized))
        return pairs

    def training_losses(
        self, outputs: StudentOutput, targets: Tensor, inputs: dict[str, Any], views: Views | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See the class."""
        args = self.args
        task = self._task_loss(outputs.heads, outputs, targets, inputs)
        weight = torch.ones(len(targets), device=targets.device)
        if views is not None and args.teacher_view != "identical":
            weight = views.unmixed
        losses = structural_losses(
            self._pairs(outputs, inputs, views),
            weight,
            cka=args.cka_weight > 0,
            gram=args.gram_weight > 0,
            token=args.token_weight > 0,
            cka_scope=args.cka_scope,
            cka_estimator=args.cka_estimator,
            center=args.center_positions,
        )
        loss = args.task_loss_weight * task
        for name in ("cka", "gram", "token"):
            if f"{name}_loss" in losses:
                warmup = warmup_factor(
                    self._epoch, getattr(args, f"{name}_warmup_epochs"), args.distillation_warmup_type
                )
                # a zero weight multiplies, so that every parameter has a gradient
                loss = loss + getattr(args, f"{name}_weight") * warmup * losses[f"{name}_loss"]
        return loss, {"task_loss": task, **losses}


def _spread(dataset: Dataset, count: int) -> Dataset:
    """`count` items at even distances, so that a set sorted by class is not cut to its first classes."""
    if not hasattr(dataset, "__len__"):
        raise DataError("expected a training set with a length, to score the teacher or take its statistics from it")
    rows = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().unique()
    return torch.utils.data.Subset(dataset, rows.tolist())
