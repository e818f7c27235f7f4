"""Dynamics of dense prediction, one a file; see `dynjax.models.dense`."""

from dynjax.models.dynamics import experts, halt, recursion, select, shortlist, skip, tiles
