"""Dynamic width: hidden channels that an example does without.

Around a pair of layers, of which the first makes M hidden channels and the last takes them in: `Channels` decides about
groups of them per example; `Slimmable` runs a first share of them, one width for all examples or one for each.

Letters: B examples, C channels, M hidden channels, K groups or widths.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from dynjax.core import execute, views, wrapper
from dynjax.core.decision import EACH, ONE, unseen
from dynjax.core.devices import spread_over
from dynjax.core.wrapper import Wrapper
from dynjax.ops.slices import WEIGHTS, Pick, Role, layers_of, narrow, narrow_norm, pick_groups, roles, run, span

# Groups of channels per example


class Channels(Wrapper):
    """Hidden channels in contiguous groups, of which every example has those that the gate keeps.

    y = last(first(x) * mask), where the mask is 0 on the channels of the groups not kept: feature boosting and
    suppression (Gao et al. 2019, arXiv:1810.05331). Deviations: groups and not single channels; how many are kept
    depends on the input, and not only which; and a kept channel is not scaled by its predicted saliency. Compact
    execution slices the weights: for each example one block, as wide as what it keeps. For a residual block add the
    shortcut outside, `x + Channels(...)(x)`.

    Args:
        first: makes the hidden channels: a convolution or linear layer, then BatchNorm, depthwise convolutions and
            activations; one layer, a sequence of them, or an `nnx.Sequential`.
        last: takes them in: a convolution or linear layer; what comes after it is run on its output as it is.
        gate: gives a decision of shape (B, K), for example `ChannelGate(channels, K, rngs=rngs)`. K divides M.

    Raises:
        ValueError: if the layers' hidden channels cannot be sliced, or shapes do not agree.
    """

    by_hand = "it needs a pair of layers: dj.Channels(first, last, dj.ChannelGate(features, groups, rngs=rngs))"

    def __init__(self, first: Callable | Sequence[Callable], last: Callable | Sequence[Callable], gate: Callable):
        self.first, self.last, self.roles, self.hidden = _pair("Channels", first, last)
        self.gate = gate

    def __call__(self, x: Float[Array, "B *axes C"]) -> Float[Array, "B *after D"]:
        decision = self.gate(x)
        groups = decision.keep.shape[-1]
        hint = f"use ChannelGate({x.shape[-1]}, groups, rngs=rngs), or FixedGate(keep, rule=EACH)"
        decision = self.expect(decision, "example", EACH, (x.shape[0], groups), hint)
        if self.hidden % groups:
            raise ValueError(f"Channels: {groups} groups do not divide the {self.hidden} hidden channels")
        layers = [*self.first.layers, *self.last.layers]
        takes = self.roles.index("takes")
        if self.tracing:
            group = self._slice([views.still(layer) for layer in layers], span(0, self.hidden // groups), groups, 1)
            costs = (wrapper.macs_per_example(group, x),) * groups
            self.account(decision, costs, costs)
        for part in (self.first, self.last):
            wrapper.ready(part, self.execution)
        if self.execution == "masked":
            hidden = run(layers[:takes], x)
            mask = jnp.repeat(decision.keep, self.hidden // groups, axis=-1)
            mask = mask.reshape(mask.shape[0], *(1,) * (hidden.ndim - 2), -1)
            y = layers[takes](execute.blend(mask, hidden, jnp.zeros_like(hidden)))
        else:
            y = self._compact(layers, x, decision.keep)
            taker = layers[takes]
            if isinstance(taker, WEIGHTS) and taker.bias is not None:
                y = y + taker.bias[...].astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return run(layers[takes + 1 :], y)

    def _slice(self, layers: list[Callable], pick: Pick, groups: int, kept: int) -> Callable:
        """The pair with `kept` of the groups of channels, without the last bias."""
        pairs = zip(layers, self.roles, strict=True)
        channels = self.hidden // groups * kept
        return functools.partial(run, [narrow(la, ro, pick, channels, bias=False) for la, ro in pairs if ro != "after"])

    def _compact(self, layers, x, keep):
        kept, groups = keep > 0.5, keep.shape[1]
        whole = self._slice(layers, lambda array, axis: array, groups, groups)
        spec = execute.shape_of(whole, x)
        zeros = spread_over(jnp.zeros(spec.shape, spec.dtype), over=(x, keep))

        def loop():
            # One block as wide as what is kept for each example: measured faster than one group after the other.
            order = jnp.argsort(~kept, axis=1, stable=True)

            def some(number):
                return lambda x, order: self._slice(layers, pick_groups(order[:number], groups), groups, number)(x)

            # Not a part of `zeros`: XLA would fill all of those for every example.
            nothing = spread_over(jnp.zeros((1, *spec.shape[1:]), spec.dtype), over=zeros)
            ways = [lambda x, order: nothing, *map(some, range(1, groups)), lambda x, order: whole(x)]

            def body(i, out):
                one = lax.dynamic_index_in_dim(x, i, keepdims=True)
                y = execute.one_of(kept[i].sum(), [functools.partial(way, one, order[i]) for way in ways])
                return lax.dynamic_update_index_in_dim(out, y, i, 0)

            return lax.fori_loop(0, x.shape[0], body, zeros)

        def buckets():
            y, size = zeros, self.hidden // groups
            samples = functools.partial(execute.samples, execution="compact", strategy="buckets")
            for group in range(groups):
                part = self._slice(layers, span(group * size, size), groups, 1)
                add = lambda pair, part=part: part(pair[0]) + pair[1]  # noqa: E731
                y = samples(add, (x, y), keep[:, group], otherwise=lambda pair: pair[1])
            return y

        return execute.by_platform(self.strategy, loop, buckets)


# One of several widths


class Slimmable(Wrapper):
    """A block at one of several hidden widths, each the first channels of the next wider one.

    Without a gate all examples have one width, that of the view, `nnx.view(model, width=0.5)`: slimmable networks (Yu
    et al. 2019, arXiv:1812.08928) and universally slimmable ones (Yu & Huang 2019, arXiv:1903.05134). With a gate each
    example has its own (DS-Net, Li et al. 2021, arXiv:2103.13023), unless the view has a width; one width for all is no
    decision, and its MACs are a static part of the trace. Deviation: only hidden channels are sliced, input and output
    keep theirs, so that blocks of different widths can follow each other.

    Args:
        first, last: as in `Channels`.
        gate: gives a one-hot decision of shape (B, K), the narrowest first: `BranchGate(channels, K, rngs=rngs)`.
        widths: shares of the hidden channels, ascending to 1.
        norms: "switchable": every width has BatchNorm layers of its own (Yu et al. 2019), which start as copies; the
            widest has those of `first` and `last`. "shared": slices of one, for any width in (0, 1]; run
            the model at the width that is used in its training view, to estimate its statistics anew.

    Raises:
        ValueError: if the layers' hidden channels cannot be sliced, shapes do not agree, or a width is not there.
    """

    by_hand = (
        "it needs a pair of layers: "
        "dj.Slimmable(first, last, dj.BranchGate(features, len(widths), rngs=rngs), widths=widths)"
    )

    def __init__(
        self,
        first: Callable | Sequence[Callable],
        last: Callable | Sequence[Callable],
        gate: Callable | None = None,
        *,
        widths: Sequence[float | int] = (0.25, 0.5, 0.75, 1.0),
        norms: Literal["switchable", "shared"] = "switchable",
    ):
        if not widths or list(widths) != sorted(set(widths)) or widths[0] <= 0 or widths[-1] != 1:
            raise ValueError(f"widths={tuple(widths)} must ascend in (0, 1] and end in 1")
        if norms not in ("switchable", "shared"):
            raise ValueError(f"norms={norms!r} must be 'switchable' or 'shared'")
        self.first, self.last, self.roles, self.hidden = _pair("Slimmable", first, last)
        self.gate, self.widths = gate, tuple(widths)
        layers = [*self.first.layers, *self.last.layers]
        found = [(la, ro) for la, ro in zip(layers, self.roles, strict=True) if isinstance(la, nnx.BatchNorm)]
        self.switched = norms == "switchable" and bool(found)
        self.norms = nnx.List(
            [nnx.List([_own(la, ro, self.channels(w)) for la, ro in found]) for w in widths[:-1] if self.switched]
        )
        self.width: float | int | None = None

    def set_view(
        self,
        execution: str | None = None,
        strategy: str | None = None,
        deterministic: bool | None = None,
        use_running_average: bool | None = None,
        width: float | int | None = None,
    ) -> None:
        super().set_view(execution, strategy, deterministic)
        if width is not None:
            self._check_width(width)
            self.width = width

    def channels(self, width: float | int) -> int:
        """Hidden channels of a width."""
        return max(1, round(width * self.hidden))

    def _check_width(self, width: float | int) -> None:
        if not 0 < width <= 1:
            raise ValueError(f"width={width} must be in (0, 1]")
        if self.switched and width not in self.widths:
            raise ValueError(f"width={width} has no BatchNorm: widths={self.widths}, or norms='shared' for any")

    def at(self, width: float | int) -> Callable[[Array], Array]:
        """The block at one width, in (0, 1]; it shares the parameters."""
        self._check_width(width)
        own: Iterator[nnx.BatchNorm] = iter(())
        if self.switched and width != 1:
            own = iter(self.norms[self.widths.index(width)])
        channels = self.channels(width)
        layers: list[Callable] = []
        for layer, role in zip([*self.first.layers, *self.last.layers], self.roles, strict=True):
            if width == 1:
                layers.append(layer)
            elif not isinstance(layer, nnx.BatchNorm):
                layers.append(narrow(layer, role, span(0, channels), channels))
            elif self.switched:
                layers.append(next(own))
            else:
                layers.append(functools.partial(_shared_norm, layer, channels) if role == "each" else layer)
        return functools.partial(run, layers)

    def __call__(self, x: Float[Array, "B *axes C"]) -> Float[Array, "B *after D"]:
        for part in (self.first, self.last, *(norm for norms in self.norms for norm in norms)):
            wrapper.ready(part, self.execution)
        if self.gate is None or self.width is not None:
            return self.at(self.width or 1.0)(x)
        shape = (x.shape[0], len(self.widths))
        hint = f"use BranchGate({x.shape[-1]}, {len(self.widths)}, rngs=rngs)"
        decision = self.expect(self.gate(x), "example", ONE, shape, hint)
        if self.tracing:
            still = views.still(self)
            costs = tuple(wrapper.macs_per_example(still.at(width), x) for width in self.widths)
            self.account(decision, costs, costs)
        # What comes after the pair may leave something in a trace, but not out of a loop.
        view = unseen(self) if self.execution == "compact" else self
        blocks = [view.at(width) for width in self.widths]
        return execute.branches(blocks, x, decision.keep, execution=self.execution, strategy=self.strategy)


def _pair(name: str, first: Any, last: Any) -> tuple[nnx.Sequential, nnx.Sequential, tuple[Role, ...], int]:
    """Both parts, their layers' roles and the number of hidden channels; errors name the wrapper."""
    parts = nnx.Sequential(*layers_of(first)), nnx.Sequential(*layers_of(last))
    for part in parts:
        wrapper.refuse_nested(name, part)
    try:
        found, hidden = roles(*(list(part.layers) for part in parts))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return *parts, tuple(found), hidden


def _own(norm: nnx.BatchNorm, role: Role, channels: int) -> nnx.BatchNorm:
    """A BatchNorm for some of the channels (all that come `after`), which starts as a copy and shares nothing."""
    channels = channels if role == "each" else norm.num_features
    return narrow_norm(norm, lambda array, axis: jnp.array(span(0, channels)(array, axis)), channels)


def _shared_norm(norm: nnx.BatchNorm, channels: int, x: Array) -> Array:
    """The first channels of `norm`, whose statistics it updates if it trains."""
    part = narrow_norm(norm, span(0, channels), channels)
    y = part(x)
    if not norm.use_running_average:
        for ours, new in ((norm.mean, part.mean), (norm.var, part.var)):
            ours[...] = ours[...].at[:channels].set(new[...])
    return y
