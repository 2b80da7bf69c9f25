"""Distillation by class scores."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import DeiTForImageClassification, PreTrainedModel, TrainingArguments

from hf_ihb.data import host_index
from hf_ihb.errors import TeacherMismatchError
from hf_ihb.losses import logit_distillation_loss, scheduled_alpha
from hf_ihb.models.module import StudentModule, StudentOutput
from hf_ihb.teacher_cache import Kind, Layout
from hf_ihb.trainer.arguments import LogitDistillationTrainingArguments
from hf_ihb.trainer.distillation import DistillationTrainer, spread
from hf_ihb.views import Views


class _Decisions:
    """The classes a teacher gave to the images of a data set, and which of them it was asked about.

    The second is kept on the host: asking a device in every batch of an evaluation would wait for it each time.
    """

    def __init__(self, dataset: Dataset, device: torch.device) -> None:
        self.dataset = dataset  # as long as it is held, no other has its id
        self.classes = torch.zeros(len(dataset), dtype=torch.long, device=device)
        self.known = np.zeros(len(dataset), bool)


class LogitDistillationTrainer(DistillationTrainer):
    """Distillation by class scores: cross-entropy on the cls head, the teacher on the distillation head.

    ``loss = (1 - alpha) * CE(cls, labels) + alpha * KD(distillation, teacher)``. With ``distilled_heads='both'`` each
    is the mean over both heads, and a student with one head gets both on its `logits` either way. Before training the
    teacher is scored on the evaluation set (on training images if there is none); at chance it is refused, unless it
    is the untrained control.

    A `DeiTForImageClassification` has a distillation token and no head on it. It gets a student-side one, which is
    trained by the teacher and never part of the saved student; not with ``distilled_heads='both'``, where its one head
    gets both.

    References:
        Hinton et al., 2015, https://arxiv.org/abs/1503.02531; Touvron et al., 2021, https://arxiv.org/abs/2012.12877
    """

    arguments_class = LogitDistillationTrainingArguments
    needs_logits = True
    _SCORED_TRAINING_IMAGES = 1000

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._teacher_decisions: dict[int, _Decisions] = {}
        super().__init__(*args, **kwargs)

    def _module(self, student: PreTrainedModel, args: TrainingArguments) -> StudentModule:
        module = super()._module(student, args)
        if isinstance(student, DeiTForImageClassification) and args.distilled_heads == "distillation":
            config = student.config
            # a stream of its own: the student's initialisation must not depend on how it is distilled
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(args.seed)
                head = nn.Linear(config.hidden_size, config.num_labels)
                nn.init.trunc_normal_(head.weight, std=config.initializer_range)
                nn.init.zeros_(head.bias)
            last = config.num_hidden_layers - 1
            module = StudentModule(student, final_layer=last, distillation_head=head)
        return module

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `DistillationTrainer.train`.

        Raises:
            TeacherMismatchError: If the teacher's accuracy is at chance.
        """
        self.teacher_accuracy = self.score_teacher()
        return super().train(*args, **kwargs)

    def _begin_training(self) -> None:
        super()._begin_training()
        if not any("teacher_accuracy" in entry for entry in self.state.log_history):
            self.log({"teacher_accuracy": self.teacher_accuracy})

    def score_teacher(self) -> float:
        """Accuracy of the teacher on the evaluation set.

        Raises:
            TeacherMismatchError: If it is not above chance by three standard errors and not the untrained control.
        """
        if self.eval_dataset is not None:
            datasets = self.eval_dataset
            loader = self.get_eval_dataloader(next(iter(datasets.values())) if isinstance(datasets, dict) else None)
        else:
            loader = self.get_eval_dataloader(spread(self.train_dataset, self._SCORED_TRAINING_IMAGES))
        correct, count = 0, 0  # added up on the device: nothing is waited for
        bar = tqdm(loader, desc="Scoring the teacher", disable=self._quiet)
        self._eval_dataset = loader.dataset
        for inputs in bar:
            inputs = self._prepare_inputs(inputs)
            labels = inputs["labels"].argmax(-1) if inputs["labels"].ndim == 2 else inputs["labels"]
            hits = self.accelerator.gather_for_metrics(self._teacher_decision(inputs) == labels)
            correct, count = correct + hits.sum(), count + len(hits)
        num_labels = self.student.config.num_labels
        accuracy, chance = int(correct) / count, 1 / num_labels
        if self.teacher.control != "untrained" and accuracy <= chance + 3 * (chance * (1 - chance) / count) ** 0.5:
            raise TeacherMismatchError(
                f"teacher '{self.teacher.name}': expected accuracy above chance, {chance:.3f}, found {accuracy:.3f} "
                f"on {count} images; its labels are probably in another order, or it wants other pixels"
            )
        return accuracy

    def _teacher_decision(self, inputs: dict[str, Any]) -> Tensor:
        """``(B,)`` the teacher's classes for an evaluation batch; asked once for each stored image."""
        index = inputs.get("index")
        if index is None or inputs["pixel_values"].dtype != torch.uint8 or not hasattr(self._eval_dataset, "images"):
            return self._teacher_logits(inputs, None).argmax(-1)
        if (found := self._teacher_decisions.get(id(self._eval_dataset))) is None:
            found = self._teacher_decisions[id(self._eval_dataset)] = _Decisions(self._eval_dataset, index.device)
        rows = host_index(inputs)
        if not found.known[rows].all():
            found.classes[index] = self._teacher_logits(inputs, None).argmax(-1)
            found.known[rows] = True
        return found.classes[index]

    def _teacher_logits(self, inputs: dict[str, Any], views: Views | None) -> Tensor:
        with torch.no_grad(), self.accelerator.autocast():
            return self.teacher.logits(self._teacher_pixels(inputs, views))

    # ---- The cache ----

    def _smallest_cache(self) -> Kind:
        return "logits"

    def _cache_layout(self, kind: Kind) -> Layout:
        return Layout(kind, ((1, self.student.config.num_labels),))

    def _cache_reason(self, kind: Kind) -> str:
        return "the teacher sees the stored image"

    def _teacher_answer(self, inputs: dict[str, Any], views: Views | None) -> list[Tensor]:
        return [self._teacher_logits(inputs, views)[:, None]]

    # ---- Losses ----

    def _evaluation_outputs(self, outputs: StudentOutput, inputs: dict[str, Any]) -> dict[str, Tensor]:
        agreement = (outputs.logits.argmax(-1) == self._teacher_decision(inputs)).float()
        return super()._evaluation_outputs(outputs, inputs) | {"teacher_agreement": agreement}

    def training_losses(
        self, outputs: StudentOutput, targets: Tensor, inputs: dict[str, Any], views: Views | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See the class."""
        args = self.args
        taught = distilled = (outputs.logits,)
        if outputs.cls_logits is not None:
            taught, distilled = (outputs.cls_logits,), (outputs.distillation_logits,)
            if args.distilled_heads == "both":
                taught = distilled = taught + distilled
        cached = self._cached_answer(inputs, views)
        teacher = self._teacher_logits(inputs, views) if cached is None else cached[0][:, 0]
        task = self._task_loss(taught, outputs, targets, inputs)
        kd = torch.stack(
            [logit_distillation_loss(head, teacher, args.distillation_type, args.temperature) for head in distilled]
        ).mean()
        decision = torch.stack(distilled).detach().mean(0).argmax(-1)
        components = {
            "task_loss": task,
            "kd_loss": kd,
            "teacher_agreement": (decision == teacher.argmax(-1)).float().mean(),
        }
        return (1 - self._alpha) * task + self._alpha * kd, components

    @property
    def _alpha(self) -> float:
        args = self.args
        return scheduled_alpha(
            self._epoch,
            self._num_epochs,
            args.alpha_start,
            args.alpha,
            args.alpha_schedule,
            args.distillation_warmup_epochs,
            args.distillation_warmup_type,
        )
