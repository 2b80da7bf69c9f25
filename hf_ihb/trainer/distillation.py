"""Learning from a frozen teacher by any set of methods."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import DeiTForImageClassification, PreTrainedModel, TrainingArguments

from hf_ihb.errors import RecipeError
from hf_ihb.methods import Method
from hf_ihb.models.classes import class_names
from hf_ihb.models.module import StudentModule
from hf_ihb.models.teacher import Teacher
from hf_ihb.step import Step, StudentOutput
from hf_ihb.trainer.arguments import DistillationTrainingArguments
from hf_ihb.trainer.collectives import stack_over_processes, sum_over_processes
from hf_ihb.trainer.label_loss import label_loss
from hf_ihb.trainer.lessons import Lesson, lessons_of, meet_student, take_arguments, teachers_from
from hf_ihb.trainer.supervised import SupervisedTrainer
from hf_ihb.trainer.teacher_cache import TeacherCache
from hf_ihb.trainer.teacher_dropping import kept_teachers
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

    With several teachers (`teacher_models`) each has its methods, layers, view and cache, as it would alone; the
    student looks at the layers of all in one forward. What is logged of one ends in its number, from 1. ``alpha``
    above is the sum of theirs. `teacher`, `teacher_side`, `teacher_scores` and `teacher_cache` are of the first.

    A teacher whose `control` is ``shuffled`` sees the next image of the per-device batch in training: pairs are lost,
    the distribution of what it says stays. In evaluation, and where statistics are taken, it sees its own.

    Args:
        model: An image classifier of transformers.
        args: `DistillationTrainingArguments`.
        *positional: Further arguments of `SupervisedTrainer`.
        teacher_model: A `Teacher`, or a model of transformers, which is frozen in place; or a list of them, one for
            each entry of `teacher_models`.
        teacher_processor: The image processor of a `teacher_model` that is not a `Teacher`, or a list of one for each;
            needed for stored images. Where features are learned from, whole images are brought to the size it makes;
            its own steps, crops among them, are followed where class scores alone are.
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
        teacher_model: Teacher | PreTrainedModel | Sequence[Teacher | PreTrainedModel],
        teacher_processor: Any = None,
        **kwargs: Any,
    ) -> None:
        given = list(teacher_model) if isinstance(teacher_model, Sequence) else [teacher_model]
        self.teachers, self.teacher_accuracies = teachers_from(given, teacher_processor), {}
        if any(t.control == "shuffled" for t in self.teachers) and args.per_device_train_batch_size < 2:
            raise RecipeError(
                "keys 'teacher_control' and 'per_device_train_batch_size' contradict: one image has no next"
            )
        super().__init__(model, args, *positional, **kwargs)
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(self.args.teacher_dtype)
        if self.args.teacher_dtype == "auto" and self.accelerator.mixed_precision == "bf16":
            dtype = torch.bfloat16
        for lesson, own in zip(self.lessons, given, strict=True):
            lesson.teacher.to(self.args.device, dtype)
            if lesson.needs_logits and not isinstance(own, Teacher):
                lesson.teacher.align_labels(class_names(self.student.config))

    @property
    def teacher(self) -> Teacher:
        """The teacher; the first of several."""
        return self.teachers[0]

    @property
    def methods(self) -> list[Method]:
        """What is learned by, from whichever teacher."""
        return [method for lesson in self.lessons for method in lesson.methods]

    @property
    def needs_logits(self) -> bool:
        """Whether a teacher's class scores are learned from."""
        return any(lesson.needs_logits for lesson in self.lessons)

    @property
    def teacher_side(self) -> TeacherSide:
        """What the teacher, the first of several, says of a batch."""
        return self.lessons[0].teacher_side

    @property
    def teacher_cache(self) -> TeacherCache | None:
        """What is read in the place of the teacher, the first of several, once it is open."""
        return self.teacher_side.cache

    @property
    def teacher_views(self) -> ViewCache | None:
        """What is read in the place of the teacher, the first of several, where it sees augmented images."""
        return self.teacher_side.views.cache

    def _module(
        self, student: PreTrainedModel, args: TrainingArguments, first_batch: Callable[[], dict[str, Any]]
    ) -> StudentModule:
        super()._module(student, args, first_batch)
        self.lessons = lessons_of(self, self.teachers, args)
        layers = meet_student(self.lessons, student, first_batch, args)
        self.teacher_scores = next((x.teacher_scores for x in self.lessons if x.needs_logits), None)
        self.loss_weights = LossWeights({x.named(m.name): m for x in self.lessons for m in x.methods}, args)
        head = self._distillation_head(student, args)
        classes = student.config.num_labels
        heads = {name: part for lesson in self.lessons for name, part in lesson.heads(classes, args.seed).items()}
        finals = [x.layers.final_layer for x in self.lessons if x.layers is not None and x.layers.has_final]
        self._has_heads, attention = bool(heads), any(method.needs.attention for method in self.methods)
        return StudentModule(
            student,
            layers,
            heads,
            (finals[0] if finals else None) if head is None else student.config.num_hidden_layers - 1,
            head,
            attention=attention,
        )

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
        take_arguments(self.lessons, self.args, may_change=self.model_init is not None)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer`'s, after each teacher was scored and `prepare_teacher`, with the model of this training in place.

        Raises:
            TeacherMismatchError: If class scores are learned from and the teacher's accuracy is at chance.
        """
        if self.teacher_scores is not None:
            self.teacher_accuracy = self.score_teacher()
        self.prepare_teacher()
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            for lesson in self.lessons:
                lesson.teacher_side.views.close()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        for lesson in self.lessons:
            lesson.teacher_side.views.flush()
        super()._save_checkpoint(model, trial)

    def _begin_training(self, train_dataloader: DataLoader | None = None) -> None:
        super()._begin_training(train_dataloader)
        logged = any(name in entry for entry in self.state.log_history for name in self.teacher_accuracies)
        if self.teacher_accuracies and not logged:
            self.log(dict(self.teacher_accuracies))

    def prepare_teacher(self) -> None:
        """Opens or builds the teacher's cache and takes its statistics, as the arguments ask.

        `train` does so; calling it before is for those who time single steps.

        Raises:
            RecipeError: If a cache is asked for that cannot serve this training.
            CacheError: If it cannot be written, or does not hold what the teacher says.
        """
        for lesson in self.lessons:
            if lesson.number is not None and self.is_world_process_zero():
                print(lesson.introduction, flush=True)
            lesson.teacher_side.open()

    def score_teacher(self) -> float:
        """Accuracy on the evaluation set of the teacher whose class scores are learned from, the first of several.

        Raises:
            TeacherMismatchError: If one is not above chance by three standard errors and not the untrained control.
        """
        scored = [lesson for lesson in self.lessons if lesson.teacher_scores is not None]
        self.teacher_accuracies = {x.named("teacher_accuracy"): x.teacher_scores.accuracy() for x in scored}
        return next(iter(self.teacher_accuracies.values()))

    def prepare(self, inputs: dict[str, Any], train: bool) -> Step:
        """Everything a step needs beside the student: what each teacher says, too; first what the first one says."""
        step = super().prepare(inputs, train)
        if not train:
            return step
        if self.args.world_size > 1:
            step.reduce, step.gather = sum_over_processes, stack_over_processes
        each = tuple(lesson.prepared(step) for lesson in self.lessons)
        # a step that named itself would stay, with all its tensors, until the garbage collector comes
        return each[0] if len(each) == 1 else replace(each[0], of_teachers=each)

    def model_inputs(self, step: Step) -> dict[str, Any]:
        """What the heads of methods compare with, and the images of a second forward."""
        if step.teacher is None:
            return {}
        inputs: dict[str, Any] = {}
        if self._has_heads:
            said = tuple(own.teacher for _, own in self._taught(step))
            inputs["teacher"] = said if len(said) > 1 else step.teacher
        pairs = [(x.named(m.name), m, own) for x, own in self._taught(step) for m in x.methods if m.needs.masked]
        if masked := {name: method.masked_pixels(own) for name, method, own in pairs}:
            inputs["masked_pixel_values"] = masked
        return inputs

    def _taught(self, step: Step) -> list[tuple[Lesson, Step]]:
        """Each lesson with the step as it sees it."""
        return list(zip(self.lessons, step.of_teachers or (step,), strict=True))

    def training_losses(self, outputs: StudentOutput, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, a scalar, and unweighted scalars to log."""
        task = label_loss(self, self._taught_heads(outputs), outputs, step)
        values, components = {"task": task}, {"task_loss": task}
        for lesson, own in self._taught(step):
            losses = lesson.losses(outputs, own)
            if own.unmixed is not None and self.augmentation.mixes:
                components[lesson.named("compared_images")] = own.unmixed.mean()  # the share that feature losses are of
            for method in lesson.methods:
                values[lesson.named(method.name)], beside = losses[method.name]
                found = beside | {f"{method.name}_loss": losses[method.name][0]}
                components |= {lesson.named(name): part for name, part in found.items()}
        weights: dict[str, Any] = self.loss_weights.scheduled(self.epoch, self.num_epochs)
        if self.args.teacher_dropping > 0:
            weights = self._dropped(values, weights, components)
        loss, logged = self.loss_weights.total(values, weights)
        return loss, components | logged

    def _dropped(
        self, values: dict[str, Tensor], weights: dict[str, Any], components: dict[str, Tensor]
    ) -> dict[str, Any]:
        """Weights, those of teachers that this step leaves out times 0; logs who was kept."""
        names = [[lesson.named(method.name) for method in lesson.methods] for lesson in self.lessons]
        losses = torch.stack([sum(weights[n] * values[n].detach().float() for n in own) for own in names])
        if self.args.world_size > 1:
            losses = sum_over_processes(losses)
        kept = kept_teachers(losses, self.args.teacher_dropping, self.args.seed, self.state.global_step)
        components.update({x.named("teacher_kept"): share for x, share in zip(self.lessons, kept, strict=True)})
        of_methods = {n: share * weights[n] for own, share in zip(names, kept, strict=True) for n in own}
        # what shares the labels' weight takes it from them, whichever teacher it is of
        return {"task": self.loss_weights.of_labels(of_methods)} | of_methods

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
        for name, method in self.loss_weights.methods.items():
            if method.needs.logits and weights[name] > 0:
                moved |= set(names.distilled(self.args.distilled_heads))
        return moved

    def evaluation_outputs(self, outputs: StudentOutput, step: Step) -> dict[str, Tensor]:
        """Logits, and for each metric of ours its value for each image ``(B,)``, agreement with the teacher too."""
        scores = super().evaluation_outputs(outputs, step)
        if self.teacher_scores is None:
            return scores
        for lesson in self.lessons:
            if lesson.teacher_scores is not None:
                decisions = lesson.teacher_scores.decisions(step.inputs)
                agreement = (outputs.logits.argmax(-1) == decisions).float()
                scores[lesson.named("teacher_agreement")] = agreement
        return scores
