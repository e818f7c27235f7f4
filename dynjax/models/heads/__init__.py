"""Heads of dense prediction, one a file; see `dynjax.models.dense`."""

from dynjax.models.heads import attention, deeplab, fcn, pspnet, recursive, segnet, unet
