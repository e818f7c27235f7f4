"""Our MSDNet at a budget beside one in PyTorch, which runs all of its exits: pictures per second, alternating.

    pip install torch
    python -m benchmarks.pytorch_msdnet [--workdir runs/cifar10_msdnet7_exits] [--data.path data/cifar10] [--repeats 30]

Needs a trained row: python -m experiments.train cifar10_msdnet7_exits --workdir W --data.path data/cifar10
The net of the paper's public configuration for CIFAR-10 (7 blocks, base 4, even steps of 2, 16 channels, growth 6:
2.99 M parameters), written here in PyTorch with fresh weights: that nothing is skipped does not depend on them. Ours
has trained weights and thresholds solved on val, and runs on pictures of test. Writes the table as CSV.
"""

import argparse
import dataclasses
import itertools
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynjax.config import UserError
from experiments import cli

SCALES = (1, 2, 4)
"""Channels of a scale, as multiples of the finest one's; and how wide its bottleneck may be."""

ROW = "cifar10_msdnet7_exits"
EVERYTHING = math.inf
"""The budget at which all exits are run for every picture, as PyTorch does."""
RUN, FORGOTTEN = 10, 4
"""Batches that one library runs in a row, and how many of them are not counted: the other's threads wait busily for a
while, and the caches are its own."""


