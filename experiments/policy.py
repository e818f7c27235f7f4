"""One policy network for all blocks of a ResNet (BlockDrop, Wu et al. 2018, arXiv:1711.08393).

python -m experiments.train digits_policy_static --workdir runs/digits_policy_static
python -m experiments.train digits_policy_gumbel --workdir W --init-from runs/digits_policy_static
python -m experiments.evaluate --workdir W

reinforce is the paper's training: its reward and curriculum; gumbel the straight-through alternative under a budget.
"""

from dynjax.models.resnet import ResNetConfig
from experiments.labelled import variants

ROWS = variants(
    "policy",
    "a ResNet with a policy network",
    ResNetConfig(stem_stride=2, widths=(32, 64, 128), blocks=(2, 2, 2)),
    {"gumbel": "policy", "reinforce": "reinforce"},
    small=dict(stem_stride=1, widths=(16, 32, 64), blocks=(2, 2, 2)),
)
