"""Counter-based random numbers: what image k meets in epoch e is a function of (seed, epoch, k, stream) alone.

The same for any batch size, worker count, process count or resume, because no state is kept anywhere.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_ihb.functional.constants import constant

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32-10, a block cipher used as a random number generator.

    Args:
        counter: ``(..., 4)`` int64, each word in [0, 2^32).
        key: Two words in [0, 2^32).

    Returns:
        ``(..., 4)`` int64, each word uniform in [0, 2^32).

    References:
        Salmon, Moraes, Dror, Shaw, 2011, Parallel Random Numbers: As Easy as 1, 2, 3.
    """
    # the two halves of a round go through one operation each: in small batches it is their number that costs
    even, odd = counter[..., 0::2], counter[..., 1::2]
    multipliers = constant(_MULTIPLIERS, counter.device, torch.int64)
    keys = [
        tuple((word + turn * weyl) & _WORD for word, weyl in zip(key, _WEYL, strict=True)) for turn in range(_ROUNDS)
    ]
    for round_key in constant(tuple(keys), counter.device, torch.int64):
        # int64 products wrap modulo 2^64, which leaves both 32-bit halves of the unsigned product intact; what an odd
        # word has above its 32 bits is cut off with the even one it goes into
        product = (even * multipliers).flip(-1)
        even, odd = ((product >> 32) ^ odd ^ round_key) & _WORD, product
    return torch.stack((even, odd & _WORD), dim=-1).flatten(-2)


def stream_words(seed: int, epoch: int | Tensor, index: Tensor, counts: Mapping[int, int]) -> dict[int, Tensor]:
    """Random 32-bit words for each sample, of several streams at once.

    On an accelerator it is the number of operations that costs, not that of words: all come from one call of `philox`.

    Args:
        seed: Run seed, in [0, 2^64).
        epoch: Epoch number, in [0, 2^32); as a scalar int64 tensor it is not compiled into a graph.
        index: ``(B,)`` int64 sample indices, >= 0.
        counts: For each stream the words per sample, in [1, 2^18]. A stream is a purpose of the numbers, in [0, 2^16);
            streams are independent of each other, and the same whichever others are drawn beside them.

    Returns:
        For each stream ``(B, count)`` int64, uniform in [0, 2^32).
    """
    return _split(_words(seed, epoch, index, counts), counts)


def stream_uniforms(seed: int, epoch: int | Tensor, index: Tensor, counts: Mapping[int, int]) -> dict[int, Tensor]:
    """Uniform numbers for each sample, of several streams at once; arguments as in `stream_words`.

    Returns:
        For each stream ``(B, count)`` float32 in [0, 1), multiples of 2^-24.
    """
    return _split(uniforms(_words(seed, epoch, index, counts)), counts)


def _words(seed: int, epoch: int | Tensor, index: Tensor, counts: Mapping[int, int]) -> Tensor:
    places = [(stream << 16) + block for stream, count in counts.items() for block in range(-(-count // 4))]
    index = index.long()[:, None].expand(-1, len(places))
    epochs = epoch.expand_as(index) if isinstance(epoch, Tensor) else torch.full_like(index, epoch)
    where = constant(tuple(places), index.device, torch.int64).expand_as(index)
    counter = torch.stack((index & _WORD, index >> 32, epochs, where), dim=-1)
    return philox(counter, (seed & _WORD, (seed >> 32) & _WORD)).flatten(1)


def _split(numbers: Tensor, counts: Mapping[int, int]) -> dict[int, Tensor]:
    """Those of each stream: all have whole blocks of four words."""
    parts = numbers.split([4 * -(-count // 4) for count in counts.values()], dim=1)
    return {stream: part[:, :count] for (stream, count), part in zip(counts.items(), parts, strict=True)}


def uniforms(words: Tensor) -> Tensor:
    """Words of `stream_words` -> float32 in [0, 1), multiples of 2^-24."""
    return (words >> 8).float() * 2.0**-24


def integers(words: Tensor, high: int) -> Tensor:
    """Words of `stream_words` -> int64, uniform in [0, high), high < 2^31."""
    return (words * high) >> 32


def counter_words(seed: int, epoch: int | Tensor, index: Tensor, stream: int, count: int) -> Tensor:
    """``(B, count)`` words of one stream, as from `stream_words`."""
    return stream_words(seed, epoch, index, {stream: count})[stream]


def counter_uniforms(seed: int, epoch: int | Tensor, index: Tensor, stream: int, count: int) -> Tensor:
    """``(B, count)`` uniform numbers of one stream; see `stream_words` and `uniforms`."""
    return uniforms(counter_words(seed, epoch, index, stream, count))


def counter_integers(seed: int, epoch: int | Tensor, index: Tensor, stream: int, high: int) -> Tensor:
    """``(B,)`` integers of one stream; see `stream_words` and `integers`."""
    return integers(counter_words(seed, epoch, index, stream, 1)[:, 0], high)
