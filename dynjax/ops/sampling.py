"""Samplers of autoregressive models. All but the last are exact: same noise, same picture, whatever is computed for it,
but for what rounding does: a value near a half of one may round to another pixel in another program, and all that
follows that pixel is then another picture. `benchmarks/sampling.py` counts them.

`pixel_by_pixel` evaluates the whole model for every pixel, `cached` one pixel of every layer, and `fixed_point` draws
many pixels at once, again and again, until none changes: compute goes to where a picture surprises.

Letters: B examples, H W pixels, C channels, U units of a picture (what the family advances by: rows, or pixels),
S pixels of a unit, R units of a window.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from dynjax.core import execute

Noise = Any


@runtime_checkable
class Draws(Protocol):
    """A likelihood: draws pixels from their parameters and noise."""

    def noise(self, key: PRNGKeyArray, pixels: tuple[int, ...], /) -> Noise: ...
    def draw(self, params: Array, noise: Noise, /) -> Array: ...


@runtime_checkable
class Autoregressive(Protocol):
    """A model of every pixel given those before it, for pictures of one shape (H, W, C)."""

    shape: tuple[int, int, int]

    @property
    def likelihood(self) -> Draws: ...
    def __call__(self, x: Array, label: Array | None = None, /) -> Array: ...


@runtime_checkable
class InUnits(Autoregressive, Protocol):
    """One that advances by units, of which a cache holds what those before have left (see `PixelCNN`)."""

    window_size: int

    @property
    def units(self) -> tuple[int, int]: ...
    def start(self, examples: int, window: int = 1, /) -> Any: ...
    def window(self, x: Array, cache: Any, first: Array, label: Array | None, /) -> tuple[Array, Any]: ...
    def advance(self, cache: Any, trail: Any, count: Array, /) -> Any: ...
    def draw_unit(
        self, cache: Any, first: Array, label: Array | None, draw: Callable[[Array, Any], Array], /
    ) -> tuple[Array, Any]: ...


@runtime_checkable
class InScales(Protocol):
    """One that draws scale after scale (see `NextScale`)."""

    def draw(self, noise: Noise, label: Array | None, known: "Known | None", /) -> tuple[Array, Array, Array, Any]: ...


@runtime_checkable
class AtOnce(Protocol):
    """A model that makes a whole picture of noise at once, such as a `GAN` or a `VAE`."""

    shape: tuple[int, int, int]

    @property
    def classes(self) -> int:
        """Number of classes that pictures can be asked for by; 0: none."""

    @property
    def heights(self) -> tuple[int, ...]:
        """Of the sizes of pictures that it draws, the full size first."""

    def noise(self, key: PRNGKeyArray, /) -> Noise:
        """All that chance has to say of one picture."""

    def picture(self, noise: Noise, label: Array | None = None, /, *, size: int = 0) -> Array:
        """Pictures (B, H, W, 3) of bytes, of noise with an axis of examples, at a size of those that there are."""


class Sampled(NamedTuple):
    """Pictures, and what each took."""

    image: Int[Array, "B H W C"]
    calls: Int[Array, " B"]
    """Evaluations of the model, whole or a window or one pixel of it, for each picture."""
    visits: Int[Array, "B H W"]
    """How often each pixel was evaluated."""


class Known(NamedTuple):
    """Pixels that are given: a picture is completed."""

    image: Int[Array, "B H W C"]
    where: Bool[Array, "B H W"]


def make_noise(model: Autoregressive, key: PRNGKeyArray, examples: int, first: Int[Array, ""] | int = 0) -> Noise:
    """All that chance has to say of `examples` pictures from number `first` on, whatever batch they are drawn in."""
    keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(first + jnp.arange(examples))
    return jax.vmap(lambda key: model.likelihood.noise(key, model.shape[:2]))(keys)


def _at(tree: Any, number: Array, axis: int = 1) -> Any:
    """One place of an axis of every array, which goes."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, number, axis, keepdims=False), tree)


