"""Wrappers: small modules that put one kind of dynamics around any module."""

from dynjax.ops.depth import Exits, Skip
from dynjax.ops.depths import MixtureOfDepths, TokenGate, selection_loss
from dynjax.ops.dynamize import dynamize
from dynjax.ops.routing import Cell, Flow, Select
from dynjax.ops.spatial import Tiles
from dynjax.ops.supernet import Supernet

__all__ = [
    "Cell",
    "Exits",
    "Flow",
    "MixtureOfDepths",
    "Select",
    "Skip",
    "Supernet",
    "Tiles",
    "TokenGate",
    "dynamize",
    "selection_loss",
]
