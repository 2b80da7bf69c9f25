"""Trainable heads on both sides, as the published study had them.

Because the teacher's side is trained too, the losses behind them can be met with no content: heads that answer with a
code of the position satisfy them for any two models.
"""

from torch import Tensor, nn

from hf_ihb.methods.base import SharedKeys, Widths
from hf_ihb.step import Preparation, StudentOutput, TeacherOutputs

HIDDEN_WIDTH, OUTPUT_WIDTH = 512, 256


def projection_head(width: int) -> nn.Sequential:
    """``(..., width) -> (..., 256)``: Linear, LayerNorm, GELU, Linear, LayerNorm, 512 wide inside."""
    return nn.Sequential(
        nn.Linear(width, HIDDEN_WIDTH),
        nn.LayerNorm(HIDDEN_WIDTH),
        nn.GELU(),
        nn.Linear(HIDDEN_WIDTH, OUTPUT_WIDTH),
        nn.LayerNorm(OUTPUT_WIDTH),
    )


class PairedHeads(nn.Module):
    """A head for the student and one for the teacher, for each layer.

    Args:
        widths: Of the layers.
        preparation: Of the teacher's tokens that are projected.
    """

    def __init__(self, widths: Widths, preparation: Preparation) -> None:
        super().__init__()
        self.preparation = preparation
        sides = (widths.student, widths.teacher)
        self.student, self.teacher = (nn.ModuleList(projection_head(width) for width in side) for side in sides)

    def forward(self, student: StudentOutput, teacher: TeacherOutputs) -> list[tuple[Tensor, Tensor]]:
        """For each layer the projected tokens ``(B, N, 256)`` of student and teacher."""
        layers = zip(self.student, self.teacher, student.features, teacher.layers[self.preparation], strict=True)
        return [(own(x), other(y.tokens.to(other[0].weight.dtype))) for own, other, x, y in layers]


def paired_head(shared: SharedKeys, widths: Widths, preparation: Preparation) -> PairedHeads | None:
    """The heads of a loss over tokens, where `teacher_projector` asks for them."""
    return PairedHeads(widths, preparation) if shared.teacher_projector == "trainable" else None
