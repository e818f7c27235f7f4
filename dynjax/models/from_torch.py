"""Weights of PyTorch's layers into those of nnx, by the names of a state dict."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Shaped

from dynjax.config import UserError
from dynjax.models.frozen import FrozenNorm

Tensors = Mapping[str, Shaped[np.ndarray, "..."]]
SHOWN = 4
"""Names that an error gives; of the rest it gives the number."""


def blank(key: Any, shape: Sequence[int], dtype: Any = np.float32, out_sharding: Any = None) -> Any:
    """An initializer for what is filled at once: drawing so many numbers, or tracing how, takes seconds."""
    return np.zeros(shape, dtype)


def fill(layers: Mapping[str, nnx.Module], tensors: Tensors, where: object, others: tuple[str, ...] = ()) -> None:
    """Put the tensors `NAME.weight`, `NAME.bias`, ... into the layer of each name: `nnx.Conv`, `nnx.Linear` (also of a
    1x1 convolution) or `nnx.BatchNorm`.

    Counters of batches, and tensors whose names begin with one of `others`, are for nobody. Raises UserError, beginning
    with `where`, that names all that is missing, is left over, or has another shape.
    """
    wanted = {f"{name}.{part}": variable for name, layer in layers.items() for part, variable in _parts(layer).items()}
    found = {name: _turned(tensor, wanted[name].ndim) for name, tensor in tensors.items() if name in wanted}
    left = [name for name in tensors if name not in wanted and not name.endswith("num_batches_tracked")]
    wrong = [
        f"{name} {'x'.join(map(str, tensors[name].shape))} where {'x'.join(map(str, wanted[name].shape))} fits, turned"
        for name, tensor in found.items()
        if tensor.shape != wanted[name].shape
    ]
    problems = {
        "missing": [name for name in wanted if name not in found],
        "not of this network": [name for name in left if not name.startswith(others)],
        "of another shape": wrong,
    }
    if said := [f"{what}: {_shown(names)}" for what, names in problems.items() if names]:
        raise UserError(f"{where}: not the weights of this network; {'; '.join(said)}")
    for name, tensor in found.items():
        wanted[name].set_value(jnp.asarray(tensor, wanted[name].dtype))


def _parts(layer: nnx.Module) -> dict[str, nnx.Variable]:
    """The variables of a layer by PyTorch's names."""
    if isinstance(layer, nnx.BatchNorm | FrozenNorm):
        found = {"weight": layer.scale, "bias": layer.bias, "running_mean": layer.mean, "running_var": layer.var}
    else:
        assert isinstance(layer, nnx.Conv | nnx.Linear)
        found = {"weight": layer.kernel, "bias": layer.bias}
    return {name: variable for name, variable in found.items() if variable is not None}


def _turned(tensor: np.ndarray, axes: int) -> np.ndarray:
    """(D, I, kh, kw) as (kh, kw, I, D), and (D, I) or (D, I, 1, 1) as (I, D)."""
    if tensor.ndim == 4 and axes == 2 and tensor.shape[2:] == (1, 1):
        tensor = tensor[:, :, 0, 0]
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T if tensor.ndim == 2 else tensor


def _shown(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
