"""What a model does with one image: which of its states are blocks, how they lie, and the norm after the last one.

Nothing is read off a config. One forward is watched, module by module; what the library returns as states is traced to
the modules that made it, and shapes are measured.
"""

import math
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_ihb.models.blocks import Call, block_states, last_maker, makers_of

_MOST_PREFIX_TOKENS = 64


class StateLayout(NamedTuple):
    """How the state of one block lies in memory.

    Attributes:
        index: Among the states that the library returns.
        kind: ``map`` (B, C, H, W), ``map_last`` (B, H, W, C), ``tokens`` (B, T, C).
        num_prefix_tokens: Tokens before the patches.
        stride: Height and width of the images over those of the grid.
        width: Channels.
    """

    index: int
    kind: str
    num_prefix_tokens: int
    stride: tuple[float, float]
    width: int


class Norm(NamedTuple):
    """The norm after the last block.

    Attributes:
        path: Of the module.
        takes_map: Whether it takes channels in dimension 1 of a map, instead of in the last one of tokens.
        width: Channels.
    """

    path: str
    takes_map: bool
    width: int


class ModelLayout(NamedTuple):
    """What `probe` sees.

    Attributes:
        blocks: One for each block, in order.
        norm: None where there is none.
    """

    blocks: tuple[StateLayout, ...]
    norm: Norm | None

    @property
    def depth(self) -> int:
        """How many blocks there are."""
        return len(self.blocks)


def probe(model: PreTrainedModel, pixel_values: Tensor, **kwargs: Any) -> ModelLayout:
    """Watches a model at work on one image, in eval mode and without gradients; it is left as it was.

    Args:
        model: Any whose forward returns states.
        pixel_values: ``(B, C, H, W)``, normalised; the first image is taken.
        **kwargs: Passed on to the model.

    Raises:
        ValueError: If it returns no states, or they do not form grids.
    """
    image = pixel_values[:1].detach()
    kwargs = {name: value[:1] if isinstance(value, Tensor) else value for name, value in kwargs.items()}
    with torch.no_grad(), _in_eval_mode(model), _unseen(model), _watched(model) as calls:
        outputs = model(pixel_values=image, output_hidden_states=True, **kwargs)
    states = states_of(outputs)
    makers = makers_of(states, calls)
    indices = block_states(model, states, makers, calls)
    if not indices:
        raise ValueError(f"{type(model).__name__}: expected blocks among its {len(states)} states, found none")
    maps = [call.output.shape for call in calls if call.output.ndim == 4]
    stem = (getattr(outputs, "hidden_states", None) or ())[: indices[0]]
    patches = _patches_of_stem(model, image, kwargs, stem)
    blocks = _layouts(states, indices, maps, tuple(image.shape[-2:]), patches)
    last = last_maker(model, makers[indices[-1]], calls)
    return ModelLayout(blocks, _norm_after(last, blocks[-1].width, calls, states[indices[-1]]))


def _patches_of_stem(model: nn.Module, image: Tensor, kwargs: dict[str, Any], stem: Sequence[Tensor]) -> range | None:
    """Which tokens are patches before the first block: those that another image changes.

    None where there are no tokens before it, or where they are mixed already, and there is nothing to see.

    Raises:
        ValueError: If other tokens follow the patches.
    """
    if not stem or stem[-1].ndim != 3:
        return None
    noise = torch.rand(image.shape, generator=torch.Generator().manual_seed(0))  # not the run's random numbers
    other = image + noise.to(image.device, image.dtype)
    with torch.no_grad(), _in_eval_mode(model), _unseen(model):
        states = model(pixel_values=other, output_hidden_states=True, **kwargs).hidden_states
    after = states[len(stem) - 1]
    changed = (after != stem[-1]).any(-1)[0]
    if changed.all() or not changed.any() or not after.isfinite().all():
        return None
    first, last = changed.nonzero()[[0, -1]].flatten().tolist()
    if not changed[-1]:
        raise ValueError(
            f"{type(model).__name__}: expected patches as its last tokens, found {len(changed) - 1 - last} others "
            "after them"
        )
    return range(first, last + 1)


def states_of(outputs: Any) -> Sequence[Tensor]:
    """States as the library returns them, as maps where it has both.

    Raises:
        ValueError: If there are none.
    """
    # Swin and its kin keep tokens in `hidden_states`, Hiera in an order of its own, and maps here
    states = getattr(outputs, "reshaped_hidden_states", None) or getattr(outputs, "hidden_states", None)
    if not states:
        raise ValueError(f"expected states of its blocks, found none in its {type(outputs).__name__}")
    return states


@contextmanager
def _in_eval_mode(model: nn.Module) -> Any:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _unseen(model: nn.Module) -> Any:
    """Leaves out the hooks of those who watch the model for purposes of their own; the libraries' stay."""
    hooks = [m._forward_hooks for m in model.modules()] + [m._forward_pre_hooks for m in model.modules()]
    before = [(own, own.copy()) for own in hooks if own]
    for own, all_of_them in before:
        for key, hook in all_of_them.items():
            if not (getattr(hook, "__module__", None) or "").startswith(("transformers.", "hf_ihb.", "accelerate.")):
                del own[key]
    try:
        yield
    finally:
        for own, all_of_them in before:
            added = {key: hook for key, hook in own.items() if key not in all_of_them}
            own.clear()
            own.update({**all_of_them, **added})


