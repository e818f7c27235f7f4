"""Resolution-adaptive networks with exits (RANet, Yang et al. 2020, arXiv:2003.07326).

python -m experiments.train digits_ranet_exits --workdir runs/digits_ranet_exits
python -m experiments.evaluate --workdir runs/digits_ranet_exits
"""

from dynjax.models.ranet import RANetConfig
from experiments.labelled import variants

ROWS = variants(
    "ranet",
    "RANet",
    RANetConfig(),
    {"exits": "exits"},
    small=dict(scales=2, channels=8, growth=8, blocks=2, step=2, layers=3),
    from_twin=False,
)
