"""Training on labels, and what every trainer here shares: views, logging, evaluation, strict checkpoints."""

import contextlib
import functools
import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainingArguments
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from hf_ihb.checkpoint import load_module, newest_checkpoint, save_module
from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.data import ImageSplit, collate_images, host_index, onto, placement, rows_onto
from hf_ihb.errors import CheckpointError, DataError, NumericsError, RecipeError
from hf_ihb.functional.color import fixed_shapes
from hf_ihb.hub import ensure_repo
from hf_ihb.losses import task_loss
from hf_ihb.models.module import StudentModule, StudentOutput
from hf_ihb.models.processing import pixel_format
from hf_ihb.models.student import TOKEN_PARAMETERS, input_size
from hf_ihb.trainer.arguments import SupervisedTrainingArguments
from hf_ihb.trainer.averaging import Averaging
from hf_ihb.trainer.callbacks import EarlyStopping, Hooks
from hf_ihb.trainer.publishing import Publishing
from hf_ihb.views import Augmenter, Views, class_targets


class SupervisedTrainer(Trainer):
    """Trains an image classifier on labels: CNN teachers, and the matched control of every distilled student.

    Takes what `Trainer` takes. A batch of stored images (uint8 ``pixel_values`` and ``index``, as `ImageSplit` gives)
    is augmented and normalised on the device; a batch of float ``pixel_values`` is used as it is.

    With `ema_decay` or `swa_start` an average of the weights is evaluated, selected and saved in the place of the raw
    ones, and is what `student` holds after training.

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
        if args.accelerator_config.dispatch_batches:  # the main process hands out tensors, and nothing else
            data_collator = _without_rows(data_collator)
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
        args.set_float32_precision()
        # FSDP2 casts the weights of a BatchNorm and not its statistics, which torch refuses together: autocast instead
        statistics = any(isinstance(part, nn.modules.batchnorm._NormBase) for part in self.model.modules())
        if statistics and self.is_deepspeed_enabled and self.accelerator.mixed_precision != "no":
            raise RecipeError(
                "expected a student without BatchNorm under DeepSpeed, which leaves statistics in float32 beside half "
                "weights, found one with it; take recipes/accelerate/ddp.yaml, or --mixed_precision no"
            )
        self._autocasts = statistics and self.accelerator.is_fsdp2
        if self._autocasts:
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        # our losses are means over a micro-batch; saying so makes 8 x 4 images equal 32 x 1
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        self.label_smoother = None  # smoothing is done where labels are mixed
        if args.label_names is None:
            self.label_names = ["labels"]
        self.augmentation = augmentation or AugmentationArguments()
        if hasattr(args, "check_with"):
            args.check_with([self.augmentation])
        self._augmenter: Augmenter | None = None
        self._partners_from: ImageSplit | None = None
        self._viewed = compiled(self._view, args)
        self._on_device: dict[int, tuple[ImageSplit, ImageSplit]] = {}
        self._user_metrics, self.compute_metrics = self.compute_metrics, self._compute_metrics
        if (user_hook := self.preprocess_logits_for_metrics) is not None:
            self.preprocess_logits_for_metrics = lambda outputs, labels: {
                **outputs,
                "logits": user_hook(outputs["logits"], labels),
            }
        self._metric_sums: dict[str, list[float]] = {}
        self._steps_per_epoch: int | None = None
        self._num_parameters: int | None = None
        self._reset_window()
        self._quiet = self.args.disable_tqdm or not self.is_world_process_zero()
        self._publishing = Publishing(self)
        self._averaging = Averaging(self)
        self.add_callback(self._averaging)
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStopping(args.early_stopping_patience, args.early_stopping_threshold))
        self.add_callback(Hooks(self))

    @property
    def student(self) -> PreTrainedModel:
        """The model that was passed in."""
        return self.accelerator.unwrap_model(self.model).student

    def _module(self, student: PreTrainedModel, args: TrainingArguments) -> StudentModule:
        if not isinstance(student, PreTrainedModel):
            raise TypeError(f"expected an image classifier of transformers, got {type(student).__name__}")
        self._num_labels = student.config.num_labels
        size = input_size(student) or (self._pixels.size if self._pixels else None)
        if self._pixels is not None:
            self._pixels = self._pixels._replace(size=size)
        return StudentModule(student)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """As `Trainer._move_model_to_device`, which is not for sharded models.

        Weights of convolutions that look beside their own place get the layout they run fastest in; a ViT's patches
        are cut by one that does not.
        """
        super()._move_model_to_device(model, device)
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        if any(size > step for m in convolutions for size, step in zip(m.kernel_size, m.stride, strict=True)):
            model.to(memory_format=torch.channels_last)

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
        self._num_parameters = None
        if self.args.world_size > 1:
            # ranks start from one seed; left so, drop path would drop the same rows on each of them
            torch.manual_seed(self.args.seed + self.args.process_index)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As `Trainer.training_step`, counting images."""
        if missing := [key for key in ("pixel_values", "labels") if key not in inputs]:
            raise DataError(f"training batch: expected '{missing[0]}', found {', '.join(inputs)}")
        self._window_images += len(inputs["labels"]) * self.args.world_size
        return super().training_step(model, inputs, num_items_in_batch)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As `Trainer.floating_point_ops`; the parameters are counted once, not in every step."""
        if self._num_parameters is None:
            self._num_parameters = self.model.num_parameters(exclude_embeddings=True)
        return 6 * inputs["pixel_values"].numel() * self._num_parameters

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Training: the weighted losses. Evaluation: unsmoothed cross-entropy of the logits that inference returns."""
        pixel_values, views = self._student_view(inputs, train=model.training)
        arguments = self._forward_arguments(inputs, views, model.training)
        with self.accelerator.autocast() if self._autocasts else contextlib.nullcontext():
            outputs: StudentOutput = model(pixel_values=pixel_values, **arguments)
        labels, num_labels = inputs.get("labels"), outputs.logits.shape[1]
        if not model.training:
            loss = None
            if labels is not None:
                loss = task_loss([outputs.logits], class_targets(labels, num_labels, 0, None))
            return (loss, self._evaluation_outputs(outputs, inputs)) if return_outputs else loss
        if views is None:
            targets = class_targets(labels, num_labels, self.args.label_smoothing_factor, None)
        else:
            targets = views.targets
        loss, components = self.training_losses(outputs, targets, inputs, views)
        if outputs.cls_logits is not None:  # a head that no loss uses gets a gradient as well: DDP counts on it
            loss = loss + 0 * (outputs.cls_logits.mean() + outputs.distillation_logits.mean())
        self._record(loss, components)
        return (loss, {"logits": outputs.logits}) if return_outputs else loss

    def _forward_arguments(self, inputs: dict[str, Any], views: Views | None, train: bool) -> dict[str, Any]:
        """What the wrapped module's forward takes beside the pixels."""
        return {}

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

    def _task_loss(self, heads: Sequence[Tensor], outputs: StudentOutput, targets: Tensor, inputs: dict) -> Tensor:
        if self.compute_loss_func is not None:
            return self.compute_loss_func(outputs, inputs["labels"], num_items_in_batch=None)
        return task_loss(heads, targets)

    @property
    def _epoch(self) -> float:
        return self.state.epoch or 0.0

    @property
    def _num_epochs(self) -> float:
        """Epochs of the whole training, those that `max_steps` makes."""
        if self._steps_per_epoch is None:
            return float(self.args.num_train_epochs)
        return self.state.max_steps / self._steps_per_epoch

    def _student_view(self, inputs: dict[str, Any], train: bool) -> tuple[Tensor, Views | None]:
        images = inputs["pixel_values"]
        if images.dtype != torch.uint8:
            return images, None
        if self._pixels is None:
            raise DataError("stored (uint8) images: expected a 'processing_class' with mean and std, found none")
        if not train:
            return self._pixels.apply(images), None
        if inputs.get("index") is None:
            raise DataError("stored (uint8) images: expected a `StoredSplit` or batches with 'index' to augment")
        if self._augmenter is None:
            self._make_augmenter(images)
        # a number would be compiled into the graph, and that anew in every epoch
        epoch = torch.full((), int(self._epoch), device=images.device) if self.args.torch_compile else int(self._epoch)
        return self._viewed(images, inputs["index"], epoch, inputs.get("labels"), self._partners(inputs))

    def _make_augmenter(self, images: Tensor) -> None:
        split = self._placed(self.train_dataset)
        fetch, count = None, 0
        if hasattr(split, "images"):  # any image can be had
            count = len(split)
            if split.images.device == images.device:

                def fetch(rows: Tensor) -> tuple[Tensor, Tensor]:
                    return split.images.index_select(0, rows), split.labels[rows]

            else:
                self._partners_from = split
        fill = self._pixels.mean[: images.shape[1]]  # a grey image has one channel where its processor has three
        self._augmenter = Augmenter(self.augmentation, self.args.seed, fill, fetch, count)

    def _partners(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor] | None:
        """Mixing partners whose images are on the host, chosen there as well: nothing is asked of the device."""
        split = self._partners_from
        if split is None or not self.augmentation.mixes:
            return None
        rows, device = torch.from_numpy(host_index(inputs)), inputs["pixel_values"].device
        rows = self._augmenter.partners_of(rows, int(self._epoch))
        return onto(device, rows), rows_onto(device, split.images, rows), rows_onto(device, split.labels, rows)

    def _view(
        self, images: Tensor, index: Tensor, epoch: int | Tensor, labels: Tensor | None, partners: tuple | None
    ) -> tuple[Tensor, Views]:
        """What the student sees, and how it came about: one graph where it is compiled."""
        views = self._augmenter(images, index, epoch, labels, partners)
        if labels is not None:
            views.targets = class_targets(labels, self._num_labels, self.args.label_smoothing_factor, views)
        return self._pixels.apply(views.seen), views

    def _record(self, loss: Tensor, components: dict[str, Tensor]) -> None:
        """Adds up what is logged, on the device: nothing is waited for."""
        values = torch.stack([value.detach().float() for value in (loss, *components.values())])
        self._component_sums = values if self._component_sums is None else self._component_sums + values
        self._component_names = tuple(components)
        self._component_count += 1

    def _check_finite(self) -> None:
        """Raises if a loss since the last log was NaN or Inf: sums keep them.

        On a CPU this is asked in every step, before the weights are changed. On an accelerator asking means waiting for
        it, so it is asked where one waits anyway: before something is logged, evaluated or saved.
        """
        if self._component_count == 0:
            return
        total, *parts = (self._component_sums / self._component_count).tolist()
        if math.isfinite(total):
            return
        means = ", ".join(f"{n} {v:.4g}" for n, v in zip(self._component_names, parts, strict=True))
        raise NumericsError(
            f"step {self.state.global_step + 1}: expected a finite loss, found NaN or Inf (means since the last "
            f"log: {means}); the last checkpoint in {self.args.output_dir} is good"
        )

    def _reset_window(self) -> None:
        self._component_sums: Tensor | None = None
        self._component_names: tuple[str, ...] = ()
        self._component_count = 0
        self._window_images = 0
        self._window_start = time.perf_counter()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; training logs get every loss component and the images per second since the last one."""
        if "loss" in logs and self._component_count:
            self._check_finite()
            means = self.accelerator.reduce(self._component_sums[1:] / self._component_count, "mean").tolist()
            logs.update(sorted(zip(self._component_names, means, strict=True)))
            logs["images_per_second"] = round(self._window_images / (time.perf_counter() - self._window_start), 1)
            self._reset_window()
        super().log(logs, start_time)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Parameters with weight decay: no norms, biases, tokens or positions, unless `weight_decay_scope` is 'all'."""
        if self.args.weight_decay_scope == "all":
            return [name for name, _ in model.named_parameters()]
        # a ConvNeXt V2 keeps the vectors of its response normalisation as (1, 1, 1, C)
        vectors = {n for n, p in model.named_parameters() if p.ndim < 2 or (p.ndim > 2 and p.numel() == p.shape[-1])}
        names = super().get_decay_parameter_names(model)
        return [n for n in names if n not in vectors and n.rsplit(".", 1)[-1] not in TOKEN_PARAMETERS]

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: PreTrainedModel | None = None) -> tuple[Any, Any]:
        """As `Trainer.get_optimizer_cls_and_kwargs`; ``optim_args`` reach SGD too (``momentum=0.9,nesterov=true``)."""
        optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if optimizer is torch.optim.SGD and args.optim_args:
            given = dict(pair.split("=") for pair in args.optim_args.replace(" ", "").split(","))
            nesterov = given.pop("nesterov", "false").lower() == "true"
            kwargs |= {"nesterov": nesterov, **{name: float(value) for name, value in given.items()}}
        return optimizer, kwargs

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> tuple[Any, ...]:
        """As `Trainer.set_initial_training_values`; keeps the optimizer steps of an epoch for the schedules."""
        values = super().set_initial_training_values(args, dataloader)
        self._steps_per_epoch = values[1]
        return values

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """As `Trainer.create_scheduler`; with `swa_learning_rate` the schedule approaches it from `swa_start` on."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.args.swa_learning_rate is not None:
            if self._steps_per_epoch is None:
                self.set_initial_training_values(self.args, self.get_train_dataloader())
            self._averaging.anneal(scheduler, num_training_steps, self._steps_per_epoch)
        return scheduler

    # ---- Data ----

    def get_train_dataloader(self) -> DataLoader:
        """As `Trainer.get_train_dataloader`.

        Raises:
            DataError: If there are fewer images than one batch.
        """
        dataset = self.train_dataset
        try:
            self.train_dataset = self._placed(dataset)
            with self._loading(self.train_dataset):
                loader = super().get_train_dataloader()
        finally:
            self.train_dataset = dataset
        if hasattr(self.train_dataset, "__len__") and len(loader) == 0:
            batch = self._train_batch_size * self.args.world_size
            raise DataError(f"0 steps: {len(self.train_dataset)} training images do not fill one batch of {batch}")
        return loader

    def _placed(self, dataset: Any) -> Any:
        """Stored images on the accelerator, where they fit; any other data set as it is."""
        if not isinstance(dataset, ImageSplit):
            return dataset
        if id(dataset) not in self._on_device:
            fits = placement(dataset.images.nbytes, self.args.device) == "device"
            self._on_device[id(dataset)] = (dataset, dataset.to(self.args.device) if fits else dataset)
        return self._on_device[id(dataset)][1]

    @contextlib.contextmanager
    def _loading(self, dataset: Any, *, every_image: bool = False) -> Iterator[None]:
        """Loader settings that fit the data.

        Images on an accelerator are gathered there, by this process, and need no pinning. `dataloader_drop_last` is
        about training; stock Trainer drops evaluation images by it as well.
        """
        args, changed = self.args, {"dataloader_drop_last": False} if every_image else {}
        if isinstance(dataset, ImageSplit) and dataset.images.device.type != "cpu":
            changed |= {"dataloader_num_workers": 0, "dataloader_pin_memory": False}
            changed |= {"dataloader_prefetch_factor": None, "dataloader_persistent_workers": False}
        before = {name: getattr(args, name) for name in changed}
        try:
            vars(args).update(changed)
            yield
        finally:
            vars(args).update(before)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As `Trainer.get_eval_dataloader`, over every image."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self._placed(self.eval_dataset if eval_dataset is None else eval_dataset)
        with self._loading(dataset, every_image=True):
            return super().get_eval_dataloader(dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """As `Trainer.get_test_dataloader`, over every image."""
        dataset = self._placed(test_dataset)
        with self._loading(dataset, every_image=True):
            return super().get_test_dataloader(dataset)

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
        """As `Trainer.evaluation_loop`; `predictions` are the logits of inference, metrics those of the main process.

        A user's metric may differ between processes; a run that is stopped or saved on one of them alone would hang.
        """
        self._check_finite()
        started, self._metric_sums, self._eval_dataset = time.perf_counter(), {}, dataloader.dataset
        with self._averaging.applied():
            output = super().evaluation_loop(dataloader, *args, **kwargs)
        output = output._replace(metrics=broadcast_object_list([output.metrics])[0])
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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, of the weights that are evaluated; a checkpoint keeps the raw ones as well."""
        self._check_finite()
        if _internal_call and output_dir is not None:  # a checkpoint
            super().save_model(output_dir, _internal_call=True)
            self._averaging.save(Path(output_dir))
        else:
            with self._averaging.applied():
                super().save_model(output_dir, _internal_call)

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
            self._averaging.load(Path(resume_from_checkpoint))
            load_module(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._averaging.load_best(Path(self.state.best_model_checkpoint))

    # ---- Hub ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As `Trainer.init_hf_repo`: the repo is there, and may be written to, before training starts.

        Raises:
            HubPushError: If not, in one line.
        """
        if self.is_world_process_zero():
            self.hub_model_id = ensure_repo(
                self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
                private=self.args.hub_private_repo if private is None else private,
                token=token or self.args.hub_token,
            )
            self.push_in_progress = None

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """As `Trainer.create_model_card`, but rendered from the run's files, which know task and splits by themselves.

        Args:
            language: As in `Trainer`, like `tags` and `model_name`.
            license: That of the run if None.
            tags: Added to the card's own.
            model_name: Title of the card.
            finetuned_from: What the run started from if None.
            tasks: Not used.
            dataset_tags: Hub ids of data sets, where no recipe names one.
            dataset: As `dataset_tags`.
            dataset_args: Not used.
        """
        if self.is_world_process_zero():
            self._publishing.write_card(
                language=language,
                license=license,
                tags=_listed(tags),
                model_name=model_name,
                base_model=finetuned_from,
                datasets=_listed(dataset_tags) or _listed(dataset),
            )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `Trainer.push_to_hub`: the student, its processor, card, plots and records in one commit.

        Args:
            commit_message: As in `Trainer`.
            blocking: As in `Trainer`.
            token: As in `Trainer`.
            revision: As in `Trainer`.
            private: As in `Trainer`.
            **kwargs: As `create_model_card` takes them.

        Returns:
            The commit, a `Future` of it if not `blocking`; None on other processes than the main one.

        Raises:
            HubPushError: If it fails; the run is where it was, and the message says how to push again.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        return self._publishing.push(
            commit_message=commit_message or "End of training",
            blocking=blocking,
            token=token,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        running = self.push_in_progress
        if running is not None and running.is_done():
            self._finish_current_push()
        elif running is not None and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.create_model_card()
        job = self._publishing.push(
            commit_message=f"Training in progress, step {self.state.global_step}",
            blocking=False,
            token=self.args.hub_token,
            revision=self.args.hub_revision,
            weights=self._averaging.evaluated(Path(checkpoint_folder)),
        )
        self.push_in_progress = self.push_in_progress or PushInProgress([])
        self.push_in_progress.jobs.append(job)

    def _finish_current_push(self) -> None:
        # stock Trainer waits for pushes in the background and never looks at how they ended
        super()._finish_current_push()
        if getattr(self, "push_in_progress", None) is not None:
            self._publishing.report_failures(self.push_in_progress.jobs)
            self.push_in_progress = None


def compiled(function: Callable, args: TrainingArguments) -> Callable:
    """A function of tensors, compiled where `torch_compile` asks for it, in the way the model then is.

    Its first arguments go through it uncompiled as well: the small tables it reads are made then
    (`hf_ihb.functional.constants`), and are not to be a part of its graph.
    """
    if not args.torch_compile:
        return function
    graph = torch.compile(function, backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    ran = False

    @functools.wraps(function)
    def call(*given: Any) -> Any:
        nonlocal ran
        if not ran:
            with torch.no_grad(), fixed_shapes():
                function(*given)
            ran = True
        return graph(*given)

    return call


def _without_rows(collate: Callable) -> Callable:
    @functools.wraps(collate)
    def collated(batch: Any) -> dict[str, Any]:
        return {name: value for name, value in collate(batch).items() if name != "rows"}

    return collated


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
