"""Paths through a supernet of scales (Dynamic Routing, Li et al. 2020, arXiv:2003.10401), and sampled paths.

python -m experiments.train digits_routed_static --workdir runs/digits_routed_static
python -m experiments.train digits_routed_gates --workdir W --init-from runs/digits_routed_static
python -m experiments.evaluate --workdir W
"""

from dynjax.models.routed import RoutedConfig
from experiments.labelled import variants

ROWS = variants(
    "routed",
    "a grid of scales and layers",
    RoutedConfig(),
    {"gates": "gates", "single": "single", "sandwich": "sandwich"},
    small=dict(channels=8, scales=2, layers=3),
    # Below, whole cells are dropped and nothing arrives; and gates need longer to find what to leave out.
    target=0.5,
    length=3.0,
)
