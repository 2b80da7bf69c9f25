"""Keys of student and teacher."""

from dataclasses import dataclass
from typing import Literal

from hf_ihb.config.fields import AT_LEAST_ONE, FRACTION_BELOW_ONE, POSITIVE, Checked, key


@dataclass
class ModelArguments(Checked):
    """The model that is trained."""

    _argument_group_name = "model"

    architecture: str | None = key(
        None,
        "From scratch: 'deit' (if not given: cls and distillation tokens and heads), 'deit_cls' (one head, at the cls "
        "token), 'vit' (no distillation token), 'adaptive_cnn', 'convnextv2' (patch 2, for small images), or the name "
        "of a timm model such as 'resnet18_cifar'.",
    )
    model_name_or_path: str | None = key(
        None,
        "Start from these weights (Hub id or folder) instead of from scratch; only the head is new (with architecture "
        "'convnextv2' the stem too, where its patch differs).",
    )
    model_revision: str | None = key(None, "Branch, tag or commit of those weights on the Hub.")
    hidden_size: int | None = key(None, "Width of a ViT from scratch; 192 if not given.", within=AT_LEAST_ONE)
    num_hidden_layers: int | None = key(None, "Blocks of a ViT from scratch; 12 if not given.", within=AT_LEAST_ONE)
    num_attention_heads: int | None = key(None, "Heads of a ViT from scratch; 3 if not given.", within=AT_LEAST_ONE)
    intermediate_size: int | None = key(
        None, "MLP width of a ViT from scratch; mlp_ratio x hidden_size if not given.", within=AT_LEAST_ONE
    )
    mlp_ratio: float | None = key(
        None, "MLP width of a ViT from scratch as a multiple of hidden_size; 4 if not given.", within=POSITIVE
    )
    patch_size: int | None = key(
        None,
        "Side of a patch from scratch; 4 for a ViT and 2 for 'convnextv2' if not given.",
        within=AT_LEAST_ONE,
        unit="px",
    )
    hidden_sizes: list[int] | None = key(
        None, "Width of each stage of 'adaptive_cnn' or 'convnextv2'; the study's if not given.", within=AT_LEAST_ONE
    )
    depths: list[int] | None = key(
        None, "Blocks of each stage of 'adaptive_cnn' or 'convnextv2'; the study's if not given.", within=AT_LEAST_ONE
    )
    conv_stem: bool = key(
        False, "DeiT: two 3 x 3 convolutions at full resolution before the patches; a registered model of ours."
    )
    layer_scale_init: float | None = key(
        None,
        "DeiT: LayerScale on both residual branches, from this value; a registered model of ours.",
        within=POSITIVE,
    )
    cls_token_dropout: float = key(
        0.0,
        "DeiT: probability that the final cls token of a training image is replaced by the mean of its patch tokens.",
        within=FRACTION_BELOW_ONE,
    )
    inference_head: Literal["average", "cls", "distillation"] = key(
        "average",
        "DeiT: what the saved model answers with. 'cls' is saved as a DeiT with one head, 'distillation' as a "
        "registered model of ours.",
    )
    drop_path_rate: float = key(
        0.0, "Stochastic depth: drop rate of the last block, rising linearly from 0.", within=FRACTION_BELOW_ONE
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_name_or_path is not None:
            shape = (
                "architecture",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
                "mlp_ratio",
                "patch_size",
                "hidden_sizes",
                "depths",
                "layer_scale_init",
            )
            if self.architecture == "convnextv2":  # the weights' stages behind a stem for small images
                shape = tuple(name for name in shape if name not in ("architecture", "patch_size"))
            if given := [name for name in shape if getattr(self, name) is not None]:
                raise ValueError(f"keys 'model_name_or_path' and '{given[0]}' contradict: the weights fix the shape")
        elif self.hidden_size is not None or self.num_attention_heads is not None:
            width, heads = self.hidden_size or 192, self.num_attention_heads or 3
            if width % heads:
                raise ValueError(
                    f"key 'hidden_size': expected a multiple of num_attention_heads={heads}, found {width}"
                )
        if self.mlp_ratio is not None and self.intermediate_size is not None:
            raise ValueError("keys 'mlp_ratio' and 'intermediate_size' contradict: both fix the MLP's width")


@dataclass
class TeacherArguments(Checked):
    """The frozen model that is learned from."""

    _argument_group_name = "teacher"

    teacher_model: str | None = key(None, "Hub id or folder of the teacher (transformers or timm, safetensors).")
    teacher_revision: str | None = key(None, "Branch, tag or commit of the teacher on the Hub.")
    teacher_image_size: int | None = key(
        None,
        "Side to which whole images are brought for the teacher. If not given, its image processor's size: by all of "
        "its steps where class scores alone are learned from, of whole images without its crop where features are, as "
        "these are compared place by place.",
        within=AT_LEAST_ONE,
        unit="px",
    )
    teacher_normalization: Literal["own", "dataset"] = key(
        "own",
        "Mean and standard deviation of the teacher's pixels: its own image processor's, or those of the data set.",
        published={"dataset": "the teacher sees colours shifted from those it was trained on"},
    )
    teacher_control: Literal["none", "untrained", "shuffled"] = key(
        "none",
        "Controls: 'untrained' draws the teacher's weights anew from `seed`; 'shuffled' shows it the next image of the "
        "per-device batch instead of the student's.",
    )
    teacher_assume_same_label_order: bool = key(
        False, "Trust that the teacher's classes are in the data set's order where its names cannot tell."
    )

    def check_named(self) -> None:
        """Sees that there is a teacher; a run may name several elsewhere.

        Raises:
            ValueError: If there is none.
        """
        if self.teacher_model is None:
            raise ValueError("key 'teacher_model': expected a Hub id or a folder, found nothing")
