"""Models as they were saved: every weight, their pixels, their classes, and the same architecture without training."""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING, MODEL_MAPPING

import hf_ihb.models.timm_cifar  # noqa: F401  registers resnet18_cifar
from hf_ihb.access import fetch_file, resolve_commit
from hf_ihb.config.data import DataArguments
from hf_ihb.errors import DataError, ModelLoadError, TeacherMismatchError
from hf_ihb.models.classes import class_names
from hf_ihb.models.files import UNREADABLE, model_files
from hf_ihb.models.images import take_images
from hf_ihb.models.processing import PixelFormat, pixel_format
from hf_ihb.models.student import absent_weights, init_tokens
from hf_ihb.runs.files import read_json
from hf_ihb.runs.folder import RECIPE_FILE

# Parts of a backbone that blocks do not use: a checkpoint of another head may lack them.
_UNUSED_BY_BLOCKS = ("pooler", "mask_token")


class Pretrained(NamedTuple):
    """A model in eval mode and what is known of where it comes from.

    Attributes:
        model: In float32.
        pixels: How it wants its images.
        name: Hub id or folder, as it was asked for.
        revision: Commit on the Hub that all of it was read from; None for a folder.
    """

    model: PreTrainedModel
    pixels: PixelFormat
    name: str
    revision: str | None

    def to(self, device: torch.device) -> "Pretrained":
        """Moves the model; returns itself."""
        self.model.to(device)
        return self

    def summary(self) -> dict[str, Any]:
        """Name, revision, class, number of parameters, and the SHA-256 of the weights."""
        return {
            "name": self.name,
            "revision": self.revision,
            "class": type(self.model).__name__,
            "num_parameters": sum(p.numel() for p in self.model.parameters()),
            "weights_sha256": weights_digest(self.model),
        }


def load_pretrained(
    name: str,
    revision: str | None = None,
    *,
    needs_logits: bool | None = True,
    role: str = "model",
    untrained_seed: int | None = None,
) -> Pretrained:
    """Loads a model of transformers or timm from the Hub or a folder.

    Everything is read from the commit that the name stands for at the beginning; only safetensors and JSON are read,
    and no code of the repo is run.

    Args:
        name: Hub id or folder.
        revision: Branch, tag or commit on the Hub; the main branch if None.
        needs_logits: Whether its classifier is wanted; None takes one where it was saved with one.
        role: What errors call it.
        untrained_seed: Draw the weights anew from this seed instead; the generator's state is left as it was.

    Raises:
        ModelLoadError: If it cannot be found, reached or read, or a weight is missing.
    """
    files = model_files(name, revision, role=role, weights=untrained_seed is None)
    try:
        config = AutoConfig.from_pretrained(files.folder, trust_remote_code=False)
        auto = _auto_class(config, needs_logits, f"{role} '{name}'")
        if untrained_seed is not None:
            model = from_config(auto, config, untrained_seed)
        else:
            model = _trained(auto, config, files.folder, f"{role} '{name}'")
        # of two towers, the one that sees
        model = take_images(model if auto is AutoModelForImageClassification else getattr(model, "vision_model", model))
        processor = AutoImageProcessor.from_pretrained(files.folder, trust_remote_code=False)
    except UNREADABLE as error:
        raise ModelLoadError(f"{role} '{name}' could not be loaded: {' '.join(str(error).split())[:300]}") from error
    try:
        pixels = pixel_format(processor)
    except ModelLoadError as error:
        raise ModelLoadError(f"{role} '{name}': {error}") from error
    model.name_or_path = model.config.name_or_path = name  # not the folder of the cache
    return Pretrained(model.eval(), pixels, name, files.revision)


def _auto_class(config: Any, needs_logits: bool | None, who: str) -> Any:
    saved = getattr(config, "architectures", None) or []
    is_classifier = any("ForImageClassification" in name for name in saved) or config.model_type == "timm_wrapper"
    has_two_towers = hasattr(config, "vision_config") and hasattr(config, "text_config")
    if needs_logits and has_two_towers and not is_classifier:
        raise ModelLoadError(f"{who}: expected a classifier, found {' '.join(saved)}, which has none for images")
    if is_classifier if needs_logits is None or has_two_towers else needs_logits:
        return AutoModelForImageClassification
    is_backbone = any(name.endswith("Backbone") for name in saved)
    known = type(config) in MODEL_FOR_BACKBONE_MAPPING
    return MODEL_FOR_BACKBONE_MAPPING[type(config)] if known and is_backbone else _headless(config)


