"""A training step on CPUs, with what it frees kept for the next (`experiments.memory`) and given back to the system.

    python -m benchmarks.memory [--out benchmarks/results/memory.csv] [--rounds 4] [--rows camvid_small_static ...]

Each way has a process of its own; they run in turn, a few steps of a row on random pictures each. Times are medians;
pages are those that the system had to give during a step (minor page faults). Only where there is glibc.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path

from experiments import memory

# All else is imported where it is used: what this module imports each process imports first, and there must be one
# thread when memory is kept.
ROWS = ("camvid_small_static", "camvid_lite0_static")
STEPS = 3


def _serve(row: str, kept: bool, pipe: Connection) -> None:
    """Each time that it is asked for them: a few steps, answered by the milliseconds and pages of each."""
    if kept:
        memory.keep()
    from benchmarks.training import stepper
    from experiments import cli, rows

    cli.use_compilation_cache()
    step = stepper(rows.get_row(row))
    step().block_until_ready()
    while pipe.recv():
        found = []
        for _ in range(STEPS):
            begun, faults = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            step().block_until_ready()
            pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
            found.append(((time.perf_counter() - begun) * 1e3, pages))
        pipe.send(found)


def compare(row: str, rounds: int) -> dict[str, float | str]:
    """The table's line of a row."""
    context = multiprocessing.get_context("spawn")
    found: dict[bool, list[tuple[float, int]]] = {False: [], True: []}
    pipes = {}
    for kept in found:
        pipes[kept], theirs = context.Pipe()
        context.Process(target=_serve, args=(row, kept, theirs), daemon=True).start()
        theirs.close()
    for _ in range(rounds):
        for kept, pipe in pipes.items():
            pipe.send(True)
            found[kept] += pipe.recv()
    for pipe in pipes.values():
        pipe.send(False)
    (before, pages), (after, pages_kept) = (
        [statistics.median(column) for column in zip(*found[kept], strict=True)] for kept in (False, True)
    )
    return dict(
        row=row,
        given_back_ms=round(before, 1),
        kept_ms=round(after, 1),
        ratio=round(before / after, 3),
        given_back_pages=round(pages),
        kept_pages=round(pages_kept),
    )


def main(arguments: list[str]) -> None:
    from benchmarks import tables
    from dynjax.config import UserError

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory.csv"))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    given = parser.parse_args(arguments)
    if not memory.is_glibc():
        raise UserError("memory is kept with glibc's malloc, which this system has not")
    found = []
    for row in given.rows:
        found.append(compare(row, given.rounds))
        print(", ".join(f"{name} {value}" for name, value in found[-1].items()), flush=True)
    tables.write(given.out, found)


if __name__ == "__main__":
    from experiments import cli

    cli.run(main)
