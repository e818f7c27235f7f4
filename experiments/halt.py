"""A block applied as often as a picture needs: ACT (Graves 2016), SACT (Figurnov et al. 2017), PonderNet (Banino et al.
2021).

python -m experiments.train digits_halt_act --workdir runs/digits_halt_act
python -m experiments.evaluate --workdir runs/digits_halt_act
"""

from dynjax.models.halting import HaltConfig
from experiments.labelled import variants

ROWS = variants(
    "halt",
    "one residual block again and again",
    HaltConfig(channels=48),
    {"act": "act", "sact": "sact", "pondernet": "pondernet"},
    small=dict(channels=24, steps=5),
    from_twin=False,
)