def _headless(config: Any) -> Any:
    return AutoModel if type(config) in MODEL_MAPPING else AutoBackbone


def _trained(auto: Any, config: Any, folder: str, who: str) -> PreTrainedModel:
    """The model with its weights, every one of them; those that blocks do not use may be drawn, always the same.

    A cache of what a teacher says is named after all its weights, and serves runs of any seed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # that of the CPU alone, which is put back
        model, info = auto.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            dtype=torch.float32,
            trust_remote_code=False,
        )
    absent = absent_weights(info)
    if auto is not AutoModelForImageClassification:
        absent = [k for k in absent if not any(part in _UNUSED_BY_BLOCKS for part in k.split("."))]
    if absent:
        raise ModelLoadError(
            f"{who}: expected weights for all of {type(model).__name__}, found none for {absent[0]} "
            f"({len(absent)} in all)"
        )
    return model


def from_config(auto: Any, config: Any, seed: int) -> PreTrainedModel:
    """An untrained model as its library initialises it; torch's generator is left as it was.

    Args:
        auto: One of transformers' auto classes, or a model class.
        config: Its config.
        seed: Of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        make = getattr(auto, "from_config", None) or auto._from_config
        model = make(config, dtype=torch.float32)
        if (network := getattr(model, "timm_model", None)) is not None:
            # transformers' wrapper draws a network's weights anew, every convolution from N(0, 0.02)
            fresh = timm.create_model(config.architecture, num_classes=network.num_classes, **(config.model_args or {}))
            network.load_state_dict(fresh.state_dict())
    return model


def untrained_twin(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The architecture of a model with random weights, in eval mode: what a measurement gives before any training.

    Tokens and positions that transformers leaves at zero are drawn as a student's are before training.
    """
    twin = from_config(type(model), copy.deepcopy(model.config), seed)
    if all(not p.any() for name, p in twin.named_parameters() if name.endswith("position_embeddings")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            init_tokens(twin)
    return twin.to(model.device).eval()


def weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 over names, types, shapes and bytes of a model's state, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def data_defaults(name: str, revision: str | None = None) -> dict[str, Any]:
    """What a model was trained and evaluated on, by the recipe saved beside it; empty where there is none.

    Returns:
        Keys of `DataArguments`; for a model of the Hub also `model_revision`, the commit that was asked.

    Raises:
        ModelLoadError: If the repo cannot be reached or its recipe cannot be read.
    """
    commit = resolve_commit(name, revision, what="model")
    if commit is None:
        pinned, path = {}, Path(name).expanduser() / RECIPE_FILE
    else:
        pinned, path = {"model_revision": commit}, fetch_file(name, RECIPE_FILE, commit, what="model")
    if path is None or not path.is_file():
        return pinned
    try:
        saved = read_json(path).get("keys")
        if not isinstance(saved, dict):
            raise DataError(f"{path}: key 'keys': expected an object, found {type(saved).__name__}")
    except DataError as error:
        raise ModelLoadError(f"model '{name}': its {RECIPE_FILE} could not be read: {error}") from error
    return {f.name: saved[f.name] for f in fields(DataArguments) if f.name in saved} | pinned


def label_permutation(config: Any, names: Sequence[str], who: str, assume_same_order: bool = False) -> Tensor | None:
    """Positions of a data set's classes among a model's, by name.

    Args:
        config: The model's, with ``id2label``.
        names: The data set's classes in label order.
        who: What errors call the model.
        assume_same_order: Trust the model's order where its names cannot tell.

    Returns:
        ``(K,)`` indices into the model's logits; None if they are in order already.

    Raises:
        TeacherMismatchError: If number or names of the classes do not match.
    """
    names = list(names)
    try:
        theirs = class_names(config)
    except ValueError as error:
        raise TeacherMismatchError(f"{who}: {error}") from error
    if len(theirs) != len(names):
        raise TeacherMismatchError(
            f"{who}: expected {len(names)} classes ({_listed(names)}), found {len(theirs)} ({_listed(theirs)})"
        )
    if theirs == names or assume_same_order:
        return None
    positions = {_plain(name): i for i, name in enumerate(theirs)}
    if len(positions) != len(names) or any(_plain(name) not in positions for name in names):
        raise TeacherMismatchError(
            f"{who}: expected the classes {_listed(names)}, found {_listed(theirs)}; give it the data set's names"
            + ", or vouch for the order with 'teacher_assume_same_label_order'" * who.startswith("teacher")
        )
    return torch.tensor([positions[_plain(name)] for name in names])


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", " ")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
