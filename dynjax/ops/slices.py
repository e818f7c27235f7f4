"""Slices of layers: a pair of layers with only some of the channels in which the two meet.

`first` makes M hidden channels, `last` takes them in, and what is between acts on each channel alone, so that any of
the channels are a narrower block. Pure functions: they make modules of slices of the parameters, and change nothing.

Letters: M hidden channels, n groups of them.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Int

Pick = Callable[[jax.Array, int], jax.Array]
"""Takes the wanted hidden channels out of an axis of an array."""
Role = Literal["makes", "each", "takes", "after"]
"""What a layer has to do with the hidden channels: makes them, acts on each alone, takes them all in, comes after."""

WEIGHTS = nnx.Conv | nnx.Linear
Layer = TypeVar("Layer", bound=nnx.Module)


def layers_of(part: Callable | Sequence[Callable]) -> list[Callable]:
    """The layers of an `nnx.Sequential` or a sequence; a single layer is one."""
    if isinstance(part, nnx.Sequential):
        return list(part.layers)
    return list(part) if isinstance(part, Sequence) else [part]


def roles(first: Sequence[Callable], last: Sequence[Callable]) -> tuple[list[Role], int]:
    """The role of every layer of `first` and then `last`, and the number M of hidden channels.

    Raises:
        ValueError: where the hidden channels cannot be sliced.
    """
    if not first or not isinstance(first[0], WEIGHTS) or _groups(first[0]) != 1:
        raise ValueError("first must begin with the nnx.Conv or nnx.Linear (of one group) that makes the channels")
    takes = [(n, layer) for n, layer in enumerate(last) if isinstance(layer, WEIGHTS) and _groups(layer) == 1]
    if not takes:
        raise ValueError("last must have an nnx.Conv or nnx.Linear (of one group) that takes the hidden channels in")
    hidden = first[0].out_features
    rank = len(first[0].kernel_size) if isinstance(first[0], nnx.Conv) else 0
    number, taker = takes[0]
    between = [*first[1:], *last[:number]]
    for layer in between:
        _check_each(layer, hidden, rank)
    for layer in (first[0], taker):
        if getattr(layer, "mask", None) is not None:
            raise ValueError("a convolution with a mask cannot be sliced")
    if taker.in_features != hidden:
        raise ValueError(f"first makes {hidden} channels and last takes {taker.in_features}")
    each: list[Role] = ["each"] * len(between)
    after: list[Role] = ["after"] * (len(last) - number - 1)
    return ["makes", *each, "takes", *after], hidden


def narrow(layer: Callable, role: Role, pick: Pick, channels: int, *, bias: bool = True) -> Callable:
    """A copy of `layer` for the `channels` hidden channels that `pick` takes; slices of its parameters, no masks.

    `bias=False` leaves the bias of a layer that takes them in away, so that it can be added once to a sum of slices.
    """
    if role == "after" or not isinstance(layer, WEIGHTS | nnx.BatchNorm):
        return layer
    if isinstance(layer, nnx.BatchNorm):
        return narrow_norm(layer, pick, channels)
    copy = _sliced(layer, pick, {"kernel": -2} if role == "takes" else {"kernel": -1, "bias": -1})
    if role == "makes":
        copy.out_features = channels
    elif role == "takes":
        copy.in_features = channels
        if not bias:
            copy.bias, copy.use_bias = nnx.data(None), False
    elif isinstance(copy, nnx.Conv):  # depthwise
        copy.in_features = copy.out_features = copy.feature_group_count = channels
    if isinstance(copy, nnx.Conv):
        copy.kernel_shape = copy.kernel.shape
    return copy


def narrow_norm(norm: nnx.BatchNorm, pick: Pick, channels: int) -> nnx.BatchNorm:
    """A copy of `norm` for the `channels` channels that `pick` takes."""
    copy = _sliced(norm, pick, dict.fromkeys(("scale", "bias", "mean", "var"), -1))
    copy.num_features = channels
    return copy


def _sliced(layer: Layer, pick: Pick, axes: dict[str, int]) -> Layer:
    """A copy of `layer` with what `pick` takes of these variables, along these axes."""

    def sliced(path, variable):
        return variable.replace(pick(variable[...], axes[path[-1]])) if path[-1] in axes else variable

    graphdef, state = nnx.split(layer)
    return nnx.merge(graphdef, nnx.map_state(sliced, state))


def span(start: int, size: int) -> Pick:
    """Picks the channels from `start` on, `size` of them."""
    return lambda array, axis: lax.slice_in_dim(array, start, start + size, axis=axis)


def pick_groups(chosen: Int[Array, " n"], groups: int) -> Pick:
    """Picks the groups `chosen` of as many channels each."""

    def pick(array, axis):
        axis %= array.ndim
        head, tail = array.shape[:axis], array.shape[axis + 1 :]
        parts = jnp.take(array.reshape(*head, groups, -1, *tail), chosen, axis=axis)
        return parts.reshape(*head, -1, *tail)

    return pick


def run(layers: Iterable[Callable], x: Array) -> Array:
    """One layer after the other."""
    for layer in layers:
        x = layer(x)
    return x


def _groups(layer: nnx.Conv | nnx.Linear) -> int:
    return getattr(layer, "feature_group_count", 1)


def _check_each(layer: Callable, hidden: int, rank: int) -> None:
    """Raise ValueError for a layer that does not act on each hidden channel alone."""
    name = type(layer).__name__ if isinstance(layer, nnx.Module) else getattr(layer, "__name__", repr(layer))
    if isinstance(layer, nnx.Conv) and _groups(layer) == layer.in_features == layer.out_features:
        fits = layer.in_features == hidden and layer.mask is None
    elif isinstance(layer, nnx.BatchNorm):
        fits = layer.num_features == hidden and layer.axis == -1
    elif isinstance(layer, nnx.Module):
        fits = isinstance(layer, nnx.Dropout)
    else:
        fits = _is_channelwise(layer, rank)
    if not fits:
        raise ValueError(
            f"{name} stands between the layers that make and take {hidden} hidden channels, and does not act on each "
            "of them alone: nnx.BatchNorm, a depthwise nnx.Conv, nnx.Dropout and functions such as nnx.relu do"
        )


def _is_channelwise(fn: Callable, rank: int) -> bool:
    """Whether a function gives for some channels what it gives for them among others."""
    with jax.ensure_compile_time_eval():
        x = jnp.linspace(-2, 3, 4 ** (rank + 1)).reshape(1, *(4,) * (rank + 1))
        return bool(jnp.allclose(fn(x)[..., 1:3], fn(x[..., 1:3])))
