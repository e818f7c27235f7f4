"""The commands, and the rows: configurations that reproduce a result."""

import sys

if sys.argv[:1] == ["-m"]:  # so it is while `python -m experiments.NAME` looks for its module
    from experiments import start

    start.begin()
