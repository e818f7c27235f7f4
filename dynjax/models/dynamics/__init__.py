"""Dynamics of dense prediction, one a file; see `dynjax.models.dense`."""

from dynjax.models.dynamics import (
    exits,
    experts,
    halt,
    kernels,
    levels,
    recursion,
    scales,
    select,
    shortlist,
    skip,
    tiles,
)