def _cut(tree: Any, first: Int[Array, " B"], size: int) -> Any:
    """`size` units from each example's `first` on."""
    return jax.tree.map(lambda a: jax.vmap(lambda each, k: lax.dynamic_slice_in_dim(each, k, size))(a, first), tree)


def _put(a: Array, first: Int[Array, " B"], new: Array) -> Array:
    """`a` with `new` in place of what `_cut` gives."""
    return jax.vmap(lambda each, k, n: lax.dynamic_update_slice_in_dim(each, n, k, 0))(a, first, new)


def _keep_known(drawn: Array, known: Known | None) -> Array:
    return drawn if known is None else jnp.where(known.where[..., None], known.image, drawn)


def _blank(model: Autoregressive, noise: Noise, known: Known | None) -> Array:
    examples = jax.tree.leaves(noise)[0].shape[0]
    return _keep_known(jnp.zeros((examples, *model.shape), jnp.int32), known)


def pixel_by_pixel(
    model: Autoregressive, noise: Noise, *, label: Int[Array, " B"] | None = None, known: Known | None = None
) -> Sampled:
    """The whole model for every pixel, of which that pixel alone is used: H W calls. What the others are held to."""
    height, width, _ = model.shape
    blank = _blank(model, noise, known)

    def body(k: Array, x: Array) -> Array:
        row, column = k // width, k % width
        params, own, fixed = (_at(_at(tree, row), column) for tree in (model(x, label), noise, known))
        drawn = _keep_known(model.likelihood.draw(params, own), fixed)
        return lax.dynamic_update_slice(x, drawn[:, None, None], (0, row, column, 0))

    x = lax.fori_loop(0, height * width, body, blank)
    calls = jnp.full(x.shape[0], height * width)
    return Sampled(x, calls, jnp.full(x.shape[:3], height * width))


def _in_units(model: InUnits, tree: Any) -> Any:
    """(B, H, W, ...) to (B, U, S, ...)."""
    units, size = model.units
    return jax.tree.map(lambda a: a.reshape(a.shape[0], units, size, *a.shape[3:]), tree)


def cached(
    model: InUnits, noise: Noise, *, label: Int[Array, " B"] | None = None, known: Known | None = None
) -> Sampled:
    """One pixel of every layer at a time; all that the pixels before it gave is kept. H W calls of a pixel each."""
    units, _ = model.units
    noise, given = _in_units(model, noise), None if known is None else _in_units(model, known)
    examples = jax.tree.leaves(noise)[0].shape[0]

    def body(cache: Any, number: Array) -> tuple[Any, Array]:
        own, fixed = _at(noise, number), _at(given, number)

        def draw(params: Array, place: Array) -> Array:
            return _keep_known(model.likelihood.draw(params, _at(own, place)), _at(fixed, place))

        unit, cache = model.draw_unit(cache, number, label, draw)
        return cache, unit

    _, drawn = lax.scan(body, model.start(examples), jnp.arange(units))
    x = jnp.moveaxis(drawn, 0, 1).reshape(examples, *model.shape)
    return Sampled(x, jnp.full(examples, x[0, ..., 0].size), jnp.ones(x.shape[:3], jnp.int32))


def plain_fixed_point(
    model: Autoregressive, noise: Noise, *, label: Int[Array, " B"] | None = None, known: Known | None = None
) -> Sampled:
    """Every pixel of every picture anew until none of any picture changes: what `fixed_point` is compared with."""
    blank = _blank(model, noise, known)

    def body(carry: tuple) -> tuple:
        x, _, calls = carry
        drawn = _keep_known(model.likelihood.draw(model(x, label), noise), known)
        changed = (drawn != x).any((1, 2, 3))
        return drawn, changed.any(), calls + 1

    x, _, calls = lax.while_loop(lambda carry: carry[1], body, (blank, jnp.bool_(True), jnp.int32(0)))
    return Sampled(x, jnp.full(x.shape[0], calls), jnp.full(x.shape[:3], calls))


