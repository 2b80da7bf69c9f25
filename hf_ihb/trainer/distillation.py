"""Learning from a frozen teacher by any set of methods."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import DeiTForImageClassification, PreTrainedModel, TrainingArguments

from hf_ihb.errors import RecipeError
from hf_ihb.methods import SharedKeys, methods_of
from hf_ihb.methods.base import Widths
from hf_ihb.models.classes import class_names
from hf_ihb.models.correspondence import Correspondence, blocks_of_student, correspond
from hf_ihb.models.module import StudentModule
from hf_ihb.models.processing import pixel_format
from hf_ihb.models.teacher import Teacher
from hf_ihb.step import Step, StudentOutput
from hf_ihb.trainer.arguments import DistillationTrainingArguments
from hf_ihb.trainer.collectives import stack_over_processes, sum_over_processes
from hf_ihb.trainer.label_loss import label_loss
from hf_ihb.trainer.method_losses import method_losses
from hf_ihb.trainer.supervised import SupervisedTrainer
from hf_ihb.trainer.teacher_cache import TeacherCache
from hf_ihb.trainer.teacher_scores import TeacherScores
from hf_ihb.trainer.teacher_side import TeacherSide
from hf_ihb.trainer.view_cache import ViewCache
from hf_ihb.trainer.weighing import LossWeights


class DistillationTrainer(SupervisedTrainer):
    """Trains a student by the methods whose weight is above 0.

    ``loss = task_loss_weight * ((1 - alpha) * CE + alpha * KD) + sum of weight * schedule * method``

    With `uncertainty_weighting` each of these losses has a share beside its weight.

    The teacher is asked once for each distinct view. Where it sees the stored image, what it says is a constant: it is
    computed once, kept on disk by the image's place in the training set, and read in every step (`teacher_cache`).
    Where it sees the augmented one, it is one of image, epoch and `augmentation_seed`, and can be kept for later runs.
    Both need a training set of stored images, a `StoredSplit`. Under the ``shared`` view the teacher sees the stored
    image and its tokens are resampled by the student's crop and flip; images that were mixed with another take no part
    in feature losses then. Nothing trainable stands on the teacher's side, unless `teacher_projector` asks for what the
    published study did.

    Where class scores are learned from, the teacher is scored before training on the evaluation set (on training images
    if there is none); at chance it is refused, unless it is the untrained control. Labels then teach the cls head and
    the teacher the distillation head, or both both (`distilled_heads`); otherwise labels teach the heads that
    `task_heads` names. A `DeiTForImageClassification` has a distillation token and no head on it: it gets a
    student-side one, which is never part of the saved student; not with ``distilled_heads='both'``, where its one head
    gets both.

    A teacher whose `control` is ``shuffled`` sees the next image of the per-device batch in training: pairs are lost,
    the distribution of what it says stays. In evaluation, and where statistics are taken, it sees its own.

    Args:
        model: An image classifier of transformers.
        args: `DistillationTrainingArguments`.
        *positional: Further arguments of `SupervisedTrainer`.
        teacher_model: A `Teacher`, or a model of transformers, which is frozen in place.
        teacher_processor: The image processor of a `teacher_model` that is not a `Teacher`; needed for stored images.
            Where features are learned from, whole images are brought to the size it makes; its own steps, crops among
            them, are followed where class scores alone are.
        **kwargs: Further arguments of `SupervisedTrainer`. A batch of the user's own must bring
            ``teacher_pixel_values`` where the teacher's image processor is known and is not the student's; otherwise
            the teacher sees its ``pixel_values``.
    """

    arguments_class = DistillationTrainingArguments

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
            self.teacher.align_labels(class_names(self.student.config))

    @property
    def needs_logits(self) -> bool:
        """Whether the teacher's class scores are learned from."""
        return any(method.needs.logits for method in self.methods)

    @property
    def teacher_cache(self) -> TeacherCache | None:
        """What is read in the place of the teacher, once it is open."""
        return self.teacher_side.cache

    @property
    def teacher_views(self) -> ViewCache | None:
        """What is read in the place of the teacher where it sees augmented images, once it is open."""
        return self.teacher_side.views.cache

    def _module(
        self, student: PreTrainedModel, args: TrainingArguments, first_batch: Callable[[], dict[str, Any]]
    ) -> StudentModule:
        super()._module(student, args, first_batch)
        self.methods = methods_of(args)
        layers = self._correspond(student, args, first_batch)
        self.teacher_side = TeacherSide(self, args, self.methods, layers)
        self.teacher_scores = TeacherScores(self) if self.needs_logits else None
        self._losses, self.loss_weights = method_losses(self.methods, args), LossWeights(self.methods, args)
        head = self._distillation_head(student, args)
        student_layers, widths = self._student_side(layers, student, args, first_batch)
        heads = {} if widths is None else self._heads(widths._replace(classes=student.config.num_labels), args.seed)
        final_layer = None if layers is None else layers.final_layer
        self._has_heads, attention = bool(heads), any(method.needs.attention for method in self.methods)
        return StudentModule(
            student,
            student_layers,
            heads,
            final_layer if head is None else student.config.num_hidden_layers - 1,
            head,
            attention=attention,
        )

    def _correspond(
        self, student: PreTrainedModel, args: TrainingArguments, first_batch: Callable[[], dict[str, Any]]
    ) -> Correspondence | None:
        """How the layers of both models fit; None where no method learns from features."""
        needs = [method.needs for method in self.methods]
        if not any(need.layers or need.final for need in needs):
            return None
        batch = _on_device_of(student, first_batch())
        pixels = batch["pixel_values"]
        other = batch.get("teacher_pixel_values", pixels)
        return correspond(
            student,
            self.teacher,
            SharedKeys.of(args),
            self.batches.whole_images(pixels),
            self.teacher.prepare(other, whole=True) if other.dtype == torch.uint8 else other,
            final=any(need.final for need in needs),
            several_tokens=args.cka_scope == "tokens" and any(need.layers for need in needs),
            attention=any(need.teacher_attention for need in needs),
        )

    def _student_side(
        self,
        layers: Correspondence | None,
        student: PreTrainedModel,
        args: TrainingArguments,
        first_batch: Callable[[], dict[str, Any]],
    ) -> tuple[tuple[int, ...], Widths | None]:
        """Blocks of the student whose tokens are asked for, and what heads are made for; None where there are none."""
        if layers is not None:
            return layers.student_layers, layers.widths
        if not any(method.needs.exits for method in self.methods):
            return (), None
        pixels = self.batches.whole_images(_on_device_of(student, first_batch())["pixel_values"])
        return blocks_of_student(student, pixels, args.student_layers)

    def _heads(self, widths: Widths, seed: int) -> dict[str, nn.Module]:
        heads = {}
        for method in self.methods:
            # a stream of its own: the student's initialisation must not depend on the losses that are on
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                if (head := method.head(widths)) is not None:
                    heads[method.name] = head
        return heads

    def _distillation_head(self, student: PreTrainedModel, args: TrainingArguments) -> nn.Module | None:
        """The classifier on the distillation token of a student that has none on it."""
        without = isinstance(student, DeiTForImageClassification)
        if not (without and self.needs_logits and args.distilled_heads == "distillation"):
            return None
        config = student.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            head = nn.Linear(config.hidden_size, config.num_labels)
            nn.init.trunc_normal_(head.weight, std=config.initializer_range)
            nn.init.zeros_(head.bias)
        return head

    # ---- Training ----

    def _fit_to_arguments(self) -> None:
        super()._fit_to_arguments()
        if self.model_init is None and self.methods != methods_of(self.args):
            raise RecipeError(
                "arguments of the trainer: expected the methods it was made with, found others; make another trainer, "
                "or give it a 'model_init' in the place of a model"
            )

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer`'s, after the teacher was scored and `prepare_teacher`, with the model of this training in place.

        Raises:
            TeacherMismatchError: If class scores are learned from and the teacher's accuracy is at chance.
        """
        if self.teacher_scores is not None:
            self.teacher_accuracy = self.score_teacher()
        self.prepare_teacher()
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            self.teacher_side.views.close()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.teacher_side.views.flush()
        super()._save_checkpoint(model, trial)

    def _begin_training(self, train_dataloader: DataLoader | None = None) -> None:
        super()._begin_training(train_dataloader)
        logged = any("teacher_accuracy" in entry for entry in self.state.log_history)
        if self.teacher_scores is not None and not logged:
            self.log({"teacher_accuracy": self.teacher_accuracy})

    def prepare_teacher(self) -> None:
        """Opens or builds the teacher's cache and takes its statistics, as the arguments ask.

        `train` does so; calling it before is for those who time single steps.

        Raises:
            RecipeError: If a cache is asked for that cannot serve this training.
            CacheError: If it cannot be written, or does not hold what the teacher says.
        """
        self.teacher_side.open()

    def score_teacher(self) -> float:
        """Accuracy of the teacher on the evaluation set.

        Raises:
            TeacherMismatchError: If it is not above chance by three standard errors and not the untrained control.
        """
        return self.teacher_scores.accuracy()

    def prepare(self, inputs: dict[str, Any], train: bool) -> Step:
        """Everything a step needs beside the student: what the teacher says, too, where it is learned from."""
        step = super().prepare(inputs, train)
        if train:
            step.teacher = self.teacher_side.outputs(step, shuffled=self.teacher.control == "shuffled")
            compares_places = self.teacher_side.layers is not None and self.args.teacher_view != "identical"
            if step.views is not None and compares_places:
                step.unmixed = step.views.unmixed
            if self.args.world_size > 1:
                step.reduce, step.gather = sum_over_processes, stack_over_processes
        return step

    def model_inputs(self, step: Step) -> dict[str, Any]:
        """What the heads of methods compare with, and the images of a second forward."""
        if step.teacher is None:
            return {}
        inputs: dict[str, Any] = {"teacher": step.teacher} if self._has_heads else {}
        if masked := {m.name: m.masked_pixels(step) for m in self.methods if m.needs.masked}:
            inputs["masked_pixel_values"] = masked
        return inputs

    def training_losses(self, outputs: StudentOutput, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, a scalar, and unweighted scalars to log."""
        task = label_loss(self, self._taught_heads(outputs), outputs, step)
        losses, components = self._losses(outputs, step), {"task_loss": task}
        if step.unmixed is not None and self.augmentation.mixes:
            components["compared_images"] = step.unmixed.mean()  # the share that feature losses are of
        for method in self.methods:
            value, beside = losses[method.name]
            components |= beside | {f"{method.name}_loss": value}
        values = {"task": task} | {method.name: losses[method.name][0] for method in self.methods}
        loss, weights = self.loss_weights.total(values, self.loss_weights.scheduled(self.epoch, self.num_epochs))
        return loss, components | weights

    def _taught_heads(self, outputs: StudentOutput) -> tuple[Any, ...]:
        """Logits of the heads that the labels teach."""
        if outputs.cls_logits is None:
            return outputs.heads
        if any(method.shares_task for method in self.methods):
            both = (outputs.cls_logits, outputs.distillation_logits)
            return both if self.args.distilled_heads == "both" else both[:1]
        return (outputs.cls_logits,) if self.args.task_heads == "cls" else outputs.heads

    def moved_heads(self, module: StudentModule) -> set[str]:
        """Names of the student-side and class heads of a module that a loss moves in this step."""
        weights = self.loss_weights.scheduled(self.epoch, self.num_epochs)
        moved = {name for name, weight in weights.items() if weight > 0}
        names = StudentOutput(None, "cls", "distillation", module.inference_heads)  # in the place of their logits
        if module.class_heads and weights["task"] > 0:
            moved |= set(self._taught_heads(names)) if self.compute_loss_func is None else set(module.class_heads)
        for method in self.methods:
            if method.needs.logits and weights[method.name] > 0:
                moved |= set(names.distilled(self.args.distilled_heads))
        return moved

    def evaluation_outputs(self, outputs: StudentOutput, step: Step) -> dict[str, Tensor]:
        """Logits, and for each metric of ours its value for each image ``(B,)``, agreement with the teacher too."""
        scores = super().evaluation_outputs(outputs, step)
        if self.teacher_scores is None:
            return scores
        agreement = (outputs.logits.argmax(-1) == self.teacher_scores.decisions(step.inputs)).float()
        return scores | {"teacher_agreement": agreement}


def _on_device_of(student: PreTrainedModel, batch: dict[str, Any]) -> dict[str, Any]:
    device = next(student.parameters()).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
