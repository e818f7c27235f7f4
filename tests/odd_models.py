"""Model options that do not fit, for tests and soak runs: every one is refused in one line, or builds and runs."""

import collections
import contextlib
import dataclasses
import random
import typing
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import jaxtyping
from flax import nnx

from dynjax import models
from dynjax.config import ModelConfig, UserError

NUMBERS = (0, -1, 1, 2, 3, 7, 10, 70_000, 10**9)


def bases() -> dict[str, ModelConfig]:
    """A tiny model of every family and every dynamics that a row has, and of every other gate, by a name."""
    from experiments import rows

    found = {}
    for row in rows.ROWS.values():
        model = rows.tiny(row()).model
        parts = [each for each in vars(model).values() if dataclasses.is_dataclass(each)]
        name = f"{models.describe(model)} {models.task_of(model)} {[part.family for part in parts]}"
        name += " random" * ("random" in repr(model))
        found.setdefault(name, model)
    return found


def odd(model: ModelConfig, prefix: str = "") -> Iterator[tuple[str, ModelConfig]]:
    """The model with one option changed, and what was changed."""
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        for new in _values(value, type(model), field.name):
            # Where types are checked at run time, some cannot even be made.
            with contextlib.suppress(TypeError, jaxtyping.TypeCheckError):
                yield f"{prefix}{field.name}={new}", dataclasses.replace(model, **{field.name: new})
        if dataclasses.is_dataclass(value):
            for what, inner in odd(value, f"{prefix}{field.name}."):
                yield what, dataclasses.replace(model, **{field.name: inner})


def _values(value: object, kind: type, name: str) -> tuple:
    hint = typing.get_type_hints(kind)[name]
    if typing.get_origin(hint) is typing.Literal:
        return (*typing.get_args(hint), "wrong") if name != "family" else ()
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, int):
        return NUMBERS
    if isinstance(value, float):
        return (0.0, -1.0, float("nan"), float("inf"))
    if isinstance(value, tuple):
        longer, shorter = (*value, *value[-1:]), value[:-1]
        swapped = [(*value[:-1], number) for number in NUMBERS] + [(number, *value[1:]) for number in NUMBERS]
        return ((), longer, shorter, *swapped) if value else ((), *((number,) for number in NUMBERS))
    return ()


def run(model: ModelConfig, classes: int = 3, size: tuple[int, int] = (8, 8)) -> None:
    """Build the model and run it forwards, masked and compact, without computing anything."""

    def forward(x):
        built = models.build(model, classes, rngs=nnx.Rngs(0))
        label = jnp.zeros(len(x), jnp.int32)
        given = (x, label) if getattr(built, "classes", 0) else (x,)
        if task == "variational":
            given = (x, jax.vmap(built.noise)(jax.random.split(jax.random.key(0), len(x))).latents)
        out = built(*given)
        still = {"deterministic": True, "use_running_average": True, "raise_if_not_found": False}
        compact = nnx.view(built, execution="compact", **still)
        return jax.tree.leaves((out, compact(*given)))

    task = models.task_of(model)
    if task == "autoregressive":
        shape = getattr(model, "shape", None)
        if hasattr(model, "vqvae"):
            side = 2**model.vqvae.halvings
            shape = (model.vqvae.shape[0] // side, model.vqvae.shape[1] // side, 1)
        x = jax.ShapeDtypeStruct((2, *shape), jnp.int32)
    elif task == "variational":
        x = jax.ShapeDtypeStruct((2, *model.shape), jnp.int32)
    elif task == "reconstruction":
        x = jax.ShapeDtypeStruct((2, *model.shape[:2], 3), jnp.uint8)
    else:
        x = jax.ShapeDtypeStruct((2, *size, 3), jnp.uint8)
    jax.eval_shape(forward, x)


def try_all(count: int, seed: int = 0) -> collections.Counter:
    """How many odd models were `refused`, each in one line, and how many of `count` of the others `ran`.

    AssertionError for any other end.
    """
    counts, others = collections.Counter(), []
    for name, base in bases().items():
        for what, model in odd(base):
            try:
                models.check(model)
                others.append((f"{name}, {what}", model))
            except UserError as error:
                assert str(error).startswith("--model.") and "\n" not in str(error), f"{name}, {what}: {error}"
                counts["refused"] += 1
    for what, model in random.Random(seed).sample(others, min(count, len(others))):
        try:
            run(model)
            counts["ran"] += 1
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    return counts
