"""What a run with several teachers learns from each: the arguments of the run, with those of the teacher's entry."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

from hf_ihb.config.fields import is_key
from hf_ihb.config.model import TeacherArguments
from hf_ihb.config.teachers import TEACHER_KEYS, SeveralTeachers, check_entries, naming
from hf_ihb.methods import METHODS, Method, SharedKeys, methods_of

# What an entry may hold beside the keys of its teacher: heads are the student's, and what all losses share the run's.
_OF_THE_RUN = {"distilled_heads", "uncertainty_weighting"}
OF_EACH_TEACHER = {f.name for kind in (SharedKeys, *METHODS) for f in fields(kind) if is_key(f)} - _OF_THE_RUN
OF_EACH_TEACHER |= {"teacher_view", "teacher_logits_view", "teacher_cache"}


@dataclass
class TeachersArguments(SeveralTeachers):
    """Keys of several teachers as a part of arguments that are `Remade` and hold the keys of methods."""

    def of_each_teacher(self) -> list[Self]:
        """The arguments as they hold for each teacher: these themselves where there is one.

        Raises:
            ValueError: If what an entry of `teacher_models` says contradicts.
        """
        if self.teacher_models is None:
            return [self]
        found = []
        for number, entry in enumerate(self.teacher_models):
            own = {name: value for name, value in entry.items() if name in OF_EACH_TEACHER}
            with naming(number):
                found.append(self.remade(teacher_models=None, teacher_dropping=0.0, **own))
        return found

    def pin_teachers(self, teachers: Sequence[TeacherArguments]) -> None:
        """Writes into the entries, where there are any, which commits of their teachers are read."""
        for entry, teacher in zip(self.teacher_models or (), teachers, strict=self.teacher_models is not None):
            entry["teacher_revision"] = teacher.teacher_revision

    def check_teachers(self, on: Sequence[Method]) -> None:
        """Refuses entries that are none, or stand beside what they take the place of.

        Args:
            on: Methods that the run's own keys switch on.

        Raises:
            ValueError: If so, naming both keys.
        """
        if self.teacher_models is not None:
            of_run = {f.name for f in fields(self)} - OF_EACH_TEACHER
            check_entries(self.teacher_models, OF_EACH_TEACHER | TEACHER_KEYS, of_run)
            if on:
                name = "method" if on[0].shares_task and self.method == "logits" else on[0].weight_key
                raise ValueError(
                    f"keys 'teacher_models' and '{name}' contradict: what is learned from each teacher stands in its "
                    f"entry, expected '{name}' there, found {getattr(self, name)!r} beside them"
                )
        if self.teacher_dropping > 0 and len(self.teacher_models or ()) < 2:
            raise ValueError(
                f"keys 'teacher_dropping' and 'teacher_models' contradict: the only teacher is never left out, "
                f"expected teacher_dropping 0, found {self.teacher_dropping}"
            )

    def check_shares(self) -> None:
        """Refuses entries that contradict in themselves, or take more of the labels' weight than there is.

        Raises:
            ValueError: If so.
        """
        if self.teacher_models is None:
            return
        shares = [m.largest_weight for own in self.of_each_teacher() for m in methods_of(own) if m.shares_task]
        if sum(shares) > 1 + 1e-9:
            raise ValueError(
                f"key 'teacher_models': expected values of 'alpha' that leave the labels 0 or more, found "
                f"{' + '.join(f'{share:g}' for share in shares)}, above 1"
            )
