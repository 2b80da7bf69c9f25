"""Attention between the patches of a teacher, taken along with its forward."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from hf_ihb.functional.tokens import pool_tokens
from hf_ihb.models.attention import AttentionGeometry, attention_geometry, attention_seen
from hf_ihb.models.correspondence import Correspondence
from hf_ihb.models.teacher import Teacher


class TeacherAttention:
    """Maps of the teacher's layers that are compared.

    Args:
        teacher: A ViT.
        layers: How its layers fit the student's.
    """

    def __init__(self, teacher: Teacher, layers: Correspondence) -> None:
        self.teacher, self.layers = teacher, layers
        self._geometries: dict[tuple[int, int], AttentionGeometry] = {}

    @contextmanager
    def taken(self, pixels: Tensor) -> Iterator[list[Tensor]]:
        """A list that holds one map a layer after a forward of the teacher on some pixels inside.

        They are ``(B, N, N)`` float32, means over heads, without tokens before the patches, and averaged where the
        teacher's grid is finer than the student's.
        """
        size = pixels.shape[-2:]
        if size not in self._geometries:
            self._geometries[size] = attention_geometry(self.teacher.model, pixels)
        geometry, found, maps = self._geometries[size], {}, []

        def take(block: int, attention: Tensor) -> None:
            if block in self.layers.teacher_layers:
                found[block] = attention.mean(dim=1)[:, geometry.num_prefix_tokens :, geometry.num_prefix_tokens :]

        with attention_seen(self.teacher.model, geometry, take):
            yield maps
        for block, grid in zip(self.layers.teacher_layers, self.layers.grids, strict=False):
            rows, _ = pool_tokens(found[block], geometry.grid, grid)
            both, _ = pool_tokens(rows.mT, geometry.grid, grid)
            maps.append(both.mT)
