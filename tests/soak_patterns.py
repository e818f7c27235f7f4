"""Random decisions of every dynamic op, carried out masked and compact: the same answer, compiled once per shape."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from blocks import at, still
from test_optimised import GIVEN, STEPS, tell

AT_ONCE = 100
"""Patterns of a round."""
ODD = (1, 7, 13), (5, 11, 6), (1, 5)
"""Further batches and sides of maps, and batch and length of tokens."""


def rounds(seed: int) -> Iterator[list[tuple[str, str | None]]]:
    """A round is one op on one shape; the next time around it has other patterns and is compiled already."""
    rng = np.random.default_rng(seed)
    cases = [case for name in GIVEN for case in _given(name)] + [case for name in STEPS for case in _steps(name)]
    while True:
        for name, run, draw in cases:
            yield [(f"patterns of {name}", _differ(*run(*draw(rng)))) for _ in range(AT_ONCE)]


def _differ(masked: jax.Array, compact: jax.Array) -> str | None:
    masked, compact = np.asarray(masked), np.asarray(compact)
    most = np.abs(masked - compact).max(initial=0)
    if masked.shape == compact.shape and most <= 1e-5 * max(np.abs(masked).max(initial=0), 1e-3):
        return None
    return f"{masked.shape} against {compact.shape}, by up to {most}"


def _draw_image(rng: np.random.Generator, shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape) * np.exp(rng.normal()), jnp.float32)


# Decisions that are given


def _shapes(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """An input's shape, and others of as many axes."""
    yield shape
    yield from ((*sides, shape[-1]) for sides in ODD if len(sides) == len(shape) - 1)


def _units(about: tuple, size: int | None, shape: tuple[int, ...], kept: tuple[int, ...]) -> tuple[int, ...]:
    """What is decided about an input of `shape`, where `kept` is decided about another."""
    if size is not None:
        return (shape[0], -(-shape[1] // size), -(-shape[2] // size), *kept[3:])
    return (*shape[:2], *kept[2:]) if about[0] == "token" else (shape[0], *kept[1:])


def _given(name: str) -> Iterator[tuple[str, Callable, Callable]]:
    """Name, compiled function of input and decision, and what draws both."""
    about, size, whole, kept, wrap = GIVEN[name]

    @jax.jit
    def run(x, keep):
        model = wrap(tell(about, size)(keep))
        return still(model)(x), still(model, "compact")(x)

    for shape in _shapes(whole):
        units = _units(about, size, shape, kept)
        yield (
            name,
            run,
            lambda rng, shape=shape, units=units: (_draw_image(rng, shape), _pattern(rng, about, units)),
        )


def _pattern(rng: np.random.Generator, about: tuple, shape: tuple[int, ...]) -> jax.Array:
    """All, none, one, or a random share of the units; of one among K, the same for all or one for each."""
    kind = rng.integers(8)
    if about[1].name == "one":
        chosen = rng.integers(shape[-1], size=shape[:-1] if kind > 1 else ())
        keep = np.eye(shape[-1])[np.broadcast_to(chosen, shape[:-1])]
    elif kind == 2:
        keep = np.zeros(shape)
        keep.reshape(-1)[rng.integers(keep.size)] = 1
    else:
        keep = np.full(shape, kind) if kind < 2 else rng.random(shape) < rng.random()
    return jnp.asarray(keep, jnp.float32)


# Decisions that follow from what was computed


def _steps(name: str) -> Iterator[tuple[str, Callable, Callable]]:
    model = STEPS[name]()

    @jax.jit
    def run(x, threshold):
        return tuple(at(threshold, still(model, execution))(x) for execution in ("masked", "compact"))

    for shape in _shapes((3, 9, 10, 4)):
        yield name, run, lambda rng, shape=shape: (_draw_image(rng, shape), jnp.float32(rng.normal() * 3))
