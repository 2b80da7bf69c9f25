import importlib.util
import itertools
from pathlib import Path

import pytest
import torch

_SPEC = importlib.util.spec_from_file_location(
    "side_by_side", Path(__file__).parents[1] / "benchmarks" / "side_by_side.py"
)
side_by_side = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(side_by_side)
CPU = torch.device("cpu")


def coverage(count, confidence, narrower=0):
    """How often the interval holds the median 0, over all ways that values can lie on its two sides."""
    hits = 0
    for signs in itertools.product((-1, 1), repeat=count):
        values = [sign * (i + 1) for i, sign in enumerate(signs)]
        low, high = side_by_side.median_interval(values, confidence)
        ordered = sorted(values)
        low, high = ordered[ordered.index(low) + narrower], ordered[ordered.index(high) - narrower]
        hits += low < 0 < high
    return hits / 2**count


@pytest.mark.parametrize(
    ("count", "confidence"), [(6, 0.95), (9, 0.95), (12, 0.95), (5, 0.9), (10, 0.9), (3, 0.5), (8, 0.5)]
)
def test_the_interval_holds_the_median_as_often_as_it_says_and_no_narrower_one_does(count, confidence):
    assert coverage(count, confidence) >= confidence
    if count > 3:
        assert coverage(count, confidence, narrower=1) < confidence


@pytest.mark.parametrize("count", [1, 2, 5])
def test_too_few_values_give_their_range(count):
    values = [float(i) for i in range(count)]
    assert coverage(count, 0.95) < 0.95
    assert side_by_side.median_interval(values[::-1]) == (0.0, count - 1.0)


def test_the_interval_follows_any_rising_map_and_turns_with_the_sign():
    values = torch.randn(15, generator=torch.Generator().manual_seed(0)).tolist()
    low, high = side_by_side.median_interval(values)
    assert side_by_side.median_interval([value**3 for value in values]) == (low**3, high**3)
    assert side_by_side.median_interval([-value for value in values]) == (-high, -low)
    assert side_by_side.median_interval(sorted(values)) == (low, high)
    assert low < sorted(values)[7] < high


def test_a_ratio_is_taken_within_a_round_so_that_the_machine_may_slow_down():
    drift = [1.0, 10.0, 3.0, 7.0, 2.0, 5.0, 4.0]
    noise = [1.0, 1.1, 0.9, 1.0, 1.2, 0.8, 1.0]
    steady = side_by_side.ratio([3 * n for n in noise], [1.0] * 7)
    drifting = side_by_side.ratio([3 * n * d for n, d in zip(noise, drift, strict=True)], drift)
    assert drifting["median"] == pytest.approx(steady["median"]) == pytest.approx(3)
    assert drifting["interval"] == pytest.approx(steady["interval"])
    assert steady["range"] == pytest.approx([2.4, 3.6])
    assert steady["rounds"] == 7
    with pytest.raises(ValueError, match="shorter"):
        side_by_side.ratio([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("wanted", "median", "met"),
    [(">= 2", 2.0, True), (">= 2", 1.99, False), ("<= 2", 2.0, True), ("<= 2", 2.01, False)],
)
def test_a_bar_is_met_by_the_median(wanted, median, met):
    found = side_by_side.bar(3, "one / other", wanted, {"median": median, "interval": [0.0, 9.0], "rounds": 5})
    assert found["met"] is met
    last_row = side_by_side.bars_table([found]).splitlines()[-1]
    cells = [cell.strip() for cell in last_row.strip("|").split("|")]
    expected = ["3", "one / other", wanted, f"{median:.2f}", "0.00 to 9.00", "5", "yes" if met else "**no**"]
    assert cells == expected


@pytest.mark.parametrize("warmups", [0, 1, 2])
def test_pieces_take_turns_and_each_is_first_as_often_as_the_others(warmups):
    calls = []
    works = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = side_by_side.interleave(works, 6, warmups=warmups, device=CPU)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 6 + warmups
    assert sorted(rounds[warmups:]) == sorted(["abc", "bca", "cab"] * 2)
    assert {name: len(found) for name, found in seconds.items()} == {"a": 6, "b": 6, "c": 6}


def test_seconds_are_those_of_the_piece_they_are_named_for(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(side_by_side.time, "perf_counter", lambda: clock[0])

    def takes(duration):
        return lambda: clock.__setitem__(0, clock[0] + duration)

    seconds = side_by_side.interleave({"slow": takes(3.0), "fast": takes(0.5)}, 4, device=CPU)
    assert seconds == {"slow": [3.0] * 4, "fast": [0.5] * 4}
