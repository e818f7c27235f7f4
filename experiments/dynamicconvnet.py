"""Kernels of the input: mixed, by CondConv (Yang et al. 2019), Dynamic Convolution (Chen et al. 2020) and ODConv (Li et
al. 2022); assembled from cells that layers share, by KernelWarehouse (Li and Yao 2024); generated, by a hypernetwork,
involution (Li et al. 2021) and decoupled dynamic filters (Zhou et al. 2021).

python -m experiments.train cifar10_dyconv_static --workdir runs/cifar10_dyconv_static --data.path data/cifar10
python -m experiments.train cifar10_dyconv_kernels --workdir W --data.path data/cifar10
python -m experiments.evaluate --workdir W --twin runs/cifar10_dyconv_static

All are trained from nothing, as their static twin. Their MACs are static: the mixture and the attention are counted.
"""

from dynjax.config import BudgetConfig
from dynjax.models.dynamicconvnet import DynamicConvNetConfig
from experiments.labelled import variants

MODEL = DynamicConvNetConfig()
WAYS = dict(small=dict(widths=(8, 16), blocks=(1, 1)), from_twin=False, target=BudgetConfig().target)
"""No budget moves them: the target is left alone."""

ROWS = (
    *variants("condconv", "CondConv", MODEL, {"kernels": "condconv"}, **WAYS),
    *variants("dyconv", "Dynamic Convolution", MODEL, {"kernels": "dyconv"}, **WAYS),
    *variants("odconv", "ODConv", MODEL, {"kernels": "odconv"}, **WAYS),
    *variants("warehouse", "KernelWarehouse", MODEL, {"kernels": "warehouse"}, **WAYS),
    *variants(
        "dynamicconvnet",
        "generated kernels",
        MODEL,
        {"hyper": "hyper", "involution": "involution", "ddf": "ddf"},
        **WAYS,
    ),
)
