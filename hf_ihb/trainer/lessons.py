"""What a student learns from one teacher: the teacher, its methods, and what they look at."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_ihb.errors import RecipeError
from hf_ihb.methods import Method, SharedKeys, methods_of
from hf_ihb.methods.base import Widths
from hf_ihb.models.correspondence import Correspondence, blocks_of_student, correspond
from hf_ihb.models.processing import pixel_format
from hf_ihb.models.teacher import Teacher
from hf_ihb.step import Needs, Step, StudentOutput, TeacherOutputs
from hf_ihb.trainer.method_losses import Losses, method_losses
from hf_ihb.trainer.teacher_scores import TeacherScores
from hf_ihb.trainer.teacher_side import TeacherSide


class Lesson:
    """One teacher of a trainer, with its methods and what the trainer keeps of it.

    To `TeacherSide` and `TeacherScores` it is a trainer of one teacher: what is not its own is the trainer's.

    Args:
        trainer: That it is a lesson of.
        teacher: That is learned from.
        args: As they hold for it; None for those of the trainer, which change when a user sets others.
        number: From 1, where there are several; None for the only one.

    Attributes:
        methods: That learn from it.
        layers: How its layers fit the student's; None where no method learns from features, or before `meet`.
        teacher_side: What it says of a batch.
        teacher_scores: What it decides on images that are evaluated on; None where no method learns from class scores.
    """

    def __init__(
        self, trainer: Trainer, teacher: Teacher, args: TrainingArguments | None, number: int | None = None
    ) -> None:
        self.trainer, self.teacher, self.number = trainer, teacher, number
        self._args = args  # None: those of the trainer, which is not made yet
        self.methods: list[Method] = []
        self.layers: Correspondence | None = None
        self.teacher_side: TeacherSide | None = None
        self.teacher_scores: TeacherScores | None = None

    def __getattr__(self, name: str) -> Any:
        if name in ("trainer", "_args"):  # not there yet
            raise AttributeError(name)
        return getattr(self.trainer, name)

    @property
    def args(self) -> TrainingArguments:
        """As they hold for this teacher."""
        return self.trainer.args if self._args is None else self._args

    @args.setter
    def args(self, args: TrainingArguments) -> None:
        self._args = None if args is self.trainer.args else args

    def named(self, name: str) -> str:
        """A name of logs or heads, with the number of the teacher where there are several."""
        return name if self.number is None else f"{name}_{self.number}"

    def own(self, args: TrainingArguments) -> TrainingArguments:
        """Of the arguments of a trainer that is being made, those that hold for this teacher."""
        return args if self._args is None else self._args

    @property
    def needs(self) -> list[Needs]:
        """What its methods ask of teacher and student."""
        return [method.needs for method in self.methods]

    @property
    def introduction(self) -> str:
        """Which of several teachers it is, and what is learned from it."""
        return f"teacher {self.number}, '{self.teacher.name}': {' + '.join(m.summary() for m in self.methods)}"

    @property
    def needs_logits(self) -> bool:
        """Whether the teacher's class scores are learned from."""
        return any(need.logits for need in self.needs)

    # ---- Getting to know the student ----

    def meet(
        self, student: PreTrainedModel, args: TrainingArguments, first_batch: Callable[[], dict[str, Any]]
    ) -> None:
        """Makes methods, correspondence and the teacher's side for a student; a batch of one image tells shapes.

        Raises:
            RecipeError: If a layer of the student does not exist, or one of the teacher has a single token.
            TeacherMismatchError: If a layer of the teacher does not exist.
        """
        args = self.own(args)
        self.methods = methods_of(args)
        self.layers = self._correspond(student, args, first_batch)
        self.student_layers, self._widths = self._student_side(student, args, first_batch)
        self.teacher_side = TeacherSide(self, args, self.methods, self.layers)
        self.teacher_scores = TeacherScores(self) if self.needs_logits else None
        self._losses = method_losses(self.methods, args)
        self._places: tuple[int, ...] | None = None

    def _correspond(
        self, student: PreTrainedModel, args: TrainingArguments, first_batch: Callable[[], dict[str, Any]]
    ) -> Correspondence | None:
        """How the layers of both models fit; None where no method learns from features."""
        if not any(need.layers or need.final for need in self.needs):
            return None
        batch = _on_device_of(student, first_batch())
        pixels = batch["pixel_values"]
        other = batch.get("teacher_pixel_values", pixels)
        return correspond(
            student,
            self.teacher,
            SharedKeys.of(args),
            self.trainer.batches.whole_images(pixels),
            self.teacher.prepare(other, whole=True) if other.dtype == torch.uint8 else other,
            final=any(need.final for need in self.needs),
            several_tokens=args.cka_scope == "tokens" and any(need.layers for need in self.needs),
            attention=any(need.teacher_attention for need in self.needs),
        )

    def _student_side(
        self, student: PreTrainedModel, args: TrainingArguments, first_batch: Callable[[], dict[str, Any]]
    ) -> tuple[tuple[int, ...], Widths | None]:
        """Blocks of the student whose tokens are asked for, and what heads are made for; None where there are none."""
        if self.layers is not None:
            return self.layers.student_layers, self.layers.widths
        if not any(method.needs.exits for method in self.methods):
            return (), None
        pixels = self.trainer.batches.whole_images(_on_device_of(student, first_batch())["pixel_values"])
        return blocks_of_student(student, pixels, args.student_layers)

    def heads(self, classes: int, seed: int) -> dict[str, nn.Module]:
        """The student-side head of each method that has one; `classes` is how many the student tells apart."""
        heads = {}
        for method in self.methods if self._widths is not None else ():
            # a stream of its own: the student's initialisation must not depend on the losses that are on
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                if (head := method.head(self._widths._replace(classes=classes))) is not None:
                    one_of_several = None if self.number is None else LessonHead(head, self._places, self.number - 1)
                    heads[self.named(method.name)] = one_of_several or head
        return heads

    # ---- A step ----

    def prepared(self, step: Step) -> Step:
        """A step with what this teacher says in it."""
        said = self.teacher_side.outputs(step, shuffled=self.teacher.control == "shuffled")
        compares_places = self.layers is not None and self.args.teacher_view != "identical"
        unmixed = step.views.unmixed if step.views is not None and compares_places else None
        return replace(step, teacher=said, unmixed=unmixed)

    def losses(self, outputs: StudentOutput, step: Step) -> Losses:
        """Of each method, by its name, the loss and what is logged beside it."""
        return self._losses(self.seen(outputs), step)

    def look_at(self, union: Sequence[int]) -> None:
        """Finds this lesson's layers of the student among those of all, which a forward returns."""
        own = tuple(union.index(layer) for layer in self.student_layers)
        self._places = None if self.number is None else own

    def seen(self, outputs: StudentOutput) -> StudentOutput:
        """What a student says, as if this teacher were the only one."""
        if self._places is None:
            return outputs

        def own(found: dict[str, Any] | None) -> dict[str, Any] | None:
            names = {method.name: self.named(method.name) for method in self.methods}
            return None if found is None else {name: found[key] for name, key in names.items() if key in found}

        found = of_layers(outputs, self._places)
        return replace(found, method_heads=own(outputs.method_heads), masked=own(outputs.masked))


