"""Layers that do not learn: what was trained before stays as it is."""

from typing import TypeVar

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from dynjax.core import modules

Model = TypeVar("Model", bound=nnx.Module)


class Frozen(nnx.Variable):
    """What was a parameter and is not trained any more."""


TRAINED = nnx.Any(nnx.Param, nnx.BatchStat, Frozen)
"""What a trained model has that another one of its kind begins with."""


class FrozenNorm(nnx.Module):
    """A batch normalisation by running averages, in training too, which stay."""

    def __init__(self, norm: nnx.BatchNorm):
        self.epsilon = norm.epsilon
        self.mean, self.var = Frozen(norm.mean[...]), Frozen(norm.var[...])
        self.scale = None if norm.scale is None else Frozen(norm.scale[...])
        self.bias = None if norm.bias is None else Frozen(norm.bias[...])

    def __call__(self, x: Float[Array, "*pixels C"]) -> Float[Array, "*pixels C"]:
        factor = lax.rsqrt(self.var[...] + self.epsilon)
        factor = factor if self.scale is None else factor * self.scale[...]
        shift = -self.mean[...] * factor
        shift = shift if self.bias is None else shift + self.bias[...]
        axes = tuple(range(x.ndim - 1))
        return (x * jnp.expand_dims(factor, axes) + jnp.expand_dims(shift, axes)).astype(x.dtype)


def freeze(model: Model) -> Model:
    """`model` itself, its parameters being none any more."""
    for _, module in list(nnx.iter_modules(model)):
        for name, value in list(vars(module).items()):
            if isinstance(value, nnx.Param):
                setattr(module, name, Frozen(value[...]))
    return model


def freeze_whole(model: Model) -> Model:
    """`model` itself, without parameters and with the statistics that its batch normalisations have."""
    norms = {id(each): FrozenNorm(each) for _, each in nnx.iter_modules(model) if isinstance(each, nnx.BatchNorm)}
    modules.replace(model, norms)
    return freeze(model)
