"""What is promised of a teacher, one check each: `benchmarks.matrix` makes a table of them, a test runs them too."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessor

from benchmarks.families import FAMILIES, MEAN, STD, Family
from benchmarks.matrix_training import images
from hf_ihb.analysis.attention import AttentionAnalysis
from hf_ihb.analysis.base import SharedArguments
from hf_ihb.analysis.cka import CKAAnalysis
from hf_ihb.config.model import TeacherArguments
from hf_ihb.models.attention import capture_attention, has_attention
from hf_ihb.models.features import final_norm, layout_of, size_arguments
from hf_ihb.models.images import take_images
from hf_ihb.models.pretrained import Pretrained
from hf_ihb.models.probe import ModelLayout
from hf_ihb.models.processing import PixelFormat
from hf_ihb.models.teacher import Teacher, load_teacher


class Case:
    """A family in a folder, as it would come from the Hub, and as a teacher.

    Args:
        family: Which.
        folder: Where to put it.
    """

    def __init__(self, family: Family, folder: Path) -> None:
        self.family, self.folder = family, folder
        model = family.build()
        # CoaT holds modules at two places
        model.save_pretrained(folder, state_dict={name: tensor.clone() for name, tensor in model.state_dict().items()})
        self.labels = [model.config.id2label[i] for i in range(5)] if family.is_classifier else ["a", "b"]
        if family.library == "transformers":
            side = {"height": family.size, "width": family.size}
            ViTImageProcessor(size=side, resample=3, image_mean=MEAN, image_std=STD).save_pretrained(folder)
        self.teacher: Teacher = load_teacher(
            TeacherArguments(teacher_model=str(folder)), self.labels, needs_logits=family.is_classifier
        )
        generator = torch.Generator().manual_seed(1)
        self.pixels = torch.randn(2, 3, family.size, family.size, generator=generator)

    @property
    def layout(self) -> ModelLayout:
        """What was measured of it."""
        return layout_of(self.model)

    @property
    def model(self) -> nn.Module:
        """The teacher's."""
        return self.teacher.model


