"""Training on labels, and what every trainer here shares: steps, logs, evaluation, strict checkpoints."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.models.inputs import processor_beside
from hf_ihb.models.module import StudentModule
from hf_ihb.step import Step, StudentOutput
from hf_ihb.trainer.arguments import SupervisedTrainingArguments
from hf_ihb.trainer.batches import Batches, first_batch, image_collator
from hf_ihb.trainer.callbacks import is_over
from hf_ihb.trainer.evaluating import image_scores, of_main_process, take_metrics
from hf_ihb.trainer.fitting import WrappedInit, lay_out, take_losses, wrapped
from hf_ihb.trainer.hub_calls import HubCalls
from hf_ihb.trainer.label_loss import evaluation_loss, label_loss
from hf_ihb.trainer.loaders import image_loader
from hf_ihb.trainer.loss_log import LossLog
from hf_ihb.trainer.optimization import check_schedule, decayed_parameters, optimizer_settings, take_heads
from hf_ihb.trainer.publishing import Publishing
from hf_ihb.trainer.trials import Trials, fit_to_arguments


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
        processing_class: Image processor, saved with the model. Stored images that are evaluated go through its steps;
            in training, all of each is brought to the size that they make. One that stored images cannot be put through
            is refused. A timm model keeps it in its config, which holds whole images of one size alone.
        augmentation: What stored images go through in training; nothing if None.
        **kwargs: Further arguments of `Trainer`. `compute_metrics` sees the logits of inference; its metrics are added
            to ours.
    """

    arguments_class: type[TrainingArguments] = SupervisedTrainingArguments
    settings: Sequence[Any] = ()  # dataclasses of keys that student, teacher and data were made of

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
        data_collator = image_collator(data_collator, args)
        self._processor = processing_class
        self.augmentation = augmentation or AugmentationArguments()
        self.batches = Batches(args, self.augmentation)
        self._publishing = Publishing(self)
        self._hub_calls = HubCalls(self, self._publishing)
        images = train_dataset if train_dataset is not None else eval_dataset
        wrap = functools.partial(wrapped, self, args, functools.partial(first_batch, images, data_collator))
        if kwargs.get("model_init") is not None:
            kwargs["model_init"] = WrappedInit(kwargs["model_init"], wrap)
        super().__init__(
            model=None if model is None else wrap(model),
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.processing_class = self._processor
        self.batches.check(train_dataset, eval_dataset)
        args.check_with([self.augmentation])
        check_schedule(self.optimizer, self.lr_scheduler)
        take_losses(self)
        take_metrics(self)
        self._steps_per_epoch: int | None = None
        self.loss_log = LossLog()
        self._trials = Trials(self)
        self._fit_to_arguments()

    def _fit_to_arguments(self) -> None:
        fit_to_arguments(self)

    @property
    def student(self) -> PreTrainedModel:
        """The model that was passed in."""
        return self.accelerator.unwrap_model(self.model).student

    def _module(
        self, student: PreTrainedModel, args: TrainingArguments, first_batch: Callable[[], dict[str, Any]]
    ) -> StudentModule:
        """The module that is trained, of the model that was passed in; a batch of one image tells shapes."""
        if not isinstance(student, PreTrainedModel):
            raise TypeError(f"expected an image classifier of transformers, got {type(student).__name__}")
        self._processor = processor_beside(student, self._processor)
        self.batches.serve(student, self._processor)
        return StudentModule(student)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        super()._move_model_to_device(model, device)  # not called for sharded models
        lay_out(model)

    def train(self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, **kwargs: Any) -> Any:
        """Trains; ``resume_from_checkpoint=True`` goes on from the newest complete checkpoint.

        Raises:
            CheckpointError: If there is none that verifies, or it was trained with other settings.
            NumericsError: If a loss or gradient is not finite; nothing of it is saved, see `LossLog.check_finite`.
            Preempted: If it was told to end (SIGTERM); it has saved its last step.
            ProcessLostError: If another process of the training ended.
        """
        self._trials.begin(trial)
        with self.checkpoints.training(resume_from_checkpoint) as checkpoint:
            return super().train(resume_from_checkpoint=checkpoint, trial=trial, **kwargs)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`'s; keys of augmentation can be tuned as well, and every value is checked."""
        self._trials.start()
        return super().hyperparameter_search(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if not is_over(self):
            super()._run_epoch(*args, **kwargs)

    def _begin_training(self, train_dataloader: DataLoader | None = None) -> None:
        self.loss_log.reset()
        if train_dataloader is not None:
            self._steps_per_epoch = self.set_initial_training_values(self.args, train_dataloader)[1]
        if self.args.world_size > 1:
            # ranks start from one seed; left so, drop path would drop the same rows on each of them
            torch.manual_seed(self.args.seed + self.args.process_index)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Training: the weighted losses. Evaluation: the user's, or unsmoothed cross-entropy of the final logits."""
        step = self.prepare(inputs, train=model.training)
        with self.accelerator.autocast() if self._autocasts else contextlib.nullcontext():
            outputs: StudentOutput = model(pixel_values=step.pixel_values, **self.model_inputs(step))
        if not model.training:
            loss = evaluation_loss(self, outputs, step)
            return (loss, self.evaluation_outputs(outputs, step)) if return_outputs else loss
        loss, components = self.training_losses(outputs, step)
        if outputs.cls_logits is not None:  # a head that no loss uses gets a gradient as well: DDP counts on it
            loss = loss + 0 * (outputs.cls_logits.mean() + outputs.distillation_logits.mean())
        of, images = self.state.global_step, len(step.labels) * self.args.world_size
        self.loss_log.record(of, loss, components, images, inputs.get("index"))
        return (loss, {"logits": outputs.logits}) if return_outputs else loss

    def prepare(self, inputs: dict[str, Any], train: bool) -> Step:
        """Everything a step needs beside the student, of a batch on the device; to `train` it is augmented."""
        return self.batches.step(inputs, train, self.epoch, self.train_dataset)

    def model_inputs(self, step: Step) -> dict[str, Any]:
        """What the forward of the module takes beside the pixels."""
        return {}

    def training_losses(self, outputs: StudentOutput, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, a scalar, and unweighted scalars to log."""
        task = label_loss(self, outputs.heads, outputs, step)
        return task, {"task_loss": task}

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
        self.loss_log.check_finite(self.args.output_dir)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.loss_log.record_gradient(self.state.global_step, grad_norm, self.accelerator.scaler)
        return grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs; what is said of training gets every loss component and the images per second since the last time."""
        if "loss" in logs:
            self._check_finite()
            logs.update(self.loss_log.read(self.accelerator.reduce))
        super().log(logs, start_time)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Parameters with weight decay: no norms, biases, tokens or positions, unless `weight_decay_scope` is 'all'."""
        return decayed_parameters(model, super().get_decay_parameter_names(model), self.args.weight_decay_scope)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: PreTrainedModel | None = None) -> tuple[Any, Any]:
        """Class and settings of the optimizer; ``optim_args`` reach SGD too (``momentum=0.9,nesterov=true``)."""
        return optimizer_settings(args, model)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer; one that was passed in gets the student-side heads, of which its maker could not know."""
        if self.optimizer is not None:
            take_heads(self.optimizer, self.accelerator.unwrap_model(self.model))
        return super().create_optimizer(*([] if model is None else [model]))

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The schedule; with `swa_learning_rate` it approaches that from `swa_start` on."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.args.swa_learning_rate is not None:
            steps_per_epoch = self.set_initial_training_values(self.args, self.get_train_dataloader())[1]
            self._averaging.anneal(scheduler, num_training_steps, steps_per_epoch)
        return scheduler

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> DataLoader:
        return image_loader(self, dataset, *args, **kwargs)

    def evaluation_outputs(self, outputs: StudentOutput, step: Step) -> dict[str, Tensor]:
        """Logits, and for each metric of ours its value for each image ``(B,)``."""
        return image_scores(outputs, step)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """Loss, logits with our metrics of each image, and labels of a batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return (loss, None, None) if prediction_loss_only else (loss, outputs, inputs.get("labels"))

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> Any:
        """Evaluates; `predictions` are the logits of inference, metrics those of the main process."""
        self._check_finite()
        with self.loss_log.pause(), self._averaging.applied(), self.batches.evaluating(dataloader):
            self.compute_metrics.reset()
            return of_main_process(super().evaluation_loop(dataloader, *args, **kwargs))

    # ---- Checkpoints: `Checkpoints` says what each does ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the weights that are evaluated; a checkpoint keeps the raw ones as well."""
        self._check_finite()
        self.checkpoints.save(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.checkpoints.save_checkpoint(trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        self.checkpoints.write(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.checkpoints.load(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self.checkpoints.load_optimizer(checkpoint, super()._load_optimizer_and_scheduler)

    def _load_best_model(self) -> None:
        self.checkpoints.load_best()

    # ---- Hub: `HubCalls` says what each takes and raises ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repo, and sees that it may be written to, before training starts."""
        self._hub_calls.make_repo(token, private)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Renders the card from the run's files."""
        self._hub_calls.make_card(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Pushes the student, its processor, card, plots and records in one commit."""
        return self._hub_calls.push(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._hub_calls.push_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        self._hub_calls.finish()