def fixed_point(
    model: InUnits,
    noise: Noise,
    *,
    window: int | None = None,
    label: Int[Array, " B"] | None = None,
    known: Known | None = None,
    strategy: execute.Strategy = "auto",
    limit: Int[Array, ""] | int | None = None,
) -> Sampled:
    """Jacobi iteration with the noise fixed, in which compute adapts to the picture.

    Of every picture the `window` units after its frontier are drawn from what they were, at once. Units that come out
    as they were, up to the first that does not, are final: they were drawn from themselves and from what is final. The
    frontier moves past them, and what is before it is never computed again (the family's cache stands for it). Pictures
    that are done leave the batch (`execute.samples`). At least one pixel more is right after every call. Song et al.
    2021 (arXiv:2002.03629) have the iteration, without frontier and leaving.

    Args:
        window: units that are drawn at once; the family's `window_size` if left out.
        strategy: as in `execute`.
        limit: calls after which it stops, finished or not: how a picture comes to be.

    Raises:
        ValueError: if `window` is below 1.
    """
    units, size = model.units
    window = min(model.window_size if window is None else window, units)
    if window < 1:
        raise ValueError(f"window={window} must be at least 1")
    blank = _blank(model, noise, known)
    examples = blank.shape[0]
    # Windows that reach past the last unit find blank ones there.
    pad = lambda a: jnp.pad(a, ((0, 0), (0, window), *[(0, 0)] * (a.ndim - 2)))  # noqa: E731
    state = {
        "x": pad(_in_units(model, blank)),
        "noise": jax.tree.map(pad, _in_units(model, noise)),
        "cache": model.start(examples, window),
        "first": jnp.zeros(examples, jnp.int32),
        "calls": jnp.zeros(examples, jnp.int32),
        "visits": jnp.zeros((examples, units + window), jnp.int32),
    }
    if label is not None:
        state["label"] = label
    if known is not None:
        state["where"] = pad(_in_units(model, known.where))

    def step(s: dict) -> dict:
        was = _cut(s["x"], s["first"], window)
        params, trail = model.window(was, s["cache"], s["first"], s.get("label"))
        drawn = model.likelihood.draw(params, _cut(s["noise"], s["first"], window))
        if known is not None:
            drawn = jnp.where(_cut(s["where"], s["first"], window)[..., None], was, drawn)
        same = (drawn == was).all((2, 3))
        count = jnp.cumprod(same.astype(jnp.int32), 1).sum(1)
        return s | {
            "x": _put(s["x"], s["first"], drawn),
            "cache": model.advance(s["cache"], trail, count),
            "first": jnp.minimum(s["first"] + count, units),
            "calls": s["calls"] + 1,
            "visits": _put(s["visits"], s["first"], _cut(s["visits"], s["first"], window) + 1),
        }

    def body(state: dict) -> dict:
        active = (state["first"] < units).astype(jnp.float32)
        return execute.samples(step, state, active, execution="compact", strategy=strategy)

    def more(state: dict) -> Array:
        going = (state["first"] < units).any()
        return going if limit is None else going & (state["calls"].max() < limit)

    state = lax.while_loop(more, body, state)
    visits = jnp.repeat(state["visits"][:, :units], size, 1).reshape(examples, *model.shape[:2])
    return Sampled(state["x"][:, :units].reshape(examples, *model.shape), state["calls"], visits)


def coarse_to_fine(
    model: InScales, noise: Noise, *, label: Int[Array, " B"] | None = None, known: Known | None = None
) -> Sampled:
    """Of a family that draws scale after scale: coarse where plain, fine where complex, as far as the budget allows.

    The one sampler whose pictures depend on what is computed: on the threshold of the model's gates. `calls` are the
    tiles that were refined.
    """
    return Sampled(*model.draw(noise, label, known)[:3])


SAMPLERS: dict[str, Callable[..., Sampled]] = {
    "pixel": pixel_by_pixel,
    "cached": cached,
    "plain": plain_fixed_point,
    "fixed-point": fixed_point,
    "coarse-to-fine": coarse_to_fine,
}
