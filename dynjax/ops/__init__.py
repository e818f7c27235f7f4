"""Wrappers: small modules that put one kind of dynamics around any module."""

from dynjax.ops.depth import Exits, Skip
from dynjax.ops.dynamize import dynamize
from dynjax.ops.routing import Select
from dynjax.ops.spatial import Tiles

__all__ = ["Exits", "Select", "Skip", "Tiles", "dynamize"]
