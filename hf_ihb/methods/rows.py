"""What must be known of a teacher's features for some methods to learn from them: the smallest row that serves all."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from hf_ihb.methods.base import Method, SharedKeys
from hf_ihb.step import Preparation


class FeatureRow(NamedTuple):
    """What of a teacher's features a row holds.

    Attributes:
        layers: Of each layer the ``tokens``, or ``gram``, the inner products of an image's tokens.
        final: Of the final tokens all, ``tokens``, or their ``mean``.
    """

    layers: Literal["tokens", "gram"] | None = None
    final: Literal["tokens", "mean"] | None = None

    @property
    def name(self) -> str:
        """Its parts, with a ``+`` between two; final tokens are ``tokens`` as those of the layers are."""
        return "+".join(dict.fromkeys(part for part in self if part is not None))

    @property
    def kind(self) -> str:
        """That of its larger part, as a user may ask for it."""
        return self.name.split("+")[0]


def smallest_row(methods: Sequence[Method], *, moved: bool) -> FeatureRow:
    """The smallest from which all methods can be served, those that learn from scores alone left out.

    Where the teacher's tokens are compared as they lie, all of them lie inside what it sees, and the mean over them is
    as constant as they are. Where they follow the student's crop, that decides which of them are compared, and by how
    much, and no mean tells what another crop would have found: then whole tokens are needed. A row that holds final
    tokens holds those of all layers.

    Args:
        methods: That are learned by.
        moved: Whether the teacher's tokens follow the student's crop and flip: its view is ``shared``.
    """
    layers = [m for m in methods if m.needs.layers]
    finals = {m.needs.final for m in methods} - {None}
    if "tokens" in finals or (finals and moved):
        return FeatureRow("tokens", "tokens")
    is_gram = all(m.needs.layers == "gram" and m.needs.preparation == gram_preparation(m.shared) for m in layers)
    kept: Literal["tokens", "gram"] = "gram" if is_gram else "tokens"
    return FeatureRow(kept if layers else None, "mean" if finals else None)


def gram_preparation(keys: SharedKeys) -> Preparation:
    """What is done to tokens before their inner products are taken."""
    return "centered" if keys.center_positions else "plain"


def tokens_because(methods: Sequence[Method], *, moved: bool) -> str | None:
    """The key because of which whole tokens are needed of the teacher; None where nothing needs them.

    Args:
        methods: That are learned by.
        moved: See `smallest_row`.
    """
    for method in methods:
        needs = method.needs
        if "tokens" in (needs.layers, needs.final) or (needs.final is not None and moved):
            return needs.because or method.weight_key
    return None


def more_because(methods: Sequence[Method], kind: Literal["gram", "mean"], *, moved: bool) -> str | None:
    """The key because of which rows of a kind, with means beside them, are not those to keep; None where they are.

    Args:
        methods: That are learned by, one of them from features.
        kind: Of rows.
        moved: See `smallest_row`.
    """
    if smallest_row(methods, moved=moved).kind == kind:
        return None
    if (because := tokens_because(methods, moved=moved)) is not None:
        return because
    asking = [m for m in methods if m.needs.layers] or [m for m in methods if m.needs.final]
    return asking[0].needs.because or asking[0].weight_key
