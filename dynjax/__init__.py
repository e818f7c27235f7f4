"""dynjax: make any Flax model spend compute where the input needs it.

A gate decides, an executor carries the decision out, a trace accounts for it, and a budget steers it.
"""

from dynjax import budget, cost, execute
from dynjax.budget import budget_loss
from dynjax.controls import FixedGate, GridGate, RandomGate, SampledPaths
from dynjax.decision import Decision
from dynjax.deploy import Deployed, deploy
from dynjax.gates import BranchGate, ChannelGate, EntropyGate, PathGate, SampleGate, TileGate
from dynjax.ops import (
    Cell,
    Channels,
    Exits,
    Experts,
    Halt,
    MixtureOfDepths,
    PolicySkip,
    RandomRouter,
    Router,
    Select,
    Skip,
    Slimmable,
    Supernet,
    Tiles,
    TokenGate,
    dynamize,
)
from dynjax.trace import Trace, traced

__version__ = "0.1.0"
