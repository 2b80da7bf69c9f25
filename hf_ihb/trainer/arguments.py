"""Keys of training: `TrainingArguments` with ours."""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_tf32_available

from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.fields import (
    AT_LEAST_ONE,
    FRACTION_BELOW_ONE,
    NON_NEGATIVE,
    Checked,
    Remade,
    is_key,
    key,
    type_hints,
)
from hf_ihb.config.model import TeacherArguments
from hf_ihb.config.teachers import naming, teachers_of
from hf_ihb.config.training import meet_in_time, refuse_several_gpus, refuse_unhonoured
from hf_ihb.methods import METHODS, Method, SharedKeys, methods_of
from hf_ihb.methods.rows import more_because, smallest_row, tokens_because
from hf_ihb.methods.teachers import TeachersArguments


@dataclass
class SupervisedTrainingArguments(Remade, TrainingArguments):
    """`TrainingArguments` with the defaults that image batches made on the device need.

    Changed defaults: `remove_unused_columns=False` (augmentation needs the sample index), `dataloader_drop_last=True`
    (a short last batch would weigh more per image; evaluation always sees every image),
    `logging_nan_inf_filter=False` (a NaN is an error, not a gap), `ddp_find_unused_parameters=False` (every parameter
    gets a gradient), `tf32=False` (losses are in float32; stock bfloat16 with `torch_compile` turns it on for them),
    `data_seed=seed`.

    One process with several visible GPUs is refused: `torch.nn.DataParallel` would take another batch than was asked
    for, and no autocast.
    """

    _argument_group_name = "training"

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Remove columns the model does not take from a `datasets.Dataset`."}
    )
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Drop the last incomplete batch of training; evaluation sees every image."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave NaN and Inf out of the logged loss (they stop the run anyway)."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Passed to DistributedDataParallel; every parameter gets a gradient here."}
    )
    tf32: bool | None = field(
        default=False,
        metadata={"help": "TF32 in float32 matrix products, those of the losses too; convolutions use it either way."},
    )
    weight_decay_scope: Literal["weights", "all"] = key(
        "weights",
        "'weights': no decay on norms, biases, tokens and positions; 'all': on every parameter.",
        published={"all": "norms, biases, tokens and positions are decayed"},
    )
    ema_decay: float = key(
        0.0,
        "Decay of a moving average of the weights, per optimizer step; the average is evaluated and saved. It rises as "
        "(1 + step) / (10 + step) up to this value. 0 turns it off.",
        within=FRACTION_BELOW_ONE,
    )
    swa_start: float | None = key(
        None,
        "SWA: share of training after which the weights at the end of each epoch are averaged; the average is "
        "evaluated and saved.",
        within=FRACTION_BELOW_ONE,
    )
    swa_learning_rate: float | None = key(
        None,
        "SWA: learning rate that is approached over ten epochs from its start and then held; the schedule goes on as "
        "it is if not given.",
        within=NON_NEGATIVE,
    )
    early_stopping_patience: int | None = key(
        None,
        "Stop after so many evaluations in which metric_for_best_model has not improved.",
        within=AT_LEAST_ONE,
        unit="evaluations",
    )
    early_stopping_threshold: float = key(
        0.0, "How much it must improve to count.", within=NON_NEGATIVE, unit="the metric's own"
    )

    resume_policy: Literal["latest_good", "strict"] = key(
        "latest_good",
        "--resume_from_checkpoint true takes the newest checkpoint that verifies and names those it passed over; with "
        "'strict' the newest must verify.",
    )

    allow_changed: list[str] | None = key(
        None,
        "Settings that may differ from those of the checkpoint that is gone on from, and are applied then; others are "
        "refused with both values.",
    )

    def __post_init__(self) -> None:
        Checked.__post_init__(self)
        own_config = self.accelerator_config is None
        meet_in_time(self)
        TrainingArguments.__post_init__(self)
        refuse_several_gpus(self)
        self.set_float32_precision()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # pinning is for copies to an accelerator; without one torch only warns
        elif self.device.type == "cuda" and self.dataloader_pin_memory and own_config:
            self.accelerator_config.non_blocking = True  # what a batch is copied with, or every step begins with a wait
        self._settle()

    def _derive(self) -> None:
        refuse_unhonoured(self)
        # ranks are given different seeds for drop path; the order of the data must not follow them
        if self.data_seed is None:
            self.data_seed = self.seed

    def check_with(self, others: Iterable[Any]) -> None:
        """Refuses what contradicts other arguments of the run; labels alone contradict none."""

    @functools.cached_property  # every step asks several times
    def device(self) -> torch.device:
        """Where the training runs; without the index that one of several CPU processes is given.

        torch before 2.14 cannot load a checkpoint onto ``cpu:0``.
        """
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    def set_float32_precision(self) -> None:
        """Sets torch's switches as `tf32` says.

        transformers sets the new ones, convolutions' with them; unless the old ones agree, reading those raises. And an
        `Accelerator` for float32 with `torch_compile` turns TF32 on again, whatever was said.
        """
        if is_torch_tf32_available():
            torch.backends.cuda.matmul.allow_tf32 = bool(self.tf32)
            torch.backends.cudnn.allow_tf32 = True


