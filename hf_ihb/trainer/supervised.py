"""Training on labels, and what every trainer here shares: steps, logs, evaluation, strict checkpoints."""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_ihb.augment import class_targets
from hf_ihb.checkpoint import checkpoint_to_resume, load_module, save_run
from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.data import collate_images
from hf_ihb.errors import DataError
from hf_ihb.functional.logits import task_loss
from hf_ihb.models.module import StudentModule
from hf_ihb.models.processing import pixel_format
from hf_ihb.models.student import input_size
from hf_ihb.step import Step, StudentOutput
from hf_ihb.trainer.arguments import SupervisedTrainingArguments
from hf_ihb.trainer.averaging import Averaging
from hf_ihb.trainer.batches import Batches, first_batch, without_host_values
from hf_ihb.trainer.callbacks import EarlyStopping, Hooks
from hf_ihb.trainer.evaluating import EvaluationMetrics, image_scores, of_logits
from hf_ihb.trainer.fitting import fit_batch_norms, lay_out, wrapped_init
from hf_ihb.trainer.hub_calls import HubCalls
from hf_ihb.trainer.loss_log import LossLog
from hf_ihb.trainer.optimization import decayed_parameters, optimizer_settings
from hf_ihb.trainer.publishing import Publishing


class SupervisedTrainer(Trainer):
    """Trains an image classifier on labels: CNN teachers, and the matched control of every distilled student.

    Takes what `Trainer` takes. A batch of stored images (uint8 ``pixel_values`` and ``index``, as `ImageSplit` gives)
    is augmented and normalised on the device; a batch of float ``pixel_values`` is used as it is.

    With `ema_decay` or `swa_start` an average of the weights is evaluated, selected and saved in the place of the raw
    ones, and is what `student` holds after training.

    Args:
        model: An image classifier of transformers; saved in its own format. `student` is this object.
        args: `SupervisedTrainingArguments`.
        data_collator: Of batches; `collate_images` if None.
        train_dataset: Images to train on.
        eval_dataset: Images to evaluate on, one set or several by name.
        processing_class: Image processor; gives mean, std and size for stored images, and is saved with the model.
        augmentation: What stored images go through in training; nothing if None.
        **kwargs: Further arguments of `Trainer`. `compute_metrics` sees the logits of inference; its metrics are added
            to ours.
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
            data_collator = without_host_values(data_collator)
        self._pixels = None if processing_class is None else pixel_format(processing_class)
        self.augmentation = augmentation or AugmentationArguments()
        self.batches = Batches(args, self.augmentation, self._pixels, num_labels=0)
        self._publishing = Publishing(self)
        self._hub_calls = HubCalls(self, self._publishing)
        images = train_dataset if train_dataset is not None else eval_dataset

        def wrap(student: Any) -> StudentModule:
            return self._module(student, args, lambda: first_batch(images, data_collator))

        if kwargs.get("model_init") is not None:
            kwargs["model_init"] = wrapped_init(kwargs["model_init"], wrap)
        super().__init__(
            model=None if model is None else wrap(model),
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        args.set_float32_precision()
        self._autocasts = fit_batch_norms(self)
        # our losses are means over a micro-batch; saying so makes 8 x 4 images equal 32 x 1
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        self.label_smoother = None  # smoothing is done where labels are mixed
        if args.label_names is None:
            self.label_names = ["labels"]
        if hasattr(args, "check_with"):
            args.check_with([self.augmentation])
        self.compute_metrics = EvaluationMetrics(self.compute_metrics, args.batch_eval_metrics)
        self.preprocess_logits_for_metrics = of_logits(self.preprocess_logits_for_metrics)
        self._steps_per_epoch: int | None = None
        self.loss_log = LossLog()
        self._averaging = Averaging(self)
        self.add_callback(self._averaging)
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStopping(args.early_stopping_patience, args.early_stopping_threshold))
        self.add_callback(Hooks(self))

    @property
    def student(self) -> PreTrainedModel:
        """The model that was passed in."""
        return self.accelerator.unwrap_model(self.model).student

    def _module(
        self, student: PreTrainedModel, args: TrainingArguments, first_batch: Callable[[], dict[str, Any]]
    ) -> StudentModule:
        """The module that is trained.

        Args:
            student: That was passed in.
            args: Of the training.
            first_batch: A batch of one image, to see shapes with.
        """
        if not isinstance(student, PreTrainedModel):
            raise TypeError(f"expected an image classifier of transformers, got {type(student).__name__}")
        batches = self.batches
        batches.num_labels = student.config.num_labels
        if batches.pixels is not None:
            batches.pixels = batches.pixels._replace(size=input_size(student) or self._pixels.size)
        return StudentModule(student)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        super()._move_model_to_device(model, device)  # not called for sharded models
        lay_out(model)

    # ---- Training ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Trains; ``resume_from_checkpoint=True`` goes on from the newest complete checkpoint.

        Raises:
            CheckpointError: If there is none, or it does not hold every tensor of the model.
            NumericsError: If the loss is not finite; the optimizer has not stepped on it.
        """
        folder = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        return super().train(resume_from_checkpoint=folder, **kwargs)

    def _begin_training(self) -> None:
        self.loss_log.reset()
        if self.args.world_size > 1:
            # ranks start from one seed; left so, drop path would drop the same rows on each of them
            torch.manual_seed(self.args.seed + self.args.process_index)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The loss of a micro-batch after its backward pass, a scalar; images are counted."""
        if missing := [key for key in ("pixel_values", "labels") if key not in inputs]:
            raise DataError(f"training batch: expected '{missing[0]}', found {', '.join(inputs)}")
        self.loss_log.count_images(len(inputs["labels"]) * self.args.world_size)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Training: the weighted losses. Evaluation: unsmoothed cross-entropy of the logits that inference returns."""
        step = self.prepare(inputs, train=model.training)
        with self.accelerator.autocast() if self._autocasts else contextlib.nullcontext():
            outputs: StudentOutput = model(pixel_values=step.pixel_values, **self.model_inputs(step))
        if not model.training:
            loss = None
            if step.labels is not None:
                loss = task_loss([outputs.logits], class_targets(step.labels, outputs.logits.shape[1], 0, None))
            return (loss, self.evaluation_outputs(outputs, step)) if return_outputs else loss
        loss, components = self.training_losses(outputs, step)
        if outputs.cls_logits is not None:  # a head that no loss uses gets a gradient as well: DDP counts on it
            loss = loss + 0 * (outputs.cls_logits.mean() + outputs.distillation_logits.mean())
        self.loss_log.record(loss, components)
        return (loss, {"logits": outputs.logits}) if return_outputs else loss

    def prepare(self, inputs: dict[str, Any], train: bool) -> Step:
        """Everything a step needs beside the student, of a batch on the device.

        Args:
            inputs: The batch.
            train: Whether it is augmented, and learned from.
        """
        return self.batches.step(inputs, train, self.epoch, self.train_dataset)

    def model_inputs(self, step: Step) -> dict[str, Any]:
        """What the forward of the module takes beside the pixels."""
        return {}

    def training_losses(self, outputs: StudentOutput, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, a scalar, and unweighted scalars to log."""
        task = self.task_loss(outputs.heads, outputs, step)
        return task, {"task_loss": task}

    def task_loss(self, heads: Sequence[Tensor], outputs: StudentOutput, step: Step) -> Tensor:
        """What the labels say, by `compute_loss_func` where there is one.

        Args:
            heads: Logits ``(B, K)`` of the heads that the labels teach.
            outputs: Of the student.
            step: Of the micro-batch.
        """
        if self.compute_loss_func is not None:
            return self.compute_loss_func(outputs, step.labels, num_items_in_batch=None)
        return task_loss(heads, step.targets)

    @property
    def is_quiet(self) -> bool:
        """Whether this process shows no progress."""
        return self.args.disable_tqdm or not self.is_world_process_zero()

    @property
    def epoch(self) -> float:
        """Epochs trained so far, 0 before training."""
        return self.state.epoch or 0.0

    @property
    def num_epochs(self) -> float:
        """Epochs of the whole training, those that `max_steps` makes."""
        if self._steps_per_epoch is None:
            return float(self.args.num_train_epochs)
        return self.state.max_steps / self._steps_per_epoch

    def _check_finite(self) -> None:
        self.loss_log.check_finite(self.state.global_step, self.args.output_dir)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs; what is said of training gets every loss component and the images per second since the last time."""
        if "loss" in logs:
            self._check_finite()
            logs.update(self.loss_log.read(self.accelerator.reduce))
        super().log(logs, start_time)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Parameters with weight decay: no norms, biases, tokens or positions, unless `weight_decay_scope` is 'all'."""
        if self.args.weight_decay_scope == "all":
            return [name for name, _ in model.named_parameters()]
        return decayed_parameters(model, super().get_decay_parameter_names(model))

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: PreTrainedModel | None = None) -> tuple[Any, Any]:
        """Class and settings of the optimizer; ``optim_args`` reach SGD too (``momentum=0.9,nesterov=true``)."""
        return optimizer_settings(args, model)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> tuple[Any, ...]:
        """Lengths of the training; the optimizer steps of an epoch are kept for the schedules."""
        values = super().set_initial_training_values(args, dataloader)
        self._steps_per_epoch = values[1]
        return values

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The schedule; with `swa_learning_rate` it approaches that from `swa_start` on."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.args.swa_learning_rate is not None:
            if self._steps_per_epoch is None:
                self.set_initial_training_values(self.args, self.get_train_dataloader())
            self._averaging.anneal(scheduler, num_training_steps, self._steps_per_epoch)
        return scheduler

    # ---- Data ----

    def get_train_dataloader(self) -> DataLoader:
        """Training images, kept where they fit (`Batches`); fewer than one batch are a `DataError`."""
        with self.batches.training_images(self):
            return self.batches.checked(super().get_train_dataloader(), self)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Images to evaluate on, every one."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.batches.place(self.eval_dataset if eval_dataset is None else eval_dataset)
        with self.batches.loading(dataset, every_image=True):
            return super().get_eval_dataloader(dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """Images to predict, every one."""
        dataset = self.batches.place(test_dataset)
        with self.batches.loading(dataset, every_image=True):
            return super().get_test_dataloader(dataset)

    # ---- Evaluation ----

    def evaluation_outputs(self, outputs: StudentOutput, step: Step) -> dict[str, Tensor]:
        """Logits, and for each metric of ours its value for each image ``(B,)``."""
        return image_scores(outputs, step)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, dict[str, Tensor] | None, Tensor | None]:
        """Loss, logits with our metrics of each image, and labels of a batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return (loss, None, None) if prediction_loss_only else (loss, outputs, inputs.get("labels"))

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> Any:
        """Evaluates; `predictions` are the logits of inference, metrics those of the main process.

        A user's metric may differ between processes; a run that is stopped or saved on one of them alone would hang.
        """
        self._check_finite()
        started = time.perf_counter()
        self.compute_metrics.reset()
        with self._averaging.applied():
            output = super().evaluation_loop(dataloader, *args, **kwargs)
        output = output._replace(metrics=broadcast_object_list([output.metrics])[0])
        self.loss_log.pause(time.perf_counter() - started)
        if isinstance(output.predictions, dict):
            output = output._replace(predictions=output.predictions["logits"])
        return output

    # ---- Checkpoints ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the weights that are evaluated; a checkpoint keeps the raw ones as well."""
        self._check_finite()
        if _internal_call and output_dir is not None:  # a checkpoint
            super().save_model(output_dir, _internal_call=True)
            self._averaging.save(Path(output_dir))
        else:
            with self._averaging.applied():
                super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            module = self.accelerator.unwrap_model(self.model)
            save_run(module, Path(output_dir or self.args.output_dir), state_dict, self.processing_class)

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

    # ---- Hub: `HubCalls` says what each takes and raises ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repo, and sees that it may be written to, before training starts."""
        self._hub_calls.make_repo(token, private)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Renders the card from the run's files."""
        if self.is_world_process_zero():
            self._hub_calls.make_card(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Pushes the student, its processor, card, plots and records in one commit."""
        return self._hub_calls.push(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():
            self._hub_calls.push_checkpoint(self._averaging.evaluated(Path(checkpoint_folder)))

    def _finish_current_push(self) -> None:
        self._hub_calls.finish()
