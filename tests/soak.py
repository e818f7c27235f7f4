"""How reliable dynjax is, in counts: python tests/soak.py [--minutes 10] [--seed 0] [--only runs files patterns]

Training is killed and stopped at random moments and resumed, files of every kind are damaged and read, random decisions
are carried out masked and compact. The table says how much was tried of each and how much fell short: 0 is wanted, and
the exit status is 1 otherwise. Ctrl-C ends it with what it has. Written to benchmarks/results/soak.csv.
"""

import collections
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import soak_files  # noqa: E402
import soak_patterns  # noqa: E402
import soak_runs  # noqa: E402

from benchmarks import tables  # noqa: E402
from dynjax.config import UserError  # noqa: E402
from experiments import cli, evaluate  # noqa: E402

Outcome = tuple[str, str | None]
"""What was tried, and how it fell short (None: it did not)."""
Part = Callable[[int], Iterator[list[Outcome]]]
"""Goes on without end, one round at a time, by a seed."""

PARTS: dict[str, tuple[Part, float]] = {
    "runs": (soak_runs.rounds, 0.6),
    "files": (soak_files.rounds, 0.2),
    "patterns": (soak_patterns.rounds, 0.2),
}
"""Each with its share of the time."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    minutes: float = 10.0
    """Time in all. Every part ends the round that it is in, and has at least one."""
    seed: int = 0
    out: str = str(ROOT / "benchmarks" / "results" / "soak.csv")
    only: tuple[Literal["runs", "files", "patterns"], ...] = ("runs", "files", "patterns")


@dataclasses.dataclass
class Count:
    tried: int = 0
    fell_short: int = 0


def run(arguments: Arguments) -> dict[str, Count]:
    """Counts by kind; what fell short is said on stderr as it happens. Ctrl-C ends it early."""
    from tqdm.auto import tqdm

    counts: dict[str, Count] = collections.defaultdict(Count)
    bar = tqdm(unit=" tried", mininterval=0.5 if sys.stderr.isatty() else 30.0)
    whole = sum(PARTS[name][1] for name in arguments.only)
    try:
        for name in arguments.only:
            part, share = PARTS[name]
            bar.set_description(name)
            end = time.monotonic() + 60 * arguments.minutes * share / whole
            rounds = part(arguments.seed)
            try:
                for outcomes in rounds:
                    for kind, short in outcomes:
                        counts[kind].tried += 1
                        counts[kind].fell_short += short is not None
                        if short is not None:
                            bar.write(f"{kind}: {short}", file=sys.stderr)
                    bar.update(len(outcomes))
                    if time.monotonic() > end:
                        break
            finally:
                rounds.close()
    except KeyboardInterrupt:
        bar.write("stopped: what was tried so far", file=sys.stderr)
    finally:
        bar.close()
    return counts


def table(counts: dict[str, Count]) -> str:
    width = max(map(len, counts), default=0)
    lines = [f"{'':{width}}  tried  fell short"]
    lines += [f"{kind:{width}}  {count.tried:5}  {count.fell_short:10}" for kind, count in counts.items()]
    tried, short = (sum(getattr(count, name) for count in counts.values()) for name in ("tried", "fell_short"))
    return "\n".join([*lines, f"{'all':{width}}  {tried:5}  {short:10}"])


def main(raw: list[str]) -> int:
    arguments = cli.parse(Arguments, raw, command="tests.soak")
    if arguments.minutes <= 0 or not arguments.only or arguments.seed < 0:
        raise UserError("--minutes must be above 0, --seed at least 0, and --only name a part")
    started = time.monotonic()
    counts = run(arguments)
    print(table(counts))
    if counts:
        same = {"minutes": f"{(time.monotonic() - started) / 60:.1f}", "seed": arguments.seed}
        same |= {"hardware": tables.machine(), "commit": evaluate.commit()}
        tables.write(Path(arguments.out), [{"kind": k, **dataclasses.asdict(c), **same} for k, c in counts.items()])
    return int(any(count.fell_short for count in counts.values()))


if __name__ == "__main__":
    cli.run(main)
