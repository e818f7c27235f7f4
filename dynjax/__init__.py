"""dynjax: make any Flax model spend compute where the input needs it.

A gate decides, an executor carries the decision out, a trace accounts for it, and a budget steers it.
"""

from dynjax.core import budget, cost, execute, gates
from dynjax.core.budget import budget_loss
from dynjax.core.controls import FixedGate, GridGate, RandomGate, SampledPaths
from dynjax.core.decision import Decision
from dynjax.core.deploy import Deployed, deploy
from dynjax.core.gates import BranchGate, ChannelGate, EntropyGate, PathGate, SampleGate, TileGate
from dynjax.core.time import scan
from dynjax.core.trace import Trace, traced
from dynjax.core.wrapper import Wrapper
from dynjax.ops import (
    Cascade,
    Cell,
    Channels,
    Exits,
    Experts,
    Halt,
    MixtureOfDepths,
    PolicySkip,
    PresenceGate,
    RandomRouter,
    Router,
    Select,
    Shortlist,
    Skip,
    Slimmable,
    Supernet,
    Tiles,
    TokenGate,
    dynamize,
)

__version__ = "0.1.0"
