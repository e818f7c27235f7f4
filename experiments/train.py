"""Train a row: python -m experiments.train ROW --workdir W [any field of the row]; --list names the rows.

The same command goes on where it stopped: after Ctrl-C or SIGKILL it ends with the same parameters, bit for bit (on
CPU; on a GPU as far as XLA's operations are deterministic there). Several hosts: see dynjax/mesh.py.
"""

import dataclasses
import json
import sys
from typing import Annotated

import tyro

from dynjax.config import Config, UserError
from dynjax.models import registry
from dynjax.run import log, mesh, train
from experiments import cli, rows

COMMAND = "experiments.train"


def parse(arguments: list[str]) -> tuple[Config, str]:
    """Configuration and workdir. Raises UserError."""
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"the first argument must be a row: python -m {COMMAND} ROW --workdir W; --list names the rows")
    row = rows.get_row(arguments[0])

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        workdir: str
        """Folder of this run: checkpoints, log, configuration."""
        # The model's options are those of the row's own family, without a subcommand for each family.
        config: Annotated[registry.kind_of(row), tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands]

    parsed = cli.parse(Arguments, arguments[1:], command=f"{COMMAND} {row.row}", default=Arguments(tyro.MISSING, row))
    if parsed.config.row != row.row:
        raise UserError(f"--row cannot be changed (to {parsed.config.row}): give the row as the first argument")
    if not parsed.workdir:
        raise UserError("--workdir is empty: give a folder for this run")
    return parsed.config, parsed.workdir


def main(arguments: list[str]) -> int | None:
    if "--list" in arguments:
        for name, row in rows.ROWS.items():
            print(f"{name} - {row.__doc__.strip().splitlines()[0]}")
        return None
    if arguments in (["--help"], ["-h"]):
        print(f"{__doc__.strip()}\n\nrows: {' '.join(rows.ROWS)}\npython -m {COMMAND} ROW --help lists its fields.")
        return None
    config, workdir = parse(arguments)
    cli.use_all_cores(config.batch_size, config.optimizer.accumulate)
    mesh.initialize()
    try:
        scores = train.train(config, workdir)
    except train.Interrupted as stop:
        print(stop, file=sys.stderr)
        return cli.STOPPED
    if mesh.processes()["process_index"] == 0:
        print(json.dumps(log.finite({"row": config.row, "step": config.steps, "val": scores})))
    return None


if __name__ == "__main__":
    cli.run(main)
