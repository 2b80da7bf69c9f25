"""Trainable heads on both sides, as the published study had them.

Because the teacher's side is trained too, the losses behind them can be met with no content: heads that answer with a
code of the position satisfy them for any two models.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

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
    """A head for the student and one for the teacher, for each layer of each loss.

    Args:
        losses: Names of the losses.
        student_widths: Width of each student layer.
        teacher_widths: Width of the teacher layer it is compared with.
    """

    def __init__(self, losses: Sequence[str], student_widths: Sequence[int], teacher_widths: Sequence[int]) -> None:
        super().__init__()
        self.student, self.teacher = (
            nn.ModuleDict({loss: nn.ModuleList(projection_head(width) for width in widths) for loss in losses})
            for widths in (student_widths, teacher_widths)
        )

    def forward(
        self, student: Sequence[Tensor], teacher: Mapping[str, Sequence[Tensor]]
    ) -> dict[str, tuple[tuple[Tensor, Tensor], ...]]:
        """Projects both sides.

        Args:
            student: Tokens ``(B, N, D_s)`` of each layer.
            teacher: For each loss the tokens ``(B, N, D_t)`` of each layer.

        Returns:
            For each loss and layer the projected tokens ``(B, N, 256)`` of student and teacher.
        """
        return {
            loss: tuple(
                (of_student(s), of_teacher(t.to(of_teacher[0].weight.dtype)))
                for of_student, of_teacher, s, t in zip(
                    self.student[loss], self.teacher[loss], student, tokens, strict=True
                )
            )
            for loss, tokens in teacher.items()
        }
