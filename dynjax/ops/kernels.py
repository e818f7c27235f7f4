"""Kernels of the example: convolutions whose kernel is mixed or generated for each picture. Drop-in for `nnx.Conv`.

Nothing is skipped, so their cost is the same for every input; what they attend to is recorded for the trace, at no cost
of its own. Kernels of the pixel are in `filters.py`. All take the options of `nnx.Conv`, and `random`, which draws what
they attend to at random: the control.

Letters: B examples, H W pixels, h w pixels of the output, C D channels in and out, K kernels that are mixed, V entries
of a condition.
"""

import abc
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynjax.core import convolve, geometry
from dynjax.core.decision import MIXTURE, Decision, record
from dynjax.core.geometry import Sides
from dynjax.ops.attention import Activation, Attention
from dynjax.ops.dynamize import dynamize


class ConvOptions(TypedDict, total=False):
    """Options of `nnx.Conv` that all of these have."""

    padding: geometry.Padding
    kernel_dilation: Sides
    feature_group_count: int
    use_bias: bool


class ExampleConv(nnx.Module):
    """What all of these share: the convolution in the words of `nnx.Conv`, and a bias, or several that are mixed.

    Raises:
        ValueError: for channels that do not fit the groups, or another kind of padding than SAME, VALID and pixels.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sides,
        strides: Sides,
        *,
        biases: int | None = None,
        padding: geometry.Padding = "SAME",
        kernel_dilation: Sides = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        if in_features % feature_group_count or out_features % feature_group_count:
            raise ValueError(
                f"in_features={in_features} and out_features={out_features} must be multiples of "
                f"feature_group_count={feature_group_count}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.kernel_size = geometry.pair(kernel_size, "kernel_size")
        self.strides = geometry.pair(strides, "strides")
        self.padding = geometry.pads_of(padding)
        self.kernel_dilation = geometry.pair(kernel_dilation, "kernel_dilation")
        self.feature_group_count = feature_group_count
        self.strategy: convolve.Strategy = "auto"
        bias = (out_features,) if biases is None else (biases, out_features)
        self.bias = nnx.Param(jnp.zeros(bias)) if use_bias else None

    @property
    def kernel_shape(self) -> tuple[int, int, int, int]:
        """Of the kernel of an example."""
        return *self.kernel_size, self.in_features // self.feature_group_count, self.out_features

    def _convolve(self, x: jax.Array, codes: Any, shared: Any, kernel_of: Callable) -> jax.Array:
        return convolve.generated(
            x,
            codes,
            shared,
            kernel_of,
            strides=self.strides,
            padding=self.padding,
            dilation=self.kernel_dilation,
            groups=self.feature_group_count,
            strategy=self.strategy,
        )

    def _with_bias(self, y: jax.Array) -> jax.Array:
        return y if self.bias is None else y + self.bias[...][None, None, None]

    def _record(self, weights: jax.Array) -> None:
        """Leave the attention over kernels in the trace; all kernels are used, at no cost that depends on it."""
        record(self, Decision(jnp.ones_like(weights), weights, "example", MIXTURE))


class _Mixture(ExampleConv):
    """A mixture of K kernels under attention, and of their biases if `several`: the abstract base of the three.

    Args:
        kernels: K, the number of kernels that are mixed.
        reduction: r, by which the attention's hidden layer is smaller than the input; `CondConv` has none.

    Raises:
        ValueError: for a `reduction` where there is no hidden layer.
    """

    several = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sides,
        strides: Sides = 1,
        *,
        kernels: int = 4,
        reduction: int | None = None,
        random: bool = False,
        rngs: nnx.Rngs,
        **conv: Unpack[ConvOptions],
    ):
        if kernels < 1:
            raise ValueError(f"kernels={kernels} must be at least 1")
        biases = kernels if self.several else None
        super().__init__(in_features, out_features, kernel_size, strides, biases=biases, rngs=rngs, **conv)
        # Each of K kernels starts as that of a convolution.
        init = nnx.initializers.lecun_normal(batch_axis=(0,))
        self.kernel = nnx.Param(init(rngs.params(), (kernels, *self.kernel_shape)))
        heads, hidden = self._heads(kernels, reduction)
        self.attention = Attention(in_features, heads, hidden=hidden, random=random, rngs=rngs)

    @abc.abstractmethod
    def _heads(self, kernels: int, reduction: int | None) -> tuple[list[tuple[int, Activation]], int | None]:
        """Heads of the attention, and units of its hidden layer."""

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        (weights,) = self.attention(mean_of(x))
        self._record(weights)
        weights = weights.astype(self.kernel.dtype)
        y = self._convolve(x, weights, self.kernel[...], convolve.mixture)
        return y if self.bias is None else y + (weights @ self.bias[...])[:, None, None]


class CondConv(_Mixture):
    """A convolution with a mixture of K kernels under sigmoid routing (Yang et al. 2019, arXiv:1904.04971).

    y = (a_1 W_1 + ... + a_K W_K) * x, a = sigmoid(R mean(x) + r) with the mean over the map (section 3; biases are
    mixed alike). MACs: the static convolution, the K kernels and biases once per example, and C K.
    """

    def _heads(self, kernels: int, reduction: int | None) -> tuple[list[tuple[int, Activation]], int | None]:
        if reduction is not None:
            raise ValueError(f"reduction={reduction} has no meaning for CondConv: its attention has no hidden layer")
        return [(kernels, "sigmoid")], None


class DynamicConv(_Mixture):
    """A convolution with a mixture of K kernels under softmax attention (Chen et al. 2020, arXiv:1912.03458).

    y = (sum_k p_k W_k) * x + sum_k p_k b_k, p = softmax(excite(relu(squeeze(mean(x)))) / temperature)
    (section 3). The temperature is 1; training starts at the paper's 30 (`Attention.schedule`). The attention's hidden
    layer has C / r units, where r is `reduction`, by default 4.
    MACs: the static convolution, the K kernels and biases once per example, and the attention's C C / r + K C / r.
    """

    def _heads(self, kernels: int, reduction: int | None) -> tuple[list[tuple[int, Activation]], int | None]:
        return [(kernels, "softmax")], max(self.in_features // (reduction or 4), 1)


class ODConv(_Mixture):
    """A mixture of K kernels under attention along all four axes of the kernels (Li et al. 2022, arXiv:2209.07947).

    y = (sum_k p_k s W_k * (c x)) f + b: softmax attention p over kernels, sigmoid attention s over taps, c over input
    and f over output channels, from one hidden layer (section 3). c and f scale the input and output, which is
    the same and cheaper. s, c and f are one for all K kernels, as in the authors' code. Deviations from it: no batch
    normalisation in the attention (its hidden layer has a bias instead), so that an example's kernel depends on no
    other; the temperature of `DynamicConv` divides the logits of p alone, where the authors divide those of s, c and f
    too; s is there for kernels of one tap and f for depthwise convolutions, where the authors leave them out; a bias.
    MACs: the static convolution, the K kernels once per example, and A (C + C + D + kh kw + K) of the attention, whose
    hidden layer has A = max(C / reduction, 16) units; `reduction` is 16 by default.
    """

    several = False

    def _heads(self, kernels: int, reduction: int | None) -> tuple[list[tuple[int, Activation]], int | None]:
        sizes = self.in_features, self.out_features, math.prod(self.kernel_size)
        heads: list[tuple[int, Activation]] = [*((size, "sigmoid") for size in sizes), (kernels, "softmax")]
        return heads, max(self.in_features // (reduction or 16), 16)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        attention = self.attention(mean_of(x))
        self._record(attention[3])
        inputs, outputs, taps, weights = (weight.astype(self.kernel.dtype) for weight in attention)
        y = self._convolve(x * inputs[:, None, None], (weights, taps), self.kernel[...], _tapped_mixture)
        return self._with_bias(y * outputs[:, None, None])


class HyperConv(ExampleConv):
    """A convolution whose kernel a small network generates from the input, from a condition, or from both.

    Hypernetworks (Ha et al. 2016, arXiv:1609.09106) with the kernel-generating view of dynamic filter networks (De
    Brabandere et al. 2016, arXiv:1605.09673): K(x) = W + U(z) V(z), z = relu(Z [mean(x), condition] + b), with U and V
    linear in z, of shapes (kh kw C, rank) and (rank, D). Deviation: of low rank around a learned kernel W, so that it
    is affordable; V starts at 0, so that the layer starts as the static convolution W. MACs: the static convolution,
    and per example kh kw C rank D + hidden (C + V + kh kw C rank + rank D), C standing for C / groups.

    Args:
        rank: rank of what is generated.
        hidden: length of z.
        condition: length V of another input that is given at call time, such as the embedding of a class or a text.
        from_input: whether the mean of x over the map is used; False generates from the condition alone.

    Raises:
        ValueError: for a condition that is missing or has another length, or nothing to generate from.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sides,
        strides: Sides = 1,
        *,
        rank: int = 4,
        hidden: int = 16,
        condition: int | None = None,
        from_input: bool = True,
        random: bool = False,
        rngs: nnx.Rngs,
        **conv: Unpack[ConvOptions],
    ):
        if condition is None and not from_input:
            raise ValueError("HyperConv with from_input=False needs condition=, the length of what it generates from")
        super().__init__(in_features, out_features, kernel_size, strides, rngs=rngs, **conv)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), self.kernel_shape))
        self.condition, self.from_input, self.rank = condition, from_input, rank
        features = in_features * from_input + (condition or 0)
        self.attention = Attention(features, [(hidden, "relu")], random=random, rngs=rngs)
        self.left = nnx.Linear(hidden, math.prod(self.kernel.shape[:3]) * rank, use_bias=False, rngs=rngs)
        zeros = nnx.initializers.zeros
        self.right = nnx.Linear(hidden, rank * out_features, use_bias=False, kernel_init=zeros, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B H W C"], condition: Float[Array, "B V"] | None = None
    ) -> Float[Array, "B h w D"]:
        if (condition is None) != (self.condition is None):
            given = "none is given" if condition is None else "one is given; make it with condition="
            raise ValueError(f"HyperConv was made with condition={self.condition} and {given}")
        if condition is not None and condition.shape != (x.shape[0], self.condition):
            raise ValueError(f"condition has shape {condition.shape}; it must be {(x.shape[0], self.condition)}")
        parts = [mean_of(x)] * self.from_input + ([] if condition is None else [condition])
        (code,) = self.attention(jnp.concatenate([part.astype(jnp.float32) for part in parts], 1))
        code = code.astype(self.kernel.dtype)
        factors = self.left(code).reshape(len(x), -1, self.rank), self.right(code).reshape(len(x), self.rank, -1)
        return self._with_bias(self._convolve(x, factors, self.kernel[...], _low_rank))