@contextmanager
def _watched(model: nn.Module) -> Any:
    calls: list[Call] = []

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            while isinstance(output, tuple | list) and output:
                output = output[0]
            if isinstance(output, Tensor):
                calls.append(Call(path, module, output, [x for x in args if isinstance(x, Tensor)]))

        return hook

    handles = [module.register_forward_hook(watch(path)) for path, module in model.named_modules() if path]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


# ---- How they lie ----


def _layouts(
    states: Sequence[Tensor],
    indices: Sequence[int],
    maps: Sequence[torch.Size],
    size: tuple[int, int],
    patches: range | None,
) -> tuple[StateLayout, ...]:
    found = [states[i] for i in indices]
    lasts = [_is_channels_last(state, size) for state in found if state.ndim == 4]
    last = sum(v for v in lasts if v is not None) > sum(not v for v in lasts if v is not None)
    blocks = []
    for i, state in zip(indices, found, strict=True):
        if state.ndim == 4:
            own = _is_channels_last(state, size)
            own = last if own is None else own
            grid = tuple(state.shape[1:3] if own else state.shape[2:])
            kind, prefix, width = ("map_last" if own else "map"), 0, state.shape[3 if own else 1]
        elif state.ndim == 3:
            is_known = patches is not None and patches.stop == state.shape[1]
            count, find = (len(patches), _grid_of_patches) if is_known else (state.shape[1], _grid_of_tokens)
            grid = find(count, maps, size)
            kind, prefix, width = "tokens", state.shape[1] - grid[0] * grid[1], state.shape[2]
        else:
            raise ValueError(f"expected states of tokens or maps, found one of shape {tuple(state.shape)}")
        blocks.append(StateLayout(i, kind, prefix, (size[0] / grid[0], size[1] / grid[1]), width))
    return tuple(blocks)


def _skew(grid: Sequence[int], size: tuple[int, int]) -> float:
    """How far a grid is from the shape of the images."""
    return abs(math.log(grid[0] / grid[1]) - math.log(size[0] / size[1]))


def _is_channels_last(state: Tensor, size: tuple[int, int]) -> bool | None:
    """None where both readings are as good."""
    last, first = _skew(state.shape[1:3], size), _skew(state.shape[2:], size)
    return None if math.isclose(last, first) else last < first


def _grid_of_patches(count: int, maps: Sequence[torch.Size], size: tuple[int, int]) -> tuple[int, int]:
    """Of so many patches the map that was seen, else any grid; the one whose shape is nearest to that of the images."""
    seen = {tuple(shape[2:]) for shape in maps if shape[2] * shape[3] == count}
    grids = seen or {(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0}
    grid = min(sorted(grids), key=lambda g: _skew(g, size))
    if not seen and not _fits_shape(grid, size):
        raise ValueError(f"{count} patches form no grid of the shape of {size[0]} x {size[1]} px images")
    return grid


def _grid_of_tokens(count: int, maps: Sequence[torch.Size], size: tuple[int, int]) -> tuple[int, int]:
    """The largest map that was seen and fits into so many tokens; else the largest grid of the images' shape."""
    seen = {tuple(grid) for shape in maps for grid in (shape[2:], shape[1:3])}
    fits = [g for g in seen if count - _MOST_PREFIX_TOKENS <= g[0] * g[1] <= count and _fits_shape(g, size)]
    rows = [max(1, round(math.sqrt(n * size[0] / size[1]))) for n in range(max(1, count - 16), count + 1)]
    shaped = {(r, max(1, round(r * size[1] / size[0]))) for r in rows}
    exact = [g for g in shaped if g[0] * g[1] == count]
    candidates = exact if exact and not fits else fits or [g for g in shaped if g[0] * g[1] <= count]
    if not candidates:
        raise ValueError(f"{count} tokens do not hold a grid of patches of {size[0]} x {size[1]} px images")
    return max(candidates, key=lambda g: g[0] * g[1])


def _fits_shape(grid: Sequence[int], size: tuple[int, int]) -> bool:
    return abs(grid[0] * size[1] / size[0] - grid[1]) <= 1


# ---- The norm after the last block ----


def _norm_after(maker: int | None, width: int, calls: Sequence[Call], state: Tensor) -> Norm | None:
    """The norm of as many channels, if that comes first behind the last block; of several the one for its tokens."""
    found: list[Call] = []
    for call in calls[len(calls) if maker is None else maker + 1 :]:
        weights = dict(call.module.named_parameters(recurse=False))
        *above, own = call.path.split(".")
        is_norm = "norm" in type(call.module).__name__.lower() and not isinstance(call.module, nn.BatchNorm1d)
        is_of_a_list = any(part.isdigit() for part in above) or (own.isdigit() and not is_norm)
        if not weights or is_of_a_list or _holds(call, calls[maker]):  # CaiT and VOLO end in blocks of another kind
            continue
        if not is_norm or next(iter(weights.values())).shape != (width,) or not call.inputs:
            break
        found.append(call)
    if not found:
        return None
    # CoaT ends in one for each scale
    own = min(found, key=lambda call: abs(call.inputs[0].numel() - state.numel()))
    source = own.inputs[0]
    takes_map = source.ndim == 4 and (
        source.shape[-1] != width or isinstance(own.module, nn.GroupNorm | nn.BatchNorm2d)
        or "2d" in type(own.module).__name__
    )  # fmt: skip
    return Norm(own.path, takes_map, width)


def _holds(call: Call, other: Call) -> bool:
    return other.path.startswith(f"{call.path}.")
