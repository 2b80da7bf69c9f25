"""Which blocks of a student and a teacher are compared, and how their token maps fit together."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_ihb.errors import ModelLoadError, RecipeError
from hf_ihb.functional.tokens import pool_tokens
from hf_ihb.methods.base import SharedKeys, Widths
from hf_ihb.models.attention import capture_attention
from hf_ihb.models.features import FeatureMap, extract_features, layout_of, resolve_layers, size_arguments
from hf_ihb.models.files import UNREADABLE, one_line
from hf_ihb.models.teacher import Teacher

Grid = tuple[int, int]


@dataclass(frozen=True)
class Correspondence:
    """Of each student layer and the teacher layer it is compared with, and last, where asked for, of the final tokens.

    Attributes:
        student_layers: 0-based block indices.
        teacher_layers: 0-based block indices, as many.
        widths: Of both sides.
        grids: Rows and columns of the student's tokens, those of the final ones last.
        teacher_grids: Of the teacher's after `pool`, likewise.
        teacher_shapes: Their number and width, likewise.
        final_layer: The student's last block; None where its final tokens are not compared.
    """

    student_layers: tuple[int, ...]
    teacher_layers: tuple[int, ...]
    widths: Widths
    grids: tuple[Grid, ...]
    teacher_grids: tuple[Grid, ...]
    teacher_shapes: tuple[tuple[int, int], ...]
    final_layer: int | None

    @property
    def has_final(self) -> bool:
        """Whether final tokens are compared."""
        return self.final_layer is not None

    def deepest(self, maps: Sequence[FeatureMap]) -> FeatureMap:
        """That of the deepest of the teacher's layers."""
        return maps[self.teacher_layers.index(max(self.teacher_layers))]

    def pool(self, maps: Sequence[FeatureMap]) -> list[Tensor]:
        """Patch tokens ``(B, N, D)`` of the teacher's maps, averaged where they are finer than the student's."""
        return [pool_tokens(m.patch_tokens, m.grid, grid)[0] for m, grid in zip(maps, self.grids, strict=False)]


@torch.no_grad()
def correspond(
    student: PreTrainedModel,
    teacher: Teacher,
    keys: SharedKeys,
    pixel_values: Tensor,
    teacher_pixels: Tensor,
    *,
    final: bool,
    several_tokens: bool,
    attention: bool = False,
) -> Correspondence:
    """Sees both models at work on one image.

    Args:
        student: That is trained.
        teacher: That is learned from.
        keys: Name the layers.
        pixel_values: ``(1, C, H, W)`` for the student, normalised.
        teacher_pixels: Likewise for the teacher.
        final: Whether the tokens after the last block are compared.
        several_tokens: Whether a layer must have more than one.
        attention: Whether attention between the patches of both is compared.

    Raises:
        RecipeError: If a layer of the student does not exist, one of the teacher has a single token, or a model has no
            attention that could be compared.
        TeacherMismatchError: If a layer of the teacher does not exist.
    """
    teacher_pixels = teacher_pixels.to(teacher.model.device)
    if attention:
        check_attention(student, pixel_values, "student")
        check_attention(teacher.model, teacher_pixels.to(teacher.model.dtype), f"teacher '{teacher.name}'")
    teacher_layers = teacher.resolve_layers(teacher_pixels, keys.teacher_layers or keys.student_layers)
    student_layers, students, final_maps = _of_student(student, pixel_values, keys.student_layers, final)
    teachers = teacher.features(teacher_pixels, teacher_layers, keys.teacher_norm)
    for layer, feature_map in zip(teacher_layers, teachers, strict=True):
        if feature_map.grid == (1, 1) and several_tokens:
            raise RecipeError(f"key 'teacher_layers': expected several tokens, found one in block {layer}")
    grids = tuple(m.grid for m in (*students, *final_maps))
    deepest = [teachers[teacher_layers.index(max(teacher_layers))]] if final else []
    pooled = [pool_tokens(m.patch_tokens, m.grid, grid) for m, grid in zip((*teachers, *deepest), grids, strict=True)]
    of_student, of_teacher = ([m.tokens.shape[-1] for m in maps] for maps in (students, teachers))
    final_widths = (final_maps[0].tokens.shape[-1], deepest[0].tokens.shape[-1]) if final else None
    return Correspondence(
        student_layers=student_layers,
        teacher_layers=teacher_layers,
        widths=Widths(tuple(of_student), tuple(of_teacher), final_widths),
        grids=grids,
        teacher_grids=tuple(grid for _, grid in pooled),
        teacher_shapes=tuple(tuple(tokens.shape[1:]) for tokens, _ in pooled),
        final_layer=layout_of(student).depth - 1 if final else None,
    )


@torch.no_grad()
def blocks_of_student(
    student: PreTrainedModel, pixel_values: Tensor, layers: Sequence[int]
) -> tuple[tuple[int, ...], Widths]:
    """Some blocks of a student, counted from 0, and their widths, for heads that are compared with no teacher layer.

    Args:
        student: That is trained.
        pixel_values: ``(1, C, H, W)``, normalised.
        layers: Block indices, -1 for the last one.

    Raises:
        RecipeError: If one of them does not exist.
    """
    numbers, maps, _ = _of_student(student, pixel_values, layers, False)
    return numbers, Widths(tuple(m.tokens.shape[-1] for m in maps), ())


def check_attention(model: PreTrainedModel, pixel_values: Tensor, role: str) -> None:
    """Sees that every block of a model has attention between all of its patches.

    Args:
        model: A student or a teacher.
        pixel_values: ``(1, C, H, W)``, normalised.
        role: Which of the two, for the message.

    Raises:
        RecipeError: If not.
    """
    seen: list[int] = []
    training, _ = model.training, model.eval()
    try:
        depth = layout_of(model, pixel_values, **size_arguments(model, pixel_values)).depth
        capture_attention(
            model, pixel_values, lambda block, _: seen.append(block), **size_arguments(model, pixel_values)
        )
    except (ModelLoadError, *UNREADABLE) as error:
        raise RecipeError(f"key 'attention_weight', {role}: {one_line(error)}") from error
    finally:
        model.train(training)
    if len(seen) != depth:
        raise RecipeError(
            f"key 'attention_weight', {role}: expected {type(model).__name__} to have attention between all patches in "
            f"each of its {depth} blocks, found it {len(seen)} times; leave attention out"
        )


def _of_student(
    student: PreTrainedModel, pixel_values: Tensor, layers: Sequence[int], final: bool
) -> tuple[tuple[int, ...], list[FeatureMap], list[FeatureMap]]:
    """Its layers from 0, their maps, and that of the last one where final tokens are compared."""
    training, _ = student.training, student.eval()
    try:
        depth = layout_of(student, pixel_values, **size_arguments(student, pixel_values)).depth
        numbers = tuple(resolve_layers(layers, depth, type(student).__name__))
        asked = [*numbers, depth - 1] if final else numbers
        maps = extract_features(student, pixel_values, asked)[1]
    except UNREADABLE as error:
        raise RecipeError(f"key 'student_layers': {one_line(error)}") from error
    finally:
        student.train(training)
    return numbers, maps[: len(numbers)], maps[len(numbers) :]
