"""The same static segmenters in XLA, PyTorch and ONNX Runtime: milliseconds of a picture of 180x240, one at a time.

    make bench-torch     # makes .venv-foreign from benchmarks/torch-requirements.txt, and runs
    python -m benchmarks.static_segmenters [--out benchmarks/results/static_segmenters.csv]
    [--rounds 10] [--nets efficientnet ...] [--ways xla torch_eager ...]

`efficientnet` is EfficientNet-Lite0 up to its fourth map with the U-Net head, `camvid_small` the residual U-Net of that
row; both have 11 classes and random weights, the same in all libraries: their logits are compared. From bytes to
logits, in float32, on all cores (`taskset -c 0 python -m ...`: on one). Every way has a process of its own; they run in
turn, a few pictures each. "traced" is frozen and optimised for inference, and so is "channels_last", whose maps lie as
ours; "compiled" is torch.compile, and ONNX Runtime has what PyTorch exports. On a busy machine PyTorch's threads wait
for each other, and its times on several cores say little: the table that is kept is of a quiet one, and of four ways.

convolutions_ms is the time of the net's convolutions alone, each called by itself, without what stands between them:
as dynjax has them, as XLA has them (`xla_own`, which is there for this column), and as PyTorch runs them eagerly. Times
are medians; beside each is the least, which other programs on the machine disturb least.
"""

import argparse
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import tables
from dynjax import models
from dynjax.config import UserError
from dynjax.core import convolve, views
from dynjax.models.backbones.efficientnet import EfficientNetLite0Config
from dynjax.models.blocks import gather_pixels
from dynjax.models.dense import Dense, DenseConfig, StaticConfig
from dynjax.models.heads.unet import UNetHeadConfig
from experiments import camvid_unet, cli

SIZE, CLASSES = (180, 240), 11
NETS = {
    "efficientnet": DenseConfig(EfficientNetLite0Config(levels=4), UNetHeadConfig(), StaticConfig()),
    "camvid_small": camvid_unet.SMALL.model,
}
RUN, FORGOTTEN = 10, 4
"""Pictures that one way runs in a row, and how many of them are not counted: caches are shared with the others."""
Call = Callable[[], Any]


