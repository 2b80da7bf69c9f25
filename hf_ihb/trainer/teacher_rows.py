"""What rows of what a teacher says hold, for the methods of a run, and what determines them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_ihb.functional.resampling import Resampler
from hf_ihb.functional.tokens import mean_token
from hf_ihb.methods.rows import FeatureRow, gram_preparation, smallest_row, tokens_because
from hf_ihb.runs.environment import library_versions
from hf_ihb.step import Preparation
from hf_ihb.trainer.cache_rows import Code, Features, Kind, Layout
from hf_ihb.trainer.teacher_cache import describe_teacher

_EVEN = 1e-4  # relative: what float32 makes of equal shares of up to some thousand tokens


class TeacherRows:
    """Rows of a teacher's side: those of stored images, and the features among those of augmented ones.

    Args:
        side: `TeacherSide` whose teacher it is.
    """

    def __init__(self, side: Any) -> None:
        self.side, self.trainer = side, side.trainer

    # ---- What they hold ----

    @property
    def stored(self) -> tuple[bool, bool]:
        """Whether scores, and whether features, are wanted of images as they are stored."""
        args, side = self.trainer.args, self.side
        logits = side.asks_logits and args.teacher_logits_view == "clean"
        return logits, side.layers is not None and args.teacher_view != "identical"

    @property
    def moved(self) -> bool:
        """Whether the teacher's tokens follow the student's crop and flip, which no mean of them can."""
        return self.trainer.args.teacher_view == "shared"

    @property
    def smallest(self) -> FeatureRow:
        """What must be kept of features for all methods."""
        return smallest_row(self.side.methods, moved=self.moved)

    @property
    def because(self) -> str | None:
        """The key because of which this is whole tokens; None where it is not, or takes them in several ways."""
        return tokens_because(self.side.methods, moved=self.moved)

    def kind(self, asked: str) -> Kind:
        """The smallest row that serves all methods whose view is the stored image, or what was asked for."""
        logits, features = self.stored
        if not features:
            return "logits"
        # whoever asks for tokens asks for all of them; of anything else the arguments saw that it is the smallest
        name = "tokens" if asked == "tokens" else self.smallest.name
        return f"logits+{name}" if logits else name

    def reason(self, kind: Kind) -> str:
        """Why it is this one."""
        names = kind.split("+")
        if kind == "logits":
            return "the teacher sees the stored image"
        if "tokens" in names and self.because is not None:
            return f"'{self.because}' needs the tokens themselves"
        if "tokens" in names:
            return "the losses take the tokens in several ways"
        if "gram" not in names:
            return "an image's mean token is all that the losses need"
        beside = " and its mean token" if "mean" in names else ""
        return f"inner products of an image's tokens{beside} are all that the losses need"

    def layout(self, kind: Kind) -> Layout:
        """Of rows of stored images."""
        names, shapes = kind.split("+"), []
        if "logits" in names:
            shapes.append((1, self.trainer.student.config.num_labels))
        if "tokens" in names or "gram" in names:
            shapes += self.side.layers.teacher_shapes[: self._num_parts(names)]
        if "mean" in names:
            shapes.append((1, self.side.layers.teacher_shapes[-1][1]))
        return Layout(kind, tuple(shapes))

    def parts(self, features: Features, layers: Sequence[Tensor]) -> list[Tensor]:
        """What rows hold, as it is.

        Args:
            features: Of rows.
            layers: Tokens ``(B, N, D)`` of each layer, the final ones last.

        Returns:
            ``(B, N, D)`` of each part, that of the mean with one token.
        """
        names, parts = features.split("+"), []
        if "gram" in names:
            first = enumerate(layers[: self._num_parts(names)])
            parts = [self.side.prepared(x, number, self.gram_preparation) for number, x in first]
        if "tokens" in names:
            parts = list(layers[: self._num_parts(names)])
        return [*parts, self.mean(layers[-1])[:, None]] if "mean" in names else parts

    def codes(self, features: Features, statistics: Sequence[tuple[Tensor, Tensor]]) -> list[Code]:
        """Of those parts that have one.

        Args:
            features: What rows hold.
            statistics: For each layer, the final tokens last, the means ``(N, D)`` and the deviations ``(D,)``.
        """
        names = features.split("+")
        codes = [Code.of(*pair) for pair in statistics[: self._num_parts(names)]] if "tokens" in names else []
        if "mean" in names:
            mean, std = statistics[-1]
            codes.append(Code.of(self.mean(mean[None]), std))
        return codes

    def _num_parts(self, names: Sequence[str]) -> int:
        """Layers whose tokens or inner products rows hold, with the final tokens where those are whole."""
        layers = self.side.layers
        return len(layers.teacher_layers) + (layers.has_final and "mean" not in names)

    def mean(self, final: Tensor) -> Tensor:
        """``(B, D)`` mean of final tokens ``(B, N, D)`` over the places of the student's, as they lie."""
        layers = self.side.layers
        return mean_token(*Resampler(None)(final, layers.teacher_grids[-1], layers.grids[-1]))

    @property
    def gram_preparation(self) -> Preparation:
        """What is done to tokens before their inner products are taken."""
        return gram_preparation(self.trainer.args)

    # ---- What determines them ----

    def description(self, kind: Kind) -> dict[str, Any]:
        """What determines a row, beside its layout and the view."""
        trainer, args, names = self.trainer, self.trainer.args, kind.split("+")
        rows = {
            "teacher": describe_teacher(trainer.teacher, self.side.sees_whole_images),
            "precision": f"{self.side.precision} on {args.device.type}",
            "images": trainer.train_dataset.fingerprint(),
            "versions": library_versions("torch", "transformers", "timm"),
        }
        if "tokens" in names or "gram" in names:
            rows |= self._of_layers(names)
        return rows | (self._of_mean() if "mean" in names else {})

    def _of_layers(self, names: Sequence[str]) -> dict[str, Any]:
        layers, args = self.side.layers, self.trainer.args
        taken = "tokens" in names or not set(self.side.preparations) <= {"plain"}
        code = {"code": "mean and scale of each layer"} if "tokens" in names else {}
        return (
            code
            | {
                "layers": list(layers.teacher_layers),
                "states": list(self.trainer.teacher.states(layers.teacher_layers)),
                "norm": args.teacher_norm,
                "losses": {"relation": layers.has_final and "mean" not in names},  # the final tokens are part of a row
                "grids": list(layers.teacher_grids[: self._num_parts(names)]),
                "preparation": self.gram_preparation if "gram" in names else "plain",
                "statistics_samples": args.teacher_statistics_samples if taken else None,
            }
        )

    def _of_mean(self) -> dict[str, Any]:
        """Nothing of the student, but for its grid where that decides how much each of the teacher's tokens counts."""
        layers, args = self.side.layers, self.trainer.args
        deepest = max(layers.teacher_layers)
        return {
            "mean": {
                "code": "mean and scale",
                "layer": deepest,
                "state": self.trainer.teacher.states([deepest])[0],
                "norm": args.teacher_norm,
                "over": "all tokens alike" if self._counts_evenly() else list(layers.grids[-1]),
                "statistics_samples": args.teacher_statistics_samples,
            }
        }

    def _counts_evenly(self) -> bool:
        """Whether all of the teacher's tokens count alike, as they do where they are as many as the student's, or more.

        Where they are fewer, they are interpolated, and unless they fit a whole number of times, some count more.
        """
        count = self.side.layers.teacher_shapes[-1][0]
        shares = self.mean(torch.eye(count)[None])[0]
        return bool(((count * shares - 1).abs() < _EVEN).all())
