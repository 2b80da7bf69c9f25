"""Names of others in Markdown of ours: what comes from a file is shown as code, and nothing in it is markup."""

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hf_ihb.config.names import LOCAL_PREFIX
from hf_ihb.runs.tables import markdown_table

_LONGEST = 120
# Characters that act on the text around them or that nobody sees: control, format (bidi marks), surrogates, separators.
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


class Markdown(str):
    """Text that is Markdown by our own hand; any other string is a name.

    `format`, `join` and ``+`` give Markdown, and show names among what they are given as code.
    """

    __slots__ = ()

    def format(self, *args: Any, **kwargs: Any) -> "Markdown":
        """Fills placeholders; numbers take their format, names become code."""
        return Markdown(super().format(*map(_shown, args), **{name: _shown(value) for name, value in kwargs.items()}))

    def __add__(self, other: Any) -> "Markdown":
        return Markdown(super().__add__(to_markdown(other)))

    def join(self, parts: Iterable[Any]) -> "Markdown":
        """Joins names and Markdown."""
        return Markdown(super().join(map(to_markdown, parts)))


EMPTY = Markdown("")


def _shown(value: Any) -> Any:
    return value if isinstance(value, (Markdown, int, float)) else code(str(value))


def to_markdown(value: Any) -> Markdown:
    """A name as code, a number as it prints, Markdown as it is.

    Raises:
        TypeError: If it is none of these, such as a value that is not there.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError(f"expected a name, a number or Markdown, got {value!r}")
    return value if isinstance(value, Markdown) else Markdown(_shown(value))


def visible(name: str) -> str:
    r"""One line of a name: characters that nobody sees as ``\u202e``, at most 120 characters."""
    name = name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in _UNSEEN else char for char in name
    )


def code(name: str) -> Markdown:
    """A name as a code span, in which Markdown knows no markup, no links and no HTML."""
    text = visible(name)
    text = text if text.strip() else repr(text)
    # a table takes a pipe behind a backslash for text, but renderers differ on one behind two
    text = text.replace("\\|", "\\x5c|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text[0] in "` " or text[-1] in "` " else ""
    return Markdown(f"{fence}{pad}{text}{pad}{fence}")


def table(rows: Sequence[Sequence[Any]]) -> Markdown:
    """Names, numbers and Markdown as a table, the first row its header; columns with nothing below it are left out."""
    kept = [i for i in range(len(rows[0])) if any(row[i] != "" for row in rows[1:])]
    return Markdown(markdown_table([[to_markdown(row[i]).replace("|", "\\|") for i in kept] for row in rows]))


def listing(names: Sequence[Any], most: int = 20) -> Markdown:
    """Names one after the other, at most so many."""
    rest = Markdown(" and {:,} more").format(len(names) - most) if len(names) > most else EMPTY
    return Markdown(", ").join(names[:most]) + rest


def percent(share: float, decimals: int = 2) -> Markdown:
    """A share in [0, 1] in per cent."""
    return Markdown(f"{100 * share:.{decimals}f} %")


def counted(number: int, noun: str) -> Markdown:
    """A number and what it counts; an s where there are several."""
    return Markdown("{:,} " + noun + "s" * (number != 1)).format(number)


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a number that is defined."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def value_or_nothing(number: Any, text: str, factor: float = 1) -> Markdown:
    """A number times a factor, in a format such as ``{:.2f}``; nothing where it is not defined."""
    return Markdown(text).format(factor * number) if is_number(number) else EMPTY


def called(name: str) -> str:
    """A published name as a reader knows it."""
    return name.removeprefix(LOCAL_PREFIX)


def measured_on(data: Mapping[str, Any]) -> Markdown:
    """The images that something was measured on."""
    return Markdown("{:,} images of the {} split of {}").format(data["num_images"], data["split"], called(data["name"]))