def _on_device_of(student: PreTrainedModel, batch: dict[str, Any]) -> dict[str, Any]:
    device = next(student.parameters()).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def of_layers(outputs: StudentOutput, places: Sequence[int]) -> StudentOutput:
    """What a student says, with the layers at some places among those it returned."""
    features = tuple((outputs.features or ())[place] for place in places)
    return replace(outputs, features=features or None)


class LessonHead(nn.Module):
    """The student-side head of a method of one of several teachers: sees that teacher and its layers alone.

    Args:
        head: Of the method.
        places: Of the teacher's layers of the student, among those that a forward returns.
        teacher: Which of the teachers, from 0.
    """

    def __init__(self, head: nn.Module, places: Sequence[int], teacher: int) -> None:
        super().__init__()
        self.head, self.places, self.teacher = head, tuple(places), teacher

    def forward(self, student: StudentOutput, teachers: Sequence[TeacherOutputs]) -> Any:
        """What the method's head returns of the student and its teacher."""
        return self.head(of_layers(student, self.places), teachers[self.teacher])


def teachers_from(models: Sequence[Teacher | PreTrainedModel], processors: Any) -> list[Teacher]:
    """Frozen teachers, of models of transformers too.

    Args:
        models: Teachers, or models that become one.
        processors: The image processor of each model, one or a list; None where callers bring pixels.
    """
    each = list(processors) if isinstance(processors, Sequence) else [processors] * len(models)
    if len(each) != len(models):
        raise RecipeError(f"'teacher_processor': expected one for each of {len(models)} teachers, found {len(each)}")
    pixels = [None if processor is None else pixel_format(processor) for processor in each]
    return [x if isinstance(x, Teacher) else Teacher(x, own) for x, own in zip(models, pixels, strict=True)]


def lessons_of(trainer: Trainer, teachers: Sequence[Teacher], args: TrainingArguments) -> list[Lesson]:
    """A lesson for each teacher.

    Raises:
        RecipeError: If there are not as many teachers as entries of `teacher_models`.
    """
    if len(teachers) != len(args.teacher_models or [None]):
        raise RecipeError(
            f"key 'teacher_models': expected an entry for each of {len(teachers)} teachers, found "
            f"{len(args.teacher_models or ())}"
        )
    if args.teacher_models is None:
        return [Lesson(trainer, teachers[0], None)]
    taught = zip(teachers, args.of_each_teacher(), strict=True)
    return [Lesson(trainer, *pair, number if len(teachers) > 1 else None) for number, pair in enumerate(taught, 1)]


def meet_student(
    lessons: Sequence[Lesson], student: PreTrainedModel, first_batch: Callable[[], dict[str, Any]], args: Any
) -> tuple[int, ...]:
    """Makes what each lesson needs of a student; returns the student's layers that are looked at, in all."""
    for lesson in lessons:
        lesson.meet(student, args, first_batch)
    asked = [lesson for lesson in lessons if lesson.own(args).teacher_standardization == "phi_s"]
    if asked and not any(need.preparation == "standardized" for x in asked for need in x.needs):
        raise RecipeError(
            "key 'teacher_standardization': expected 'none' where no method compares standardised tokens, such as the "
            "token loss without 'teacher_projector', found 'phi_s'"
        )
    own = [lesson.student_layers for lesson in lessons if lesson.student_layers]
    union = own[0] if len(lessons) == 1 and own else tuple(sorted({layer for layers in own for layer in layers}))
    for lesson in lessons:
        lesson.look_at(union)
    return union


def take_arguments(lessons: Sequence[Lesson], args: TrainingArguments, *, may_change: bool) -> None:
    """Goes on with what a trainer's arguments are now.

    Args:
        lessons: Of the trainer.
        args: Of the trainer.
        may_change: Whether lessons are made anew for each training.

    Raises:
        RecipeError: If they are not, and the methods are others.
    """
    each = args.of_each_teacher()
    if not may_change and [lesson.methods for lesson in lessons] != [methods_of(own) for own in each]:
        raise RecipeError(
            "arguments of the trainer: expected the methods it was made with, found others; make another trainer, "
            "or give it a 'model_init' in the place of a model"
        )
    for lesson, own in zip(lessons, each, strict=True):
        lesson.args = own
