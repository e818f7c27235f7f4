"""Backbones of dense prediction, one a file; see `dynjax.models.dense`."""

from dynjax.models.backbones import efficientnet, mobilenet, residual, resnet