_MIXTURES: dict[str, type[_Mixture]] = {"condconv": CondConv, "dyconv": DynamicConv, "odconv": ODConv}
_KINDS = (*_MIXTURES, "hyper")


def with_kernels(
    model: nnx.Module,
    kinds: Mapping[str, str],
    *,
    kernels: int = 4,
    noise: float = 0.1,
    random: bool = False,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """A copy of `model` whose `nnx.Conv`s on these paths have kernels of the example, starting from the static kernel.

    All K kernels start as the static one with `noise` times its standard deviation, which sums to zero over them, and
    attention starts even: the copy gives what `model` gives, and training tells the kernels apart.

    Args:
        kinds: regular expression for a path, as in `dynamize`, to "condconv", "dyconv", "odconv" or "hyper".
        kernels: K of the mixtures.
        random: draw attention at random (the control), which does not start as `model`.

    Raises:
        ValueError: for another kind, a path of anything but a plain two-dimensional `nnx.Conv`, or a pattern that
            matches nothing.
    """
    for kind in kinds.values():
        if kind not in _KINDS:
            raise ValueError(f"kind {kind!r} must be one of {', '.join(_KINDS)}: others cannot start from a kernel")
    ways = dict(kernels=kernels, noise=noise, random=random)
    wrappers = {pattern: functools.partial(_from_static, kind=kind, **ways) for pattern, kind in kinds.items()}
    return dynamize(model, wrappers, features=lambda path, module: getattr(module, "in_features", 0), rngs=rngs)


def _from_static(conv, features, rngs, *, kind, kernels, noise, random) -> nnx.Module:
    if not isinstance(conv, nnx.Conv) or len(conv.kernel_size) != 2:
        raise ValueError(f"{type(conv).__name__} cannot be given kernels of the example: give paths of 2-D nnx.Conv")
    if conv.mask is not None or conv.input_dilation not in (None, 1, (1, 1)):
        raise ValueError("an nnx.Conv with a mask or input dilation cannot be given kernels of the example")
    options: ConvOptions = dict(
        padding=conv.padding,
        kernel_dilation=conv.kernel_dilation or 1,
        feature_group_count=conv.feature_group_count,
        use_bias=conv.use_bias,
    )
    shape = (conv.in_features, conv.out_features, conv.kernel_size, conv.strides or 1)
    static, bias = conv.kernel[...], None if conv.bias is None else conv.bias[...]
    new: _Mixture | HyperConv
    if kind == "hyper":
        new = HyperConv(*shape, random=random, rngs=rngs, **options)
        new.kernel[...] = static
    else:
        new = _MIXTURES[kind](*shape, kernels=kernels, random=random, rngs=rngs, **options)
        spread = jax.random.normal(rngs.params(), new.kernel.shape, static.dtype) * static.std()
        # Even attention is 1/2 for each sigmoid, and 1 / K for each kernel of a softmax.
        gain = {"condconv": 2 / kernels, "dyconv": 1.0, "odconv": 8.0}[kind]
        new.kernel[...] = gain * (static[None] + noise * (spread - spread.mean(0, keepdims=True)))
        if new.attention.out is not None:
            new.attention.out.kernel[...] = jnp.zeros_like(new.attention.out.kernel[...])
        if bias is not None and new.bias is not None and kind != "odconv":
            bias = jnp.broadcast_to(gain * bias, new.bias.shape)
    if bias is not None and new.bias is not None:
        new.bias[...] = bias
    return new


# Shared


def _tapped_mixture(code, kernels):
    weights, taps = code
    kernel = convolve.mixture(weights, kernels)
    return kernel * taps.reshape(*kernel.shape[:2], 1, 1)


def _low_rank(factors, kernel):
    left, right = factors
    return kernel + (left @ right).reshape(kernel.shape)


def mean_of(x: Float[Array, "B H W C"]) -> Float[Array, "B C"]:
    """Over the map, in float32."""
    return x.astype(jnp.float32).mean((1, 2))
