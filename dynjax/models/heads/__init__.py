"""Heads of dense prediction, one a file; see `dynjax.models.dense`."""

from dynjax.models.heads import unet