def build(blocks: int = 7, base: int = 4, step: int = 2, channels: int = 16, growth: int = 6) -> Any:
    """The net as a torch module: pictures (B, 3, 32, 32) to the logits (B, 10) of every exit."""
    import torch
    from torch import nn

    def convolution(before: int, after: int, kernel: int = 3, stride: int = 1) -> nn.Module:
        layer = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(after), nn.ReLU(inplace=True))

    def bottleneck(before: int, after: int, width: int, stride: int) -> nn.Module:
        inner = min(before, width * after)
        return nn.Sequential(convolution(before, inner, 1), convolution(inner, after, 3, stride))

    class Layer(nn.Module):
        """New features at every scale, from that scale and from the next finer one, beside what was there."""

        def __init__(self, before: int, scales_before: int, scales: int):
            super().__init__()
            first = len(SCALES) - scales
            self.dropped = scales_before - scales
            self.same, self.down = nn.ModuleList(), nn.ModuleList()
            for scale in range(first, len(SCALES)):
                both = scale > first or self.dropped > 0
                width = growth * SCALES[scale] // (2 if both else 1)
                self.same.append(bottleneck(before * SCALES[scale], width, SCALES[scale], 1))
                finer = bottleneck(before * SCALES[scale - 1], width, SCALES[scale - 1], 2) if both else nn.Identity()
                self.down.append(finer)

        def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
            new = []
            for place, x in enumerate(features[self.dropped :]):
                parts = [x, self.same[place](x)]
                if place + self.dropped > 0:
                    parts.insert(1, self.down[place](features[place + self.dropped - 1]))
                new.append(torch.cat(parts, 1))
            return new

    class Each(nn.Module):
        """A module for every scale."""

        def __init__(self, parts: list[nn.Module]):
            super().__init__()
            self.parts = nn.ModuleList(parts)

        def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
            return [part(x) for part, x in zip(self.parts, features, strict=True)]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = [channels * scale for scale in SCALES]
            self.enter = nn.ModuleList([convolution(3, widths[0])])
            self.enter.extend(convolution(a, b, 3, 2) for a, b in itertools.pairwise(widths))
            self.stages, self.exits = nn.ModuleList(), nn.ModuleList()
            width, number, scales_before = channels, 0, len(SCALES)
            depth = base + step * (blocks - 1)
            # The finest scale is dropped after every third of the layers, where features are halved too.
            interval = math.ceil(depth / len(SCALES))
            for block in range(blocks):
                layers: list[nn.Module] = []
                for _ in range(base if block == 0 else step):
                    scales = len(SCALES) - number // interval
                    layers.append(Layer(width, scales_before, scales))
                    width, number = width + growth, number + 1
                    if scales < scales_before:
                        kept = SCALES[len(SCALES) - scales :]
                        layers.append(Each([convolution(width * s, width // 2 * s, 1) for s in kept]))
                        width //= 2
                    scales_before = scales
                self.stages.append(nn.Sequential(*layers))
                coarsest = width * SCALES[-1]
                head = [convolution(coarsest, 128, 3, 2), convolution(128, 128, 3, 2), nn.AvgPool2d(2)]
                self.exits.append(nn.Sequential(*head, nn.Flatten(), nn.Linear(128, 10)))

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            features = []
            for part in self.enter:
                x = part(x)
                features.append(x)
            logits = []
            for stage, head in zip(self.stages, self.exits, strict=True):
                features = stage(features)
                logits.append(head(features[-1]))
            return logits

    return Net().eval()


def parameters(model: Any) -> float:
    """Millions of them, of a torch module."""
    return sum(each.numel() for each in model.parameters()) / 1e6


def import_torch() -> Any:
    """Raises UserError."""
    try:
        import torch
    except ImportError:
        raise UserError(
            "this compares with PyTorch, which is not installed and not among the requirements: pip install torch"
        ) from None
    torch.set_num_threads(os.cpu_count() or 1)
    return torch


def main(raw: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", default="runs/cifar10_msdnet7_exits")
    parser.add_argument("--data.path", dest="path", default="")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pytorch_msdnet.csv"))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args(raw)
    torch = import_torch()

    import jax
    import numpy as np
    from flax import nnx

    from benchmarks import tables
    from dynjax import models
    from dynjax.core import views
    from dynjax.data import calibration_batches, make_source
    from dynjax.data.source import size_of
    from dynjax.run import checkpoint
    from dynjax.run.evaluate import solve, static_macs

    config, model, step = tables.trained(arguments.workdir, ROW, "data/cifar10", arguments.path)
    if config.model.family != "msdnet":
        raise UserError(f"--workdir {arguments.workdir}: row {config.row} is no MSDNet; cifar10_msdnet7_exits is meant")
    val, test = (make_source(config.data, split) for split in ("val", "test"))
    # As everywhere, a budget is a share of the MACs of the same net with its last exit alone.
    twin = checkpoint.build(dataclasses.replace(config, model=models.static_twin(config.model)), len(val.classes))
    whole = static_macs(views.still(twin), jax.ShapeDtypeStruct((1, *size_of(val), 3), np.uint8))
    calibration = [batch["image"] for batch in calibration_batches(val, 50, 20)]
    deployed = solve(model, whole, [*arguments.budgets, EVERYTHING], calibration)
    reference = build()
    ours = sum(each.size for each in jax.tree.leaves(nnx.state(model, nnx.Param))) / 1e6
    theirs = parameters(reference)
    print(
        f"{tables.machine()}; jax {jax.__version__}, torch {torch.__version__}; {config.row}, step {step}; "
        f"M parameters: dynjax {ours:.2f}, PyTorch {theirs:.2f}",
        file=sys.stderr,
    )
    graphdef, _ = nnx.split(next(iter(deployed.values())).model)
    program = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    states = {budget: nnx.state(each.model) for budget, each in deployed.items()}
    macs = {budget: each.report.mean for budget, each in deployed.items()}

    def pytorch(images: Any) -> None:
        with torch.inference_mode():
            reference(images)

    def dynjax(budget: float) -> Callable[[Any], None]:
        return lambda images: jax.block_until_ready(program(states[budget], images))

    rows = []
    for batch in arguments.batches:
        places = np.arange(batch * RUN) * len(test) // (batch * RUN)
        pictures = np.stack([test[int(place)]["image"] for place in places]).reshape(RUN, batch, 32, 32, 3)
        scaled = torch.from_numpy(pictures.transpose(0, 1, 4, 2, 3) / np.float32(255)).contiguous()
        ways: dict[tuple[str, Any], tuple[Callable, Any]] = {("PyTorch", EVERYTHING): (pytorch, scaled)}
        ways |= {("dynjax", budget): (dynjax(budget), jax.numpy.asarray(pictures)) for budget in deployed}
        seconds: dict[tuple[str, Any], list[float]] = {way: [] for way in ways}
        for number in range(-1, arguments.repeats):  # the first compiles
            for way, (run, inputs) in ways.items():
                for place in range(RUN):
                    images = inputs[place]
                    began = time.perf_counter()
                    run(images)
                    if number >= 0 and place >= FORGOTTEN:
                        seconds[way].append(time.perf_counter() - began)
        for (name, budget), each in seconds.items():
            middle = float(np.median(each))
            rows.append(
                dict(
                    implementation=name,
                    budget="all exits" if budget == EVERYTHING else budget,
                    batch=batch,
                    million_macs=round(macs[budget] / 1e6, 1),
                    ms_per_picture=round(1e3 * middle / batch, 3),
                    pictures_per_second=round(batch / middle),
                    million_parameters=round(theirs if name == "PyTorch" else ours, 2),
                )
            )
            at = "all exits" if budget == EVERYTHING else f"budget {budget:g}"
            print(f"batch {batch:3}  {name:8} {at:12} {batch / middle:8.0f} pictures/s", flush=True)
    tables.write(arguments.out, rows)


if __name__ == "__main__":
    cli.run(main)