def _copies(*classes: type) -> list[tuple[str, Any, Any]]:
    """Fields of dataclasses, for `make_dataclass`."""
    return [
        (f.name, type_hints(cls)[f.name], field(default=f.default, metadata=f.metadata))
        if f.default_factory is MISSING
        else (f.name, type_hints(cls)[f.name], field(default_factory=f.default_factory, metadata=f.metadata))
        for cls in classes
        for f in fields(cls)
        if is_key(f)
    ]


MethodKeys = make_dataclass("MethodKeys", _copies(SharedKeys, *METHODS), namespace={"__module__": __name__})
MethodKeys.__doc__ = """The keys of every method of `METHODS`, and those that several share."""


@dataclass
class DistillationTrainingArguments(MethodKeys, TeachersArguments, SupervisedTrainingArguments):
    """Learning from a teacher, or several, by any set of methods.

    ``loss = task_loss_weight * ((1 - alpha) * CE + alpha * KD) + sum of weight * schedule * method``; of several
    teachers alpha is the sum of theirs, and each adds its own terms.
    """

    _argument_group_name = "training with a teacher"

    task_loss_weight: float = key(1.0, "Weight of the cross-entropy on the labels.", within=NON_NEGATIVE)
    task_heads: Literal["inference", "cls"] = key(
        "inference",
        "Heads that the labels teach where alpha is 0 (distilled_heads says it otherwise): those that inference uses, "
        "or the cls head alone.",
        published={"cls": "the distillation head stays random and is averaged in at inference"},
    )
    teacher_view: Literal["shared", "clean", "identical"] | None = key(
        None,
        "What the teacher sees where its features are learned from. 'shared' (if not given): the stored image, and its "
        "tokens follow the student's crop and flip; 'clean': they do not; 'identical': the student's augmented image.",
        published={"clean": "student and teacher tokens that are compared look at different places"},
    )
    teacher_logits_view: Literal["identical", "clean"] | None = key(
        None,
        "What the teacher sees where its class scores are learned from: the student's augmented image ('identical') or "
        "the stored one ('clean'). If not given, teacher_view with method 'logits', and 'identical' otherwise.",
    )
    teacher_cache: Literal["auto", "off", "logits", "tokens", "gram", "mean", "views"] = key(
        "auto",
        "Ask the teacher once for each training image, where it sees the stored one, and keep on disk its scores "
        "('logits'), its tokens ('tokens'), their inner products ('gram', enough for CKA and Gram losses over tokens "
        "and far smaller) or the mean of the final ones ('mean', enough for losses of pooled features with "
        "teacher_view 'clean', and kept beside 'gram' where they are on as well), each with the scores where they are "
        "learned from too; ask in every step ('off'); or the smallest that will do, where it saves teacher forwards "
        "('auto'). "
        "'views': keep its scores, its tokens' inner products and their mean, of augmented images by epoch and image, "
        "while this run asks, and read them in every run with the same augmentation and augmentation_seed, the rest as "
        "with 'auto'; 'auto' does so where augmentation_seed is given.",
    )
    teacher_cache_dir: str | None = key(
        None, "Folder of teacher caches, shared by runs; 'hf_ihb/teacher_cache' in HF_HOME if not given."
    )
    teacher_dtype: Literal["auto", "float32", "bfloat16"] = key(
        "auto", "Precision of the teacher's weights; 'auto': bfloat16 where training runs in it, float32 elsewhere."
    )

    def _derive(self) -> None:
        super()._derive()
        if self.alpha is None:
            self.alpha = 0.5 if self.method == "logits" else 0.0
        on = methods_of(self)  # each refuses what contradicts among its keys, those that are off as well
        self.check_teachers(on)
        if self.teacher_models is not None:
            return  # what is derived from methods is derived for each
        if not on:
            weights = ", ".join(f"'{f.name}'" for f in fields(MethodKeys) if f.name.endswith("_weight"))
            raise ValueError(f"keys 'alpha', {weights}: expected one of them to be > 0, found 0")
        self._choose_views(by_features=any(m.needs.layers or m.needs.final for m in on))
        self._check_cache(on)

    def _choose_views(self, *, by_features: bool) -> None:
        if self.teacher_logits_view is None:
            inherited = self.teacher_view if self.method == "logits" else None
            if inherited == "shared" and not by_features:
                raise ValueError(
                    "key 'teacher_view': expected 'identical' or 'clean' with method 'logits', found 'shared': class "
                    "scores have no places that could follow the student's"
                )
            self.teacher_logits_view = inherited if inherited in ("identical", "clean") else "identical"
            if not by_features:
                self.teacher_view = None
        self.teacher_view = self.teacher_view or "shared"

    def _check_cache(self, on: list[Method]) -> None:
        kind, features = self.teacher_cache, [m for m in on if m.needs.layers or m.needs.final]
        of_views = features and self.teacher_view == "identical"
        if kind == "views" and not (
            of_views or (any(m.needs.logits for m in on) and self.teacher_logits_view == "identical")
        ):
            raise ValueError(
                "key 'teacher_cache': expected 'auto' or 'off' where nothing is learned of augmented images "
                "(teacher_logits_view or teacher_view 'identical'), found 'views'"
            )
        if kind == "views" and of_views and (because := tokens_because(features, moved=False)) is not None:
            raise ValueError(
                f"keys 'teacher_cache' and '{because}' contradict: of augmented images inner products of tokens and "
                "their mean are kept, and they are not enough, expected teacher_cache 'off'"
            )
        if kind in ("auto", "off", "views"):
            return
        if (kind == "logits") == bool(features):
            learned = "features" if features else "class scores"
            allowed = "'tokens', 'gram', 'mean'" if features else "'logits'"
            raise ValueError(
                f"key 'teacher_cache': expected {allowed}, 'auto' or 'off' where {learned} are learned from, found "
                f"'{kind}'"
            )
        name, stored = ("teacher_view", "'shared' or 'clean'") if features else ("teacher_logits_view", "'clean'")
        other = "'off'" if features else "'views' or 'off'"
        if getattr(self, name) == "identical":
            raise ValueError(
                f"keys 'teacher_cache' and '{name}' contradict: the teacher sees a new image in every epoch, expected "
                f"{name} {stored}, or teacher_cache {other}"
            )
        if kind in ("gram", "mean"):
            self._check_rows(kind, features)

    def _check_rows(self, kind: Literal["gram", "mean"], features: list[Method]) -> None:
        """Refuses rows of stored images that methods cannot be served from."""
        moved = self.teacher_view == "shared"
        if (because := more_because(features, kind, moved=moved)) is None:
            return
        what = {"gram": "inner products of an image's tokens", "mean": "mean tokens"}[kind]
        enough = dict.fromkeys((smallest_row(features, moved=moved).kind, "tokens"))
        other = ", or teacher_view 'clean'" if more_because(features, kind, moved=False) is None else ""
        raise ValueError(
            f"keys 'teacher_cache' and '{because}' contradict: {what} are not enough, expected teacher_cache "
            f"{' or '.join(map(repr, enough))}{other}"
        )

    def _settle(self) -> None:
        super()._settle()
        self.check_shares()

    def check_with(self, others: Iterable[Any]) -> None:
        """Refuses what contradicts other arguments of the run.

        Raises:
            ValueError: If no teacher is named, or one twice; if a teacher would score a clean image where the student
                sees two mixed ones, or no image is left whose tokens have a counterpart at the teacher's.
        """
        for teacher in (o for o in others if isinstance(o, TeacherArguments)):
            teachers_of(teacher, self.teacher_models)
        mixing = next((o for o in others if isinstance(o, AugmentationArguments) and o.mixes), None)
        if mixing is None:
            return
        if self.teacher_models is None:
            return self._check_mixing(mixing)
        for number, own in enumerate(self.of_each_teacher()):
            with naming(number):
                own._check_mixing(mixing)

    def _check_mixing(self, mixing: AugmentationArguments) -> None:
        on = methods_of(self)
        if any(method.needs.logits for method in on) and self.teacher_logits_view == "clean":
            raise ValueError(
                "keys 'teacher_logits_view' and 'mixup_alpha' or 'cutmix_alpha' contradict: a clean view is not mixed"
            )
        compared = [method.label for method in on if method.needs.layers or method.needs.final]
        if compared and self.teacher_view != "identical" and mixing.mix_probability == 1:
            raise ValueError(
                f"keys 'mix_probability' and 'teacher_view' contradict: every image is mixed, which leaves none to the "
                f"{', '.join(compared)} loss; expected mix_probability < 1 or teacher_view 'identical', found 1 and "
                f"'{self.teacher_view}'"
            )


def keys_today(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a run folder as they are called today: a run of the version before had one view for all methods."""
    keys = dict(keys)
    if keys.get("method") == "logits" and "teacher_logits_view" not in keys:
        keys["teacher_logits_view"], keys["teacher_view"] = keys.get("teacher_view", "identical"), "shared"
    if keys.get("alpha") is None:
        keys["alpha"] = 0.5 if keys.get("method") == "logits" else 0.0
    return keys


@dataclass
class LogitDistillationTrainingArguments(DistillationTrainingArguments):
    """`DistillationTrainingArguments` with the defaults of learning from class scores: alpha is 0.5."""

    method: Literal["logits", "structural"] | None = key("logits", "Selects defaults alone: alpha is 0.5.")


@dataclass
class StructuralDistillationTrainingArguments(DistillationTrainingArguments):
    """`DistillationTrainingArguments` with the defaults of learning from features: alpha is 0."""

    method: Literal["logits", "structural"] | None = key("structural", "Selects defaults alone: alpha is 0.")
