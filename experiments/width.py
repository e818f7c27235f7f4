"""Width chosen for each picture: slices of the hidden channels (DS-Net, Li et al. 2021), and groups of them.

python -m experiments.train digits_slimmable_static --workdir runs/digits_slimmable_static
python -m experiments.train digits_slimmable_slices --workdir W --init-from runs/digits_slimmable_static
python -m experiments.evaluate --workdir W
"""

from dynjax.models.resnet import ResNetConfig
from experiments.labelled import variants

ROWS = variants(
    "slimmable",
    "a ResNet whose blocks have a width of their own",
    ResNetConfig(stem_stride=2, widths=(32, 64, 128), blocks=(2, 2, 2)),
    {"slices": "slices", "channels": "channels"},
    small=dict(stem_stride=1, widths=(16, 32, 64), blocks=(1, 1, 1)),
)
