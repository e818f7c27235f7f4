"""Many classes: what is in a picture is decided first, and only the logits of these classes are computed.

Letters: B examples, C features, F outputs of a layer, K classes, n classes of a block.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dynjax.core import execute, gates, views, wrapper
from dynjax.core.decision import EACH, Decision, unseen
from dynjax.core.devices import spread_over
from dynjax.core.gates import ChannelGate, Options
from dynjax.core.training import Call
from dynjax.core.wrapper import Wrapper
from dynjax.ops.slices import WEIGHTS, Pick, narrow

ABSENT = -1e4
"""The logit of a class that is not on the shortlist: no other is as low, and losses of it are finite, in bfloat16
too."""
BLOCK = 32
"""Classes that are computed at once."""
BREAK_EVEN = 0.5
"""Share of the classes, over a batch, from which all logits are computed faster than those of the shortlists."""
SUREST = 15.0
"""Largest logit of a `PresenceGate`: float32 tells its probability from 1."""

Pixels = Callable[[Array], Array]
"""Makes of the outputs of a layer, of any number of classes, what logits there are: each class's from its own alone."""


class PresenceGate(ChannelGate):
    """Which of `classes` an example has, each by itself: logsumexp of what the tiles of `side` pixels say of it, from
    their means and maxima.

    `x`, a map (B, H, W, features), or (B, features), gives a decision of shape (B, classes). Not from the mean over the
    map, in which what is small is lost. No noise: it learns from the examples' classes (see `Shortlist`), whatever is
    kept. While it trains its probability does not depend on the threshold.
    """

    def __init__(self, features: int, classes: int, *, side: int = 8, rngs: nnx.Rngs, **options: Unpack[Options]):
        options["hidden"] = options.get("hidden", 64)
        super().__init__(2 * features, classes, rngs=rngs, **options)
        self.features, self.side = features, gates.positive(side, "side")

    def __call__(self, x: Float[Array, "B *axes C"]) -> Decision:
        gates.check_features(x, self.features, self)
        if x.ndim not in (2, 4):
            raise ValueError(f"PresenceGate needs a map (B, H, W, C) or (B, C), not {x.shape}")
        x = x[:, None, None] if x.ndim == 2 else x
        # The map is not trained through the maxima: their gradient is slow on a CPU.
        most = gates.max_tiles(lax.stop_gradient(x), self.side)
        tiles = self.logits(jnp.concatenate([gates.pool_tiles(x, self.side), most], -1))
        logits = SUREST * jnp.tanh(jax.nn.logsumexp(tiles, (1, 2)) / SUREST)
        moved = logits - self.logits.threshold[...]
        probability = jax.nn.sigmoid(moved if self.logits.deterministic else logits)
        return Decision(gates.threshold(moved), probability, "example")


