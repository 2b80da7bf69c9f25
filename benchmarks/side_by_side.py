"""Times pieces of work side by side: interleaved rounds in one process, ratios of the rounds, one file of results.

On a machine that others use too, seconds of different minutes cannot be compared; pieces of work that take turns can.
Each round runs every piece once, in an order that moves on by one; a ratio is taken within each round, and reported as
the median over rounds with an interval.
"""

import datetime
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_ihb.runs.environment import default_device, environment
from hf_ihb.runs.files import write_json
from hf_ihb.runs.tables import markdown_table

RESULTS = Path(__file__).parent / "results"


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def interleave(
    works: Mapping[str, Callable[[], Any]], rounds: int, *, warmups: int = 1, device: torch.device | None = None
) -> dict[str, list[float]]:
    """Seconds of each piece of work in each round.

    Args:
        works: What to run, by name; the same amount of work in each.
        rounds: How often each is timed, >= 1.
        warmups: Rounds before that which are not timed.
        device: Waited for before each reading of the clock; the machine's accelerator if None.
    """
    device = device or default_device()
    names, seconds = list(works), {name: [] for name in works}
    for turn in tqdm(range(-warmups, rounds), desc=" / ".join(names)[:60], unit="round"):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            _synchronize(device)
            start = time.perf_counter()
            works[name]()
            _synchronize(device)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the median from order statistics (binomial, no shape assumed); all values where they are too few."""
    ordered, n = sorted(values), len(values)
    below, rank = 0.0, 0
    while rank < n // 2:
        below += math.comb(n, rank) / 2**n
        if 1 - 2 * below < confidence:
            break
        rank += 1
    rank = max(rank - 1, 0)
    return ordered[rank], ordered[n - 1 - rank]


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Quotients of two pieces of work, round by round: their median, its 95 % interval, their range.

    Args:
        numerator: Seconds of each round; those of the slower piece make a speed-up.
        denominator: Seconds of the other piece in the same rounds.
    """
    values = [a / b for a, b in zip(numerator, denominator, strict=True)]
    low, high = median_interval(values)
    return {
        "median": statistics.median(values),
        "interval": [low, high],
        "range": [min(values), max(values)],
        "rounds": len(values),
    }


def bar(number: int, what: str, wanted: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """One of the bars of the project and whether it is met.

    Args:
        number: Of the bar.
        what: What is compared with what.
        wanted: A comparison such as ``>= 10`` or ``<= 1.1``.
        found: A ratio as from `ratio`, or anything with a ``median``.
    """
    relation, limit = wanted.split()
    met = found["median"] >= float(limit) if relation == ">=" else found["median"] <= float(limit)
    return {"bar": number, "what": what, "wanted": wanted, **found, "met": met}


def bars_table(bars: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of bars."""
    rows = [["bar", "what", "wanted", "median", "95 % interval", "rounds", "met"]]
    for found in bars:
        low, high = found.get("interval", (math.nan, math.nan))
        rows.append(
            [
                str(found["bar"]),
                found["what"],
                found["wanted"],
                f"{found['median']:.2f}",
                f"{low:.2f} to {high:.2f}",
                str(found.get("rounds", "-")),
                "yes" if found["met"] else "**no**",
            ]
        )
    return markdown_table(rows)


def machine_note(device: torch.device) -> str:
    """One line: hardware, threads, load, versions, commit."""
    found = environment(device)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "transformers", "timm"))
    return (
        f"{found['device']}, {os.cpu_count()} cores, {found['cpu_threads']} threads, load {load:.1f} at the end; "
        f"{versions}; commit {found['commit']}"
    )


def write_results(
    name: str, about: str, content: Mapping[str, Any], tables: Sequence[str], *, folder: Path = RESULTS
) -> Path:
    """Writes ``DATE-name.json`` and ``DATE-name.md``; returns the latter.

    Args:
        name: Of the benchmark.
        about: A paragraph that says what was compared and how, for the reader of the tables.
        content: Everything measured; date, environment and load are added.
        tables: Markdown.
        folder: Where to.
    """
    device, date = default_device(), datetime.date.today().isoformat()
    note = machine_note(device)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{date}-{name}.md"
    write_json(
        path.with_suffix(".json"), {"date": date, "machine": note, "environment": environment(device), **content}
    )
    path.write_text("\n\n".join([f"# {name}, {date}", about, *tables, f"Machine: {note}."]) + "\n", "utf-8")
    print(path.read_text("utf-8"))
    return path
