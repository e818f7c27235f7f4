"""Mixtures of experts over the patches of a picture (Shazeer et al. 2017; Switch, Fedus et al. 2022).

python -m experiments.train digits_moe_static --workdir runs/digits_moe_static
python -m experiments.train digits_moe_experts --workdir W
python -m experiments.evaluate --workdir W --twin runs/digits_moe_static
"""

from dynjax.models.moe import MoEConfig
from experiments.labelled import variants

ROWS = variants(
    "moe",
    "a small vision transformer with experts",
    MoEConfig(),
    {"experts": "experts"},
    small=dict(width=32, depth=2, hidden=32, experts=4),
    from_twin=False,
    loss=dict(load_balance=0.01, router_z=0.001),
)
