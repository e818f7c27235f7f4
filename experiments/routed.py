"""Paths through a supernet of scales (Dynamic Routing, Li et al. 2020, arXiv:2003.10401), and sampled paths.

python -m experiments.train digits_routed_static --workdir runs/digits_routed_static
python -m experiments.train digits_routed_gates --workdir W --init-from runs/digits_routed_static
python -m experiments.evaluate --workdir W

digits_paths_{static,gates,random} segment the digits scenes of digits_unet_*, as the paper segments streets.
"""

import dataclasses

from dynjax.config import BudgetConfig
from dynjax.models.routed import RoutedConfig
from experiments import digits_unet
from experiments.labelled import make_row, variants

SCENES = dataclasses.replace(
    digits_unet.STATIC,
    row="digits_paths_static",
    model=RoutedConfig(task="segmentation", channels=12, scales=3, layers=4, stem_stride=2),
)
GATES = dataclasses.replace(
    SCENES,
    row="digits_paths_gates",
    model=dataclasses.replace(SCENES.model, dynamics="gates"),
    optimizer=dataclasses.replace(SCENES.optimizer, gate_learning_rate=1.0),
    steps=SCENES.steps * 2 // 3,
)
RANDOM = dataclasses.replace(
    GATES, row="digits_paths_random", model=dataclasses.replace(GATES.model, gate="random"), budget=BudgetConfig()
)
_FROM = "800 steps from digits_paths_static (--init-from); a budget from [0.5, 1] is drawn at every step."
SEGMENT = (
    make_row(SCENES, "Static twin: a supernet of scales with all paths open, 96x96 digits.", "as digits_unet_static."),
    make_row(GATES, "Each picture takes its own paths through a supernet of scales, 96x96 digits.", _FROM),
    make_row(RANDOM, "Control: digits_paths_gates whose paths are open by chance.", _FROM),
)
ROWS = SEGMENT + variants(
    "routed",
    "a grid of scales and layers",
    RoutedConfig(),
    {"gates": "gates", "single": "single", "sandwich": "sandwich"},
    small=dict(channels=8, scales=2, layers=3),
    # Below, whole cells are dropped and nothing arrives; and gates need longer to find what to leave out.
    target=0.5,
    length=3.0,
)
