"""Keys of training: `TrainingArguments` with ours."""

import functools
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils import is_torch_tf32_available

from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.fields import AT_LEAST_ONE, FRACTION, FRACTION_BELOW_ONE, NON_NEGATIVE, POSITIVE, Checked, Range, key


@dataclass
class SupervisedTrainingArguments(Checked, TrainingArguments):
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

    def __post_init__(self) -> None:
        Checked.__post_init__(self)
        own_config = self.accelerator_config is None
        TrainingArguments.__post_init__(self)
        if self.ema_decay > 0 and self.swa_start is not None:
            raise ValueError("keys 'ema_decay' and 'swa_start' contradict: one average is evaluated and saved")
        if self.swa_learning_rate is not None and self.swa_start is None:
            raise ValueError("key 'swa_learning_rate': expected 'swa_start' with it, found none")
        if self.early_stopping_patience is not None and (
            self.eval_strategy == "no" or self.metric_for_best_model is None
        ):
            raise ValueError(
                "key 'early_stopping_patience': expected 'eval_strategy' and 'metric_for_best_model' with it, found "
                f"{self.eval_strategy} and {self.metric_for_best_model}"
            )
        if self.push_to_hub and self.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                "key 'hub_strategy': expected 'end' or 'every_save', found "
                f"'{HubStrategy(self.hub_strategy).value}': the optimizer's state in a checkpoint is never pushed"
            )
        # ranks are given different seeds for drop path; the order of the data must not follow them
        if self.data_seed is None:
            self.data_seed = self.seed
        if self.n_gpu > 1:
            raise ValueError(
                f"expected one process for each GPU, found one that sees {self.n_gpu}; start it as `accelerate launch "
                f"--multi_gpu --num_processes {self.n_gpu} {sys.argv[0] or 'SCRIPT'} ...`, or on one GPU "
                "with CUDA_VISIBLE_DEVICES=0"
            )
        self.set_float32_precision()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # pinning is for copies to an accelerator; without one torch only warns
        elif self.device.type == "cuda" and self.dataloader_pin_memory and own_config:
            self.accelerator_config.non_blocking = True  # what a batch is copied with, or every step begins with a wait

    @functools.cached_property  # every step asks several times
    def device(self) -> torch.device:
        """As `TrainingArguments.device`; without the index that one of several CPU processes is given.

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


@dataclass
class DistillationTrainingArguments(SupervisedTrainingArguments):
    """What every distillation shares."""

    distillation_warmup_type: Literal["linear", "step"] = key(
        "linear", "How distillation losses reach their weight over their warm-up epochs."
    )
    teacher_cache_dir: str | None = key(
        None, "Folder of teacher caches, shared by runs; 'hf_ihb/teacher_cache' in HF_HOME if not given."
    )
    teacher_dtype: Literal["auto", "float32", "bfloat16"] = key(
        "auto", "Precision of the teacher's weights; 'auto': bfloat16 where training runs in it, float32 elsewhere."
    )


@dataclass
class LogitDistillationTrainingArguments(DistillationTrainingArguments):
    """Cross-entropy on the cls head, distillation on the distillation head (on the same head where there is one)."""

    _argument_group_name = "training (method: logits)"

    method: Literal["logits"] = key("logits", "Learn from the teacher's class scores.")
    alpha: float = key(
        0.5,
        "Weight of the distillation loss (with a schedule: at the end); the task loss gets 1 - alpha.",
        within=FRACTION,
    )
    alpha_schedule: Literal["constant", "linear", "cosine"] = key(
        "constant", "How alpha goes from alpha_start to alpha between the warm-up and the end of training."
    )
    alpha_start: float = key(0.0, "Where a linear or cosine alpha_schedule begins.", within=FRACTION)
    distilled_heads: Literal["distillation", "both"] = key(
        "distillation",
        "'distillation': labels teach the cls head and the teacher the distillation head; 'both': both teach both.",
    )
    temperature: float = key(1.0, "Softmax temperature of student and teacher.", within=POSITIVE, unit="dimensionless")
    distillation_type: Literal["soft", "hard"] = key(
        "soft", "'soft': temperature^2 x KL divergence; 'hard': cross-entropy to the teacher's decision."
    )
    distillation_warmup_epochs: float = key(
        0.0, "Epochs over which alpha rises from 0 (see distillation_warmup_type).", within=NON_NEGATIVE, unit="epochs"
    )
    teacher_view: Literal["identical", "clean"] = key(
        "identical", "The teacher sees the student's augmented image ('identical') or the stored one ('clean')."
    )
    teacher_cache: Literal["auto", "off", "logits"] = key(
        "auto",
        "Ask the teacher once for each training image and keep its scores on disk ('logits', if teacher_view is "
        "'clean'), in every step ('off'), or whichever needs fewer teacher forwards ('auto').",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_cache == "logits" and self.teacher_view == "identical":
            raise ValueError(
                "keys 'teacher_cache' and 'teacher_view' contradict: the teacher sees a new image in every epoch, "
                "expected teacher_view 'clean' or teacher_cache 'off'"
            )

    def check_with(self, others: Iterable[Any]) -> None:
        """Refuses what contradicts other arguments of the run.

        Raises:
            ValueError: If the teacher would see a clean image where the student sees two mixed ones.
        """
        if self.teacher_view == "clean" and any(isinstance(o, AugmentationArguments) and o.mixes for o in others):
            raise ValueError(
                "keys 'teacher_view' and 'mixup_alpha' or 'cutmix_alpha' contradict: a clean view is not mixed"
            )


@dataclass
class StructuralDistillationTrainingArguments(DistillationTrainingArguments):
    """Task loss plus CKA, Gram and token losses between blocks of student and teacher."""

    _argument_group_name = "training (method: structural)"

    method: Literal["structural"] = key("structural", "Learn from the structure of the teacher's features.")
    task_loss_weight: float = key(1.0, "Weight of the cross-entropy on the labels.", within=NON_NEGATIVE)
    cka_weight: float = key(0.0, "Weight of 1 - CKA.", within=NON_NEGATIVE)
    gram_weight: float = key(0.0, "Weight of the distance of token similarity matrices.", within=NON_NEGATIVE)
    token_weight: float = key(
        0.0,
        "Weight of 1 - cosine of linearly mapped student tokens and standardised teacher tokens.",
        within=NON_NEGATIVE,
    )
    relation_weight: float = key(
        0.0,
        "Weight of the divergence between the similarities of each image to the others of the batch (mean tokens of "
        "the student's last block and of the deepest of teacher_layers, each after its model's final norm).",
        within=NON_NEGATIVE,
    )
    cka_warmup_epochs: float = key(0.0, "Warm-up of cka_weight.", within=NON_NEGATIVE, unit="epochs")
    gram_warmup_epochs: float = key(0.0, "Warm-up of gram_weight.", within=NON_NEGATIVE, unit="epochs")
    token_warmup_epochs: float = key(0.0, "Warm-up of token_weight.", within=NON_NEGATIVE, unit="epochs")
    relation_warmup_epochs: float = key(0.0, "Warm-up of relation_weight.", within=NON_NEGATIVE, unit="epochs")
    student_layers: list[int] = key(
        [5, 8, 11], "Student blocks whose outputs are compared.", within=NON_NEGATIVE, unit="0-based block index"
    )
    teacher_layers: list[int] | None = key(
        None,
        "Teacher blocks (CNN: stages), one for each student block; student_layers if not given.",
        within=NON_NEGATIVE,
        unit="0-based block index",
    )
    cka_scope: Literal["tokens", "pooled", "images"] = key(
        "tokens",
        "CKA over the tokens of each image; over all tokens of the batch, pooled; or over its images (mean tokens). "
        "The batch is that of all processes; gradient accumulation does not widen it.",
    )
    cka_estimator: Literal["biased", "debiased", "published"] = key(
        "debiased",
        "Estimator of CKA; 'published' is the biased one of L2-normalised tokens with an absolute epsilon.",
        published={"published": "the epsilon drowns the value where the tokens of an image are alike"},
    )
    cka_kernel: Literal["linear", "rbf"] = key("linear", "Kernel of CKA; 'rbf' not with cka_scope 'pooled'.")
    rbf_bandwidth: float = key(
        1.0, "Width of the RBF kernel as a multiple of the median distance.", within=POSITIVE, unit="median distances"
    )
    gram_normalization: Literal["mean_square", "published"] = key(
        "mean_square",
        "Gram loss: squared differences over N^2 entries, or the published Frobenius norm over N^2.",
        published={"published": "the loss is about 0.001 and has no gradient to speak of"},
    )
    relation_temperature: float = key(
        0.1, "Softmax temperature of the relation loss.", within=POSITIVE, unit="dimensionless"
    )
    relation_include_self: bool = key(
        False,
        "Relation loss: keep each image's similarity to itself, which is always 1.",
        published={True: "the softmax is nearly one-hot at the image itself"},
    )
    center_positions: bool = key(
        True,
        "Remove position codes before CKA and Gram: the mean over the training images from the teacher's tokens, the "
        "mean over the batch of all processes from the student's.",
    )
    teacher_projector: Literal["none", "trainable"] = key(
        "none",
        "'trainable': MLP heads on both sides, a pair for each layer of each of the token, CKA and Gram losses.",
        published={"trainable": "the teacher's heads are trained too, so the loss can be met without any content"},
    )
    task_heads: Literal["inference", "cls"] = key(
        "inference",
        "Heads that the labels teach: those that inference uses, or the cls head alone.",
        published={"cls": "the distillation head stays random and is averaged in at inference"},
    )
    teacher_norm: bool = key(False, "Apply the teacher's final norm to the output of every block, as DINOv2 does.")
    teacher_view: Literal["shared", "clean", "identical"] = key(
        "shared",
        "'shared': the teacher sees the stored image and its tokens follow the student's crop and flip; 'clean': they "
        "do not; 'identical': it sees the student's augmented image.",
        published={"clean": "student and teacher tokens that are compared look at different places"},
    )
    teacher_statistics_samples: int = key(
        1024, "Training images from which the teacher's feature statistics are taken.", within=Range(2), unit="images"
    )
    teacher_cache: Literal["auto", "off", "tokens", "gram"] = key(
        "auto",
        "Ask the teacher once for each training image and keep on disk its tokens ('tokens') or their inner products "
        "('gram', enough for CKA and Gram losses over tokens and far smaller); ask in every step ('off'); or the "
        "smallest that will do, where it saves teacher forwards ('auto').",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_layers is not None and len(self.teacher_layers) != len(self.student_layers):
            raise ValueError(
                f"keys 'student_layers' and 'teacher_layers' contradict: expected as many blocks of each, found "
                f"{self.student_layers} and {self.teacher_layers}"
            )
        if not self.student_layers:
            raise ValueError("key 'student_layers': expected at least one block, found []")
        if self.teacher_cache in ("tokens", "gram") and self.teacher_view == "identical":
            raise ValueError(
                "keys 'teacher_cache' and 'teacher_view' contradict: the teacher sees a new image in every epoch, "
                "expected teacher_view 'shared' or 'clean', or teacher_cache 'off'"
            )
        if self.teacher_cache == "gram" and (need := self.needs_teacher_tokens()) is not None:
            raise ValueError(
                f"keys 'teacher_cache' and '{need}' contradict: inner products of an image's tokens are not enough, "
                "expected teacher_cache 'tokens'"
            )
        if self.cka_weight == self.gram_weight == self.token_weight == self.relation_weight == 0:
            raise ValueError(
                "keys 'cka_weight', 'gram_weight', 'token_weight' and 'relation_weight': expected one of them to be "
                "> 0, found 0"
            )
        if self.cka_kernel == "rbf" and self.cka_scope == "pooled":
            raise ValueError("keys 'cka_kernel' and 'cka_scope' contradict: an RBF kernel of all tokens has no room")
        if self.cka_estimator == "published" and (self.cka_scope == "pooled" or self.cka_kernel == "rbf"):
            raise ValueError(
                "keys 'cka_estimator' and 'cka_scope' contradict: 'published' compares tokens or images, linearly"
            )

    def needs_teacher_tokens(self) -> str | None:
        """The key because of which inner products within an image are not all that the losses need of the teacher."""
        if self.teacher_projector == "trainable":
            return "teacher_projector"
        if self.cka_weight > 0 and self.cka_scope != "tokens":
            return "cka_scope"
        return next((f"{name}_weight" for name in ("token", "relation") if getattr(self, f"{name}_weight") > 0), None)
