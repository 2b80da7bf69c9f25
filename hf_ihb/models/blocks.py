"""Which of the states that a library returns are a model's blocks': each is traced to the module that made it."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn


class Call(NamedTuple):
    """One module's turn."""

    path: str
    module: nn.Module
    output: Tensor
    inputs: Sequence[Tensor]


def makers_of(states: Sequence[Tensor], calls: Sequence[Call]) -> list[int | None]:
    """For each state the place of the call that made it, each after the one before; None where there is none."""
    prints = [_fingerprint(call.output) for call in calls]
    makers: list[int | None] = []
    start = 0
    for state in states:
        rest = range(start, len(calls))
        place = next((i for i in rest if calls[i].output is state), None)
        if place is None:
            own = _fingerprint(state)
            place = next((i for i in rest if _same(prints[i], own)), None)
        makers.append(place)
        start = start if place is None else place + 1
    return makers


def _fingerprint(tensor: Tensor) -> tuple[int, float, float]:
    """Of values in any order."""
    if not tensor.is_floating_point():
        return tensor.numel(), math.nan, math.nan
    values = tensor.detach().cpu().double()
    return tensor.numel(), float(values.sum()), float(values.abs().sum())


def _same(one: tuple[int, float, float], other: tuple[int, float, float]) -> bool:
    scale = abs(other[2]) + 1e-12
    return one[0] == other[0] and all(abs(a - b) <= 1e-9 * scale for a, b in zip(one[1:], other[1:], strict=True))


def block_states(
    model: nn.Module, states: Sequence[Tensor], makers: Sequence[int | None], calls: Sequence[Call]
) -> list[int]:
    """Places among the states of those that blocks made."""
    if getattr(model, "block_names", None) is not None:  # named by hand
        return list(range(len(states)))
    network = getattr(model, "timm_model", None)
    if network is not None:
        return list(range(_num_stem_states(network, len(states), makers, calls), len(states)))
    return _trunk(model, states, makers, calls)


def _trunk(
    model: nn.Module, states: Sequence[Tensor], makers: Sequence[int | None], calls: Sequence[Call]
) -> list[int]:
    """States that were made in the list of modules that makes most of them: what is before is stem, behind is head."""
    lists = {path for path, module in model.named_modules() if isinstance(module, nn.ModuleList | nn.Sequential)}
    owners = [[] if maker is None else [p for p in lists if calls[maker].path.startswith(f"{p}.")] for maker in makers]
    votes: Counter[str] = Counter(path for found in owners for path in found)
    if not votes:
        return []
    last = {path: max(i for i, found in enumerate(owners) if path in found) for path in votes}
    trunk = max(votes, key=lambda path: (votes[path], last[path], -len(path)))
    inside = [i for i, found in enumerate(owners) if trunk in found]
    members = {i: calls[makers[i]].path[len(trunk) + 1 :].partition(".")[0] for i in inside}
    kinds = {i: type(model.get_submodule(f"{trunk}.{member}")) for i, member in members.items()}

    def only_shrinks(i: int) -> bool:
        """Whether a member of the list brings the map to where the next one, of another kind, works on it."""
        before, after = states[i - 1] if i else None, states[i + 1] if i + 1 in kinds else None
        changes = before is not None and before.shape != states[i].shape
        return changes and after is not None and after.shape == states[i].shape and kinds[i] is not kinds[i + 1]

    return [i for i in inside if not only_shrinks(i)]


def _num_stem_states(network: nn.Module, count: int, makers: Sequence[int | None], calls: Sequence[Call]) -> int:
    """How many of the states of a network of timm come before its first block.

    timm says which parameters are the stem's; a state before which no others were used is the stem's, unless it is made
    by the same kind of module as the next one.
    """
    info = _feature_modules(network)
    if len(info) != count:
        return 0
    stem = _stem_pattern(network)
    later = [module for name in info[1:] if (module := _module(network, name)) is not None] or [network]
    for number in range(count - 1):
        one, two = (_module(network, name) for name in info[number : number + 2])
        alike = re.sub(r"\d+", "", info[number]) == re.sub(r"\d+", "", info[number + 1])
        if stem is None:
            return 0 if alike or len(set(info[1:])) == 1 else 1
        used = _used_until(makers[number], one, calls)
        # an activation is like any other; its name tells more
        told = one is not None and two is not None and (_depth(one) or _depth(two))
        alike = _kind(one) == _kind(two) if told else alike
        if number == 0 and one is not None and _depth(one) == 1 < max(map(_depth, later)):
            continue
        if alike or not used or not all(stem.match(name) for name in used):
            return number
    return count - 1


def _feature_modules(network: nn.Module) -> list[str]:
    """What timm calls the modules of its states; not all of these names exist."""
    return [entry["module"] for entry in getattr(network, "feature_info", None) or [] if isinstance(entry, dict)]


def last_maker(model: nn.Module, maker: int | None, calls: Sequence[Call]) -> int | None:
    """Place of the last block's call, also where its state is only a part of what it returned, as in ViTs of timm."""
    network = getattr(model, "timm_model", None)
    if network is None or maker is not None:
        return maker
    name = (_feature_modules(network) or [""])[-1]
    module = _module(network, name)
    # a list of blocks is not called itself
    inside = f"timm_model.{name}."
    ends = [i for i, call in enumerate(calls) if call.module is module or call.path.startswith(inside)]
    return ends[-1] if ends and name else None


def _stem_pattern(network: nn.Module) -> re.Pattern | None:
    try:
        pattern = network.group_matcher(coarse=False)["stem"]
    except (AttributeError, TypeError, KeyError):
        return None
    return re.compile(pattern) if isinstance(pattern, str) else None


def _module(network: nn.Module, name: str) -> nn.Module | None:
    return dict(network.named_modules()).get(name)


def _depth(module: nn.Module) -> int:
    """How deep the parts of a module that have weights are nested; 0 for one without such parts."""
    weighted = (child for child in module.children() if next(child.parameters(), None) is not None)
    return max((1 + _depth(child) for child in weighted), default=0)


def _kind(module: nn.Module | None) -> Any:
    if isinstance(module, nn.Sequential | nn.ModuleList):
        return frozenset(type(child) for child in module)
    return type(module)


def _used_until(maker: int | None, module: nn.Module | None, calls: Sequence[Call]) -> list[str]:
    """Names of the parameters that were used until a state was made, without the wrapper's prefix."""
    ends = [i for i, call in enumerate(calls) if call.module is module] or ([] if maker is None else [maker])
    if not ends:
        return []
    names = []
    for call in calls[: ends[0] + 1]:
        path = call.path.removeprefix("timm_model.")
        names += [f"{path}.{name}" for name, _ in call.module.named_parameters(recurse=False)]
    return names