class Shortlist(Wrapper):
    """The last layer of a classifier, for the classes alone that its gate puts on an example's shortlist.

    The logit of a class that is not on it is `ABSENT`. Where the gate keeps nothing, the most probable class (the first
    of equals) is kept: there always is a prediction. With all kept it is the layer. As two-stage classifiers over
    large vocabularies have it, whose first stage proposes candidates for an example. While training everything is
    kept, for a class that is in the picture must not be missing; the gate learns from the term `presence`, the binary
    cross-entropy between its probabilities and the classes that an example has, where the task says these.

    Compact execution computes blocks of the shortlist's classes one after the other ("loop"), or a capacity that holds
    the longest list ("buckets"). Logits of all K classes have to be written all the same; `largest` gives the class
    alone, and has no array of K classes.

    Args:
        layer: an `nnx.Linear` or `nnx.Conv` whose outputs are all classes, once or several times one after the other.
        gate: gives a decision of shape (B, K), for example `PresenceGate(features, K, rngs=rngs)`.
        classes: K.

    Raises:
        ValueError: if the layer is another one, or shapes do not agree.
    """

    by_hand = "it needs the number of classes: dj.Shortlist(layer, dj.PresenceGate(features, K, rngs=rngs), K)"

    def __init__(self, layer: nnx.Linear | nnx.Conv, gate: Callable, classes: int):
        if not isinstance(layer, WEIGHTS) or layer.out_features % gates.positive(classes, "classes"):
            told = f"layer of {layer.out_features} outputs" if isinstance(layer, WEIGHTS) else type(layer).__name__
            raise ValueError(f"Shortlist needs an nnx.Linear or nnx.Conv with outputs for {classes} classes, no {told}")
        self.layer, self.gate, self.classes = layer, gate, classes

    def __call__(self, x: Float[Array, "B *axes C"], pixels: Pixels | None = None) -> Float[Array, "B *after K"]:
        """Logits of all classes, `pixels(layer(x))`."""
        keep, pixels = self._decide(x), _same if pixels is None else pixels
        if self.execution == "masked":
            return _listed(pixels(self.layer(x)), keep)
        x, keep = spread_over((x, keep))
        part = functools.partial(_part, unseen(self.layer), self.classes, pixels=pixels)

        def whole() -> Array:
            return _listed(pixels(self.layer(x)), keep)

        order, number = _kept_first(keep)
        spec = jax.eval_shape(whole)
        absent = spread_over(jnp.full(spec.shape, ABSENT, spec.dtype), over=(x, keep))

        def one(b: Array, out: Array) -> Array:
            example = lax.dynamic_index_in_dim(x, b, keepdims=True)

            def block(i: Array, out: Array) -> Array:
                chosen, there = _block(order[b], i * BLOCK, number[b])
                y = part(example, chosen)[0]
                # The places beyond the kept ones point past the end: their result is written nowhere.
                return out.at[b, ..., jnp.where(there, chosen, self.classes)].set(jnp.moveaxis(y, -1, 0), mode="drop")

            return lax.fori_loop(0, -(-number[b] // BLOCK), block, out)

        def loop() -> Array:
            few = number.sum() <= BREAK_EVEN * keep.size
            return lax.cond(few, lambda: lax.fori_loop(0, x.shape[0], one, absent), whole)

        def run(capacity: int) -> Array:
            y = jax.vmap(lambda example, chosen: part(example[None], chosen)[0])(x, order[:, :capacity])
            there = jnp.arange(capacity)[None] < number[:, None]
            places = jnp.where(there, order[:, :capacity], self.classes)
            write = jax.vmap(lambda out, places, y: out.at[..., places].set(y, mode="drop"))
            return write(absent, places, y)

        def buckets() -> Array:
            return execute.smallest_bucket(number.max(), self.classes, run, whole, lambda: absent)

        return execute.by_platform(self.strategy, loop, buckets)

    def largest(self, x: Float[Array, "B *axes C"], pixels: Pixels | None = None) -> Int[Array, "*after"]:
        """The class of the largest logit, the first of equals, of blocks of classes one after the other."""
        keep, pixels = self._decide(x), _same if pixels is None else pixels
        if self.execution == "masked":
            return largest(self.layer, x, self.classes, pixels, keep > 0.5)
        x, keep = spread_over((x, keep))
        part = functools.partial(_part, unseen(self.layer), self.classes, pixels=pixels)

        def one(given: tuple[Array, Array, Array]) -> Array:
            example, order, number = given

            def block(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
                chosen, there = _block(order, i * BLOCK, number)
                return _better(best, part(example[None], chosen), chosen, there[None])

            spec = execute.shape_of(lambda x: part(x, order[:1]), example[None])
            start = spread_over(_nothing(spec), over=given)
            return lax.fori_loop(0, -(-number // BLOCK), block, start)[1][0]

        return lax.map(one, (x, *_kept_first(keep)))

    def _decide(self, x: Array) -> Float[Array, "B K"]:
        hint = f"use PresenceGate({x.shape[-1]}, {self.classes}, rngs=rngs), or FixedGate(keep, rule=EACH)"
        decision = self.expect(self.gate(x), "example", EACH, (x.shape[0], self.classes), hint)
        keep = jnp.ones_like(decision.keep)
        if self.deterministic:
            some = (decision.keep > 0.5).any(-1, keepdims=True)
            keep = jnp.where(some, decision.keep, gates.one_hot_argmax(decision.probability))
        if self.tracing:
            one = views.still(narrow(self.layer, "makes", _of_classes(jnp.zeros(1, jnp.int32), self.classes), 1))
            unit = (wrapper.macs_per_example(one, x),) * self.classes
            self.account(dataclasses.replace(decision, keep=keep), unit, unit)
        return keep

    def terms(self, call: Call) -> dict[str, Array]:
        """`presence`, of a gate that learns it."""
        present = call.present()
        if present is None or not isinstance(self.gate, PresenceGate):
            return {}
        losses = [call.mean(presence_loss(each.probability, present)) for each in call.own()]
        return {"presence": jnp.stack(losses).mean()}

    def rewarded(self) -> bool:
        """Always: `presence` says which classes are worth their compute, and a budget is met by the threshold alone."""
        return True


def presence_loss(probability: Float[Array, "B K"], present: Bool[Array, "B K"]) -> Float[Array, " B"]:
    """Binary cross-entropy, the mean over classes."""
    right = jnp.where(present, probability, 1 - probability)
    return -jnp.log(jnp.maximum(right, jnp.finfo(right.dtype).tiny)).mean(-1)


def largest(
    layer: nnx.Linear | nnx.Conv,
    x: Float[Array, "B *axes C"],
    classes: int,
    pixels: Pixels = lambda y: y,
    keep: Bool[Array, "B K"] | None = None,
) -> Int[Array, "*after"]:
    """The class of the largest of the logits `pixels(layer(x))`, of those kept: `argmax`, without an array of them."""
    keep = jnp.ones((1, classes), bool) if keep is None else keep
    part = functools.partial(_part, unseen(layer), classes, x, pixels=pixels)

    def block(start: Array, best: tuple[Array, Array], size: int) -> tuple[Array, Array]:
        chosen = start + jnp.arange(size, dtype=jnp.int32)
        return _better(best, part(chosen), chosen, lax.dynamic_slice_in_dim(keep, start, size, 1))

    blocks, rest = divmod(classes, BLOCK)
    best = spread_over(_nothing(jax.eval_shape(part, jnp.zeros(1, jnp.int32))), over=(x, keep))
    if blocks:
        best = lax.fori_loop(0, blocks, lambda i, best: block(i * BLOCK, best, BLOCK), best)
    if rest:  # by itself, so that no class is computed twice
        best = block(jnp.int32(blocks * BLOCK), best, rest)
    return best[1]


def _part(layer: nnx.Linear | nnx.Conv, classes: int, x: Array, chosen: Int[Array, " n"], pixels: Pixels) -> Array:
    """Logits of some classes."""
    copies = layer.out_features // classes
    return pixels(narrow(layer, "makes", _of_classes(chosen, classes), copies * chosen.shape[0])(x))


def _of_classes(chosen: Int[Array, " n"], classes: int) -> Pick:
    """Picks the outputs of some classes, which lie once or several times one after the other."""

    def pick(array: Array, axis: int) -> Array:
        assert axis == -1
        parts = array.reshape(*array.shape[:-1], -1, classes)
        return jnp.take(parts, chosen, axis=-1).reshape(*array.shape[:-1], -1)

    return pick


def _listed(logits: Array, keep: Float[Array, "B K"]) -> Array:
    """Logits, `ABSENT` for classes that are not kept."""
    keep = keep.reshape(keep.shape[0], *(1,) * (logits.ndim - 2), -1)
    return jnp.where(keep > 0.5, logits, jnp.asarray(ABSENT, logits.dtype))


def _kept_first(keep: Float[Array, "B K"]) -> tuple[Int[Array, "B K"], Int[Array, " B"]]:
    """Of every example all classes, the kept ones first and in their order, and how many these are."""
    kept = keep > 0.5
    return jnp.argsort(~kept, axis=1, stable=True).astype(jnp.int32), kept.sum(1, dtype=jnp.int32)


def _block(order: Int[Array, " K"], start: Array, number: Array) -> tuple[Int[Array, " n"], Bool[Array, " n"]]:
    """The classes of a block of the order, and which of its places are among the first `number`."""
    places = start + jnp.arange(min(BLOCK, order.shape[0]), dtype=jnp.int32)
    return order.at[places].get(mode="clip"), places < number


def _nothing(spec: jax.ShapeDtypeStruct) -> tuple[Array, Array]:
    """The best of no class: the value and the class."""
    return jnp.full(spec.shape[:-1], -jnp.inf, spec.dtype), jnp.zeros(spec.shape[:-1], jnp.int32)


def _better(best: tuple[Array, Array], logits: Array, chosen: Array, there: Bool[Array, "b n"]) -> tuple[Array, Array]:
    """The best of what there was and of a block of classes, whose numbers are larger."""
    logits = jnp.where(there.reshape(there.shape[0], *(1,) * (logits.ndim - 2), -1), logits, -jnp.inf)
    # Not argmax: on a CPU XLA takes one number at a time for it.
    top = logits.max(-1)
    numbers = chosen.reshape((1,) * (logits.ndim - 1) + (-1,))
    own = jnp.where(logits == top[..., None], numbers, jnp.iinfo(jnp.int32).max).min(-1)
    return jnp.maximum(best[0], top), jnp.where(top > best[0], own, best[1])


def _same(y: Array) -> Array:
    return y
