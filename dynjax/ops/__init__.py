"""Wrappers: small modules that put one kind of dynamics around any module."""

from dynjax.ops.cascade import Cascade
from dynjax.ops.dynamize import dynamize
from dynjax.ops.exits import Exits
from dynjax.ops.experts import Experts, RandomRouter, Router, router_z_loss
from dynjax.ops.halting import Halt
from dynjax.ops.policy import PolicySkip
from dynjax.ops.routing import Cell, Flow, Select
from dynjax.ops.shortlist import PresenceGate, Shortlist
from dynjax.ops.skip import Skip
from dynjax.ops.supernet import Supernet
from dynjax.ops.tiles import Tiles
from dynjax.ops.tokens import MixtureOfDepths, TokenGate
from dynjax.ops.width import Channels, Slimmable
