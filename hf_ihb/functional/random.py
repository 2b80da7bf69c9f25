"""Counter-based random numbers: what image k meets in epoch e is a function of (seed, epoch, k, stream) alone.

The same for any batch size, worker count, process count or resume, because no state is kept anywhere.
"""

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
        # int64 products wrap modulo 2^64, which leaves both 32-bit halves of the unsigned product intact
        product = (even * multipliers).flip(-1)
        even, odd = ((product >> 32) & _WORD) ^ odd ^ round_key, product & _WORD
    return torch.stack((even, odd), dim=-1).flatten(-2)


def counter_words(seed: int, epoch: int | Tensor, index: Tensor, stream: int, count: int) -> Tensor:
    """Random 32-bit words for each sample.

    Args:
        seed: Run seed, in [0, 2^64).
        epoch: Epoch number, in [0, 2^32); as a scalar int64 tensor it is not compiled into a graph.
        index: ``(B,)`` int64 sample indices, >= 0.
        stream: Purpose of the numbers, in [0, 2^16); streams are independent of each other.
        count: Words per sample, in [1, 2^18].

    Returns:
        ``(B, count)`` int64, uniform in [0, 2^32).
    """
    blocks = torch.arange((count + 3) // 4, device=index.device)
    index = index.long()[:, None].expand(-1, len(blocks))
    epochs = epoch.expand_as(index) if isinstance(epoch, Tensor) else torch.full_like(index, epoch)
    counter = torch.stack((index & _WORD, index >> 32, epochs, (stream << 16) + blocks.expand_as(index)), dim=-1)
    return philox(counter, (seed & _WORD, (seed >> 32) & _WORD)).flatten(1)[:, :count]


def counter_uniforms(seed: int, epoch: int | Tensor, index: Tensor, stream: int, count: int) -> Tensor:
    """Uniform numbers for each sample; arguments as in `counter_words`.

    Returns:
        ``(B, count)`` float32 in [0, 1), multiples of 2^-24.
    """
    return (counter_words(seed, epoch, index, stream, count) >> 8).float() * 2.0**-24


def counter_integers(seed: int, epoch: int | Tensor, index: Tensor, stream: int, high: int) -> Tensor:
    """One integer for each sample; arguments as in `counter_words`.

    Returns:
        ``(B,)`` int64, uniform in [0, high), high < 2^31.
    """
    return (counter_words(seed, epoch, index, stream, 1)[:, 0] * high) >> 32
