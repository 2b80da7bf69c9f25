import pytest
import torch

from hf_ihb.functional.random import (
    counter_integers,
    counter_uniforms,
    counter_words,
    philox,
    stream_uniforms,
    stream_words,
)

MASK = 0xFFFFFFFF


def reference_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python integers, which never wrap."""
    c, k = list(counter), list(key)
    for i in range(10):
        if i > 0:
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
    return c


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    counter, key, expected = ([int(word, 16) for word in words.split()] for words in (counter, key, expected))
    assert philox(torch.tensor(counter), tuple(key)).tolist() == expected


def test_philox_equals_an_implementation_in_python_integers(generator):
    counters = torch.randint(2**32, (64, 4), generator=generator)
    for key in torch.randint(2**32, (8, 2), generator=generator).tolist():
        assert philox(counters, tuple(key)).tolist() == [reference_philox(c, key) for c in counters.tolist()]


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 5, 2**64 - 1])
@pytest.mark.parametrize(("epoch", "stream", "count"), [(0, 0, 1), (3, 1, 4), (2**32 - 1, 65535, 9)])
def test_words_are_the_cipher_of_index_epoch_stream_and_block(seed, epoch, stream, count):
    index = [0, 1, 2**31, 2**33 + 17]
    expected = []
    for i in index:
        blocks = range(-(-count // 4))
        key = [seed % 2**32, seed // 2**32]
        words = [reference_philox([i % 2**32, i // 2**32, epoch, stream * 2**16 + b], key) for b in blocks]
        expected.append([w for block in words for w in block][:count])
    assert counter_words(seed, epoch, torch.tensor(index), stream, count).tolist() == expected


@pytest.mark.parametrize("sizes", [[1] * 50, [50], [7, 13, 30], [32, 18]])
def test_numbers_do_not_depend_on_how_a_batch_is_split(sizes):
    index = torch.arange(50)
    whole = counter_uniforms(3, 2, index, 1, 6)
    parts = torch.cat([counter_uniforms(3, 2, part, 1, 6) for part in index.split(sizes)])
    assert torch.equal(whole, parts)


def test_numbers_follow_their_sample_through_a_permutation(generator):
    order = torch.randperm(50, generator=generator)
    assert torch.equal(counter_uniforms(3, 2, order, 1, 6), counter_uniforms(3, 2, torch.arange(50), 1, 6)[order])
    assert torch.equal(counter_integers(3, 2, order, 1, 1000), counter_integers(3, 2, torch.arange(50), 1, 1000)[order])


def test_asking_for_more_numbers_leaves_the_first_ones_alone():
    index = torch.arange(20)
    assert torch.equal(counter_words(0, 0, index, 0, 11)[:, :5], counter_words(0, 0, index, 0, 5))


def test_seeds_epochs_streams_and_samples_are_uncorrelated():
    index = torch.arange(20_000)
    settings = [(0, 0, 0), (1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 2, 0), (0, 0, 1), (0, 0, 2)]
    draws = [counter_uniforms(seed, epoch, index, stream, 2) for seed, epoch, stream in settings]
    columns = [column for draw in draws for column in draw.unbind(1)] + [draws[0][:, 0].roll(1)]
    correlation = torch.corrcoef(torch.stack(columns).double())
    off_diagonal = correlation - torch.eye(len(columns), dtype=torch.float64)
    assert off_diagonal.abs().max() < 5 / 20_000**0.5


def test_uniforms_have_the_moments_of_the_uniform_distribution():
    u = counter_uniforms(11, 4, torch.arange(100_000), 2, 4).double()
    assert u.min() >= 0
    assert u.max() < 1
    assert torch.equal(u * 2**24, (u * 2**24).round())
    for power in (1, 2, 3, 4):
        spread = (1 / (2 * power + 1) - 1 / (power + 1) ** 2) ** 0.5
        assert abs(u.pow(power).mean().item() - 1 / (power + 1)) < 5 * spread / u.numel() ** 0.5
    counts = torch.histc(u, 64, 0, 1)
    chi_square = ((counts - u.numel() / 64).square() / (u.numel() / 64)).sum().item()
    assert 63 - 5 * 126**0.5 < chi_square < 63 + 5 * 126**0.5


@pytest.mark.parametrize("high", [1, 2, 7, 1000, 2**31 - 1])
def test_integers_are_uniform_below_high(high):
    values = counter_integers(5, 0, torch.arange(70_000), 3, high)
    assert values.dtype == torch.int64
    assert values.min() >= 0
    assert values.max() < high
    expected = counter_words(5, 0, torch.arange(70_000), 3, 1)[:, 0].double() * high / 2**32
    assert torch.equal(values, expected.floor().long())
    bins = min(high, 100)
    counts = torch.bincount(values * bins // high, minlength=bins).double()
    assert ((counts / 70_000 - 1 / bins).abs() <= 5 * (1 / bins / 70_000) ** 0.5).all()


@pytest.mark.parametrize("counts", [{0: 1}, {4: 8, 0: 3, 65535: 5}, {7: 23, 6: 4}])
def test_streams_drawn_together_are_those_drawn_alone(counts):
    index = torch.tensor([0, 5, 2**33])
    together, numbers = stream_words(9, 3, index, counts), stream_uniforms(9, 3, index, counts)
    assert list(together) == list(numbers) == list(counts)
    for stream, count in counts.items():
        assert torch.equal(together[stream], counter_words(9, 3, index, stream, count))
        assert torch.equal(numbers[stream], counter_uniforms(9, 3, index, stream, count))