def _first_tensor(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def _as_tokens(output: Tensor, found: Tensor, prefix: int) -> list[Tensor]:
    """The readings of a block's output that have the shape of what was found."""
    readings = [output.flatten(2).mT, output.flatten(1, -2)] if output.ndim == 4 else [output]
    return [r[:, -found.shape[1] + prefix :] if r.shape[1] != found.shape[1] else r for r in readings]


def features(case: Case) -> None:
    """Each layer is the output of the block that its author would call so, seen by a hook."""
    family, seen = case.family, {}
    handles = [
        case.model.get_submodule(path).register_forward_hook(lambda m, a, o, path=path: seen.update({path: o}))
        for path in family.paths
    ]
    maps = case.teacher.features(case.pixels, range(len(family.sides)))
    for handle in handles:
        handle.remove()
    depth = case.layout.depth
    assert depth == len(family.sides), f"{depth} blocks, not {len(family.sides)}"
    for path, found in zip(family.paths, maps, strict=bool(family.paths)):
        output = _first_tensor(seen[path])
        candidates = [r for r in _as_tokens(output, found.tokens, 0) if r.shape == found.tokens.shape]
        if family.unordered:
            assert any(torch.allclose(r.sort(1)[0], found.tokens.sort(1)[0]) for r in candidates), path
        else:
            assert any(torch.allclose(r, found.tokens, atol=1e-5) for r in candidates), path


def grid(case: Case) -> None:
    """Rows, columns and the tokens before the patches."""
    maps = case.teacher.features(case.pixels, range(len(case.family.sides)))
    for layer, (found, side) in enumerate(zip(maps, case.family.sides, strict=True)):
        assert found.grid == (side, side), f"block {layer}: {found.grid}, not {side} x {side}"
        assert found.patch_tokens.shape[1] == side * side
    prefixes = {found.num_prefix_tokens for found in maps}
    assert case.family.prefix in prefixes, f"prefix {prefixes}, not {case.family.prefix}"
    assert len(prefixes) == 1 or len(set(case.family.sides)) > 1, f"prefixes {prefixes}"


def norm(case: Case) -> None:
    """The final norm is that of the author, and fits the tokens of the last block."""
    found, path = final_norm(case.model), case.family.norm
    assert found is (None if path is None else case.model.get_submodule(path)), f"{type(found).__name__}"
    if path is not None:
        (normed,) = case.teacher.features(case.pixels, [-1], apply_norm=True)
        assert torch.isfinite(normed.tokens).all()


def logits(case: Case) -> str | None:
    """Class scores are those of the plain model, read by its library alone; `-` where it has none."""
    if not case.family.is_classifier:
        return "-"
    model = AutoModelForImageClassification.from_pretrained(case.folder).eval()
    expected = _plain_logits(model, case.pixels)
    torch.testing.assert_close(case.teacher.logits(case.pixels), expected)
    together, _ = case.teacher.logits_and_features(case.pixels, [0])
    torch.testing.assert_close(together, expected)
    return None


@torch.no_grad()
def _plain_logits(model: nn.Module, pixels: Tensor) -> Tensor:
    if "Siglip2" not in type(model).__name__:
        return model(pixel_values=pixels, **size_arguments(model, pixels)).logits
    side = model.config.vision_config.patch_size
    count = pixels.shape[-1] // side
    unfolded = nn.functional.unfold(pixels, side, stride=side).mT  # (B, N, C * side * side)
    patches = unfolded.unflatten(-1, (3, side * side)).mT.flatten(2)
    mask = torch.ones(patches.shape[:2], dtype=torch.int32)
    shapes = torch.tensor([[count, count]] * len(pixels))
    return model(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes).logits


def pixels(case: Case) -> None:
    """The teacher sees what its image processor makes of an image, of its own size and of another."""
    processor = AutoImageProcessor.from_pretrained(case.folder)
    generator = np.random.default_rng(0)
    for side in (case.family.size, case.family.size // 2 + 8):
        coarse = Image.fromarray(generator.integers(64, 192, (4, 4, 3)).astype(np.uint8))
        image = coarse.resize((side, side), Image.Resampling.BILINEAR)
        expected = _first_tensor(list(processor([image], return_tensors="pt").values()))
        stored = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        found = case.teacher.prepare(stored)
        assert found.shape == expected.shape, f"{tuple(found.shape)}, not {tuple(expected.shape)}"
        steps = 1e-3 if side == case.family.size else 2.1  # levels: a processor may round after it resized
        torch.testing.assert_close(found, expected, rtol=0, atol=steps / 255 / min(STD))


def attention(case: Case) -> str | None:
    """Maps, and the distances that the analysis makes of them, are those of eager attention; `-` without such maps."""
    found: list[Tensor] = []
    assert has_attention(case.model, case.pixels[:1]) == bool(case.family.heads)
    if not case.family.heads:
        return "-"
    arguments = size_arguments(case.model, case.pixels)
    capture_attention(case.model, case.pixels, lambda _, maps: found.append(maps.clone()), **arguments)
    expected = _eager_maps(case, case.pixels)
    assert len(expected) == case.layout.depth
    assert expected[0].shape[1] == case.family.heads
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    split = images(case.family.size, 6)
    subject = Pretrained(case.model, case.teacher.pixels, "subject", None)
    analysis = AttentionAnalysis(untrained_reference=False, num_maps=0)
    told = analysis.compute(subject, split, torch.arange(6), SharedArguments(batch_size=4))
    distances = [
        _distance(maps, case.family.sides[0]) for maps in _eager_maps(case, subject.pixels.apply(split.images))
    ]
    measured = torch.tensor([layer["distance_per_head"] for layer in told["layers"]])
    torch.testing.assert_close(measured, torch.stack(distances).float(), rtol=0, atol=1e-5)
    return None


@torch.no_grad()
def _eager_maps(case: Case, shown: Tensor) -> list[Tensor]:
    """Softmax of each block as the library's own code without fused attention has it."""
    model = copy.deepcopy(case.model)
    if case.family.library == "transformers":
        model = type(case.model)._from_config(model.config, attn_implementation="eager").eval()
        model.load_state_dict(case.model.state_dict())
        arguments = size_arguments(case.model, shown)
        return list(take_images(model)(pixel_values=shown, output_attentions=True, **arguments).attentions)
    maps: list[Tensor] = []
    for module in model.modules():
        if hasattr(module, "fused_attn") and hasattr(module, "attn_drop"):  # what pools has no dropout of maps
            module.fused_attn = False
            module.attn_drop.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
    model(pixel_values=shown)
    return maps


def _distance(maps: Tensor, side: int) -> Tensor:
    """Mean attention distance of each head over images, by its definition, in float64."""
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double()
    patches = maps.double()[..., -(side**2) :, -(side**2) :]
    weights = patches / patches.sum(-1, keepdim=True)
    return (weights * torch.cdist(places, places)).sum(-1).mean((0, 2))


def cka(case: Case) -> None:
    """What the analysis says of its layers and a DINOv2's is what their features have by the formula in float64."""
    count, family = 24, FAMILIES["transformers/dinov2"]
    split = images(case.family.size, count)
    subject = Pretrained(case.model, case.teacher.pixels, "subject", None)
    other = Pretrained(family.build(), PixelFormat(tuple(MEAN), tuple(STD), (family.size, family.size)), "other", None)
    analysis = CKAAnalysis(rows_per_batch=count)
    found = analysis.compute(subject, split, torch.arange(count), SharedArguments(batch_size=count // 2), other)
    grams = []
    for one in (subject, other):
        shown = one.pixels.apply(split.images)
        maps = Teacher(one.model, one.pixels).features(shown, range(len(layout_of(one.model, shown).blocks)))
        pooled = [m.patch_tokens.double().mean(1) for m in maps]
        grams.append([(x - x.mean(0)) @ (x - x.mean(0)).mT for x in pooled])
    expected = torch.tensor(
        [[_debiased(a, b) / (_debiased(a, a) * _debiased(b, b)).sqrt() for b in grams[1]] for a in grams[0]]
    )
    torch.testing.assert_close(torch.tensor(found["matrices"][1]["linear"]), expected.float(), rtol=0, atol=2e-3)


def _debiased(a: Tensor, b: Tensor) -> Tensor:
    """Unbiased HSIC of two Gram matrices (Song et al., 2012), but for a factor that CKA does not see."""
    n = len(a)
    a, b = (x - x.diag().diag() for x in (a, b))
    rest = a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (a.sum(0) @ b.sum(0))
    return (a * b).sum() + rest


CHECKS: dict[str, Callable[[Case], str | None]] = {
    "features": features,
    "grid": grid,
    "norm": norm,
    "logits": logits,
    "pixels": pixels,
    "attention": attention,
    "cka": cka,
}