def fresh(config: Any, seed: int = 0) -> Dense:
    """The net with NumPy's random weights, which keep features at their scale, and statistics unlike 0 and 1."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: models.build(config, CLASSES, rngs=nnx.Rngs(0))))
    random = np.random.default_rng(seed)

    def fill(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        shape = variable.get_value().shape
        if path[-1] in ("var", "scale"):
            return variable.replace(jnp.asarray(random.uniform(0.5, 1.5, shape), jnp.float32))
        deviation = np.sqrt(2 / np.prod(shape[:-1])) if path[-1] == "kernel" else 0.1
        return variable.replace(jnp.asarray(random.normal(0, deviation, shape), jnp.float32))

    return views.still(nnx.merge(graphdef, nnx.map_state(fill, state)))


def picture() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (1, *SIZE, 3), np.uint8)


def threads() -> int:
    """The cores that the process may use, of which XLA takes all by itself."""
    return len(os.sched_getaffinity(0))


def import_torch() -> Any:
    """Raises UserError."""
    try:
        import torch
    except ImportError:
        raise UserError("this compares with PyTorch, which is not installed: make bench-torch") from None
    torch.set_num_threads(threads())
    return torch


# The ways; each gives a call that runs the net once and what it gives, and the version of the library


def xla(net: Dense, image: np.ndarray) -> tuple[Call, str]:
    graphdef, state = nnx.split(net)
    program, given = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)), jnp.asarray(image)
    return lambda: np.asarray(program(state, given)), f"jax {jax.__version__}"


def torch_with(change: Callable[[Any, Any], Any]) -> Callable[[Dense, np.ndarray], tuple[Call, str]]:
    """PyTorch, the module and an example of its input changed by `change`."""

    def way(net: Dense, image: np.ndarray) -> tuple[Call, str]:
        torch = import_torch()
        from benchmarks.torch_segmenters import Net

        given = torch.from_numpy(image)
        with torch.inference_mode():
            module = change(Net(net).eval(), given)

        def call() -> np.ndarray:
            with torch.inference_mode():
                return module(given).permute(0, 2, 3, 1).numpy()

        return call, f"torch {torch.__version__}"

    return way


def traced(module: Any, given: Any) -> Any:
    torch = import_torch()
    with warnings.catch_warnings():
        # That sizes become constants, which they are.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(module, given)))


def channels_last(module: Any, given: Any) -> Any:
    return traced(module.to(memory_format=import_torch().channels_last), given)


def compiled(module: Any, given: Any) -> Any:
    return import_torch().compile(module)


def onnx(net: Dense, image: np.ndarray) -> tuple[Call, str]:
    torch = import_torch()
    import onnxruntime

    from benchmarks.torch_segmenters import Net

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        torch.onnx.export(Net(net).eval(), (torch.from_numpy(image),), path, input_names=["image"], verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    call = lambda: session.run(None, {"image": image})[0].transpose(0, 2, 3, 1)  # noqa: E731
    return call, f"onnxruntime {onnxruntime.__version__}"


# Their convolutions alone


def torch_convolutions(net: Dense, image: np.ndarray) -> tuple[Call, str]:
    torch = import_torch()
    from benchmarks.torch_segmenters import Net, convolutions

    found = convolutions(Net(net).eval(), torch.from_numpy(image))

    def call() -> None:
        with torch.inference_mode():
            for layer, x in found:
                layer(x)

    return call, f"torch {torch.__version__}"


def xla_convolutions(own: bool) -> Callable[[Dense, np.ndarray], tuple[Call, str]]:
    """Those of PyTorch's net, so that they are the same; by XLA's own convolution, or as dynjax has them."""

    def way(net: Dense, image: np.ndarray) -> tuple[Call, str]:
        torch = import_torch()
        from benchmarks.torch_segmenters import Net, convolutions

        programs = {}
        calls = []
        for layer, x in convolutions(Net(net).eval(), torch.from_numpy(image)):
            ways = (layer.stride, tuple((side, side) for side in layer.padding), layer.groups)
            kernel = jnp.asarray(layer.weight.detach().numpy().transpose(2, 3, 1, 0))
            if ways not in programs:
                programs[ways] = jax.jit(functools.partial(_convolve, own, *ways))
            calls.append((programs[ways], jnp.asarray(x.numpy().transpose(0, 2, 3, 1)), kernel))

        def call() -> None:
            for program, x, kernel in calls:
                jax.block_until_ready(program(x, kernel))

        return call, f"jax {jax.__version__}"

    return way


def _convolve(own: bool, strides: Any, padding: Any, groups: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    side = kernel.shape[0]
    if not own and groups == 1 and side == strides[0] and not any(map(any, padding)):
        # Over 1x1 or 2x2 pixels, which are linear layers in ours.
        return gather_pixels(x, side) @ kernel.reshape(-1, kernel.shape[3]) if side > 1 else x @ kernel[0, 0]
    with convolve.plain() if own else contextlib.nullcontext():
        numbers = ("NHWC", "HWIO", "NHWC")
        return convolve.convolution(x, kernel, strides, padding, None, None, numbers, groups)


WAYS = {
    "xla": xla,
    "torch_eager": torch_with(lambda module, given: module),
    "torch_traced": torch_with(traced),
    "torch_channels_last": torch_with(channels_last),
    "torch_compiled": torch_with(compiled),
    "onnxruntime": onnx,
}
ALONE = {"xla": xla_convolutions(own=False), "xla_own": xla_convolutions(own=True), "torch_eager": torch_convolutions}
"""What times convolutions_ms."""


def serve(pipe: Connection, net: str, way: str, alone: bool) -> None:
    """What runs in a process of its own: says what the net gives and the library's version, then the seconds of a run
    each time that it is asked for one."""
    call, version = (ALONE if alone else WAYS)[way](fresh(NETS[net]), picture())
    pipe.send((call(), version))
    while pipe.recv():
        seconds = []
        for _ in range(RUN):
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
        pipe.send(seconds[FORGOTTEN:])


@dataclasses.dataclass(frozen=True)
class Measured:
    """Milliseconds of a run."""

    median: float
    least: float
    """What other programs on the machine disturb least."""
    version: str


def timed(net: str, ways: list[tuple[str, bool]], rounds: int) -> dict[tuple[str, bool], Measured]:
    """Of each way, in turn.

    Raises AssertionError where logits are not those of the first way.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes, versions, logits = {}, [], {}, []
    for way, alone in ways:
        pipes[way, alone], inner = context.Pipe()
        processes.append(context.Process(target=serve, args=(inner, net, way, alone), daemon=True))
        processes[-1].start()
        inner.close()
        given, versions[way, alone] = pipes[way, alone].recv()
        if given is not None:
            logits.append(given)
            scale = float(np.abs(logits[0]).max())
            np.testing.assert_allclose(given, logits[0], rtol=0, atol=1e-4 * scale, err_msg=f"{net}, {way}")
    seconds: dict[tuple[str, bool], list[float]] = {each: [] for each in ways}
    for _ in range(rounds):
        for each, pipe in pipes.items():
            pipe.send(True)
            seconds[each] += pipe.recv()
    for pipe in pipes.values():
        pipe.send(False)
    for process in processes:
        process.join()
    milliseconds = {each: 1e3 * np.asarray(own) for each, own in seconds.items()}
    return {
        each: Measured(float(np.median(own)), float(own.min()), versions[each]) for each, own in milliseconds.items()
    }


def run(net: str, ways: list[str], rounds: int) -> list[dict]:
    whole, alone = [(way, False) for way in ways], [(way, True) for way in ALONE if way in (*ways, "xla_own")]
    found = timed(net, [*whole, *alone], rounds)
    rows = []
    for way in dict.fromkeys(way for way, _ in found):
        own, convolutions = found.get((way, False)), found.get((way, True))
        row = dict(
            net=net,
            way=way,
            ms="" if own is None else round(own.median, 2),
            least_ms="" if own is None else round(own.least, 2),
            convolutions_ms="" if convolutions is None else round(convolutions.median, 2),
            convolutions_least_ms="" if convolutions is None else round(convolutions.least, 2),
            threads=threads(),
            version=(own or convolutions).version,
            machine=tables.machine(),
        )
        rows.append(row)
        print(", ".join(f"{name} {value}" for name, value in row.items() if name != "machine"), flush=True)
    return rows


def main(raw: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/static_segmenters.csv"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    arguments = parser.parse_args(raw)
    import_torch()
    print(tables.machine(), file=sys.stderr)
    rows = []
    for net in arguments.nets:
        rows += run(net, arguments.ways, arguments.rounds)
        tables.write(arguments.out, rows)


if __name__ == "__main__":
    cli.run(main)
