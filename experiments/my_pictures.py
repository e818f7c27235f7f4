"""Adaptive U-Nets on windows of pictures: your own, a section under the microscope, the world from above.

python -m experiments.train my_static --workdir runs/my_static --data.path PATH
python -m experiments.train my_tiles --workdir runs/my_tiles --data.path PATH --init-from runs/my_static
python -m experiments.evaluate --workdir runs/my_tiles

`my_*` read a folder of pictures of any sizes (dynjax/data/folder.py); `em_*` are the membranes of ISBI 2012, `roads_*`
the roads of aerial pictures. No pre-training; sized for two CPU cores.
"""

import dataclasses

from dynjax.config import AugmentConfig, BudgetConfig, Config, DataConfig
from dynjax.models.dynamics.tiles import TilesConfig
from experiments import camvid_unet
from experiments.labelled import Row, make_row

MY = dataclasses.replace(
    camvid_unet.SMALL,
    row="my_static",
    data=DataConfig(name="folder", path="data/my", crop=(192, 256), augment=AugmentConfig(crop=0.7)),
)
EM = dataclasses.replace(
    MY,
    row="em_static",
    data=dataclasses.replace(MY.data, name="isbi_em", path="data/isbi_em", crop=(256, 256)),
    steps=750,
)
ROADS = dataclasses.replace(
    MY,
    row="roads_static",
    data=dataclasses.replace(MY.data, name="aerial_roads", path="data/aerial_roads", crop=(200, 200)),
    steps=750,
)


def _pair(static: Config, what: str, splits: str) -> tuple[Row, Row]:
    """The static twin, and tiles that start from it when it is trained: gates learn faster, over fewer steps."""
    tiles = dataclasses.replace(
        static,
        row=static.row.replace("_static", "_tiles"),
        model=dataclasses.replace(static.model, dynamics=TilesConfig()),
        budget=BudgetConfig(target=0.35),
        optimizer=dataclasses.replace(static.optimizer, gate_learning_rate=2.0),
        steps=static.steps * 8 // 15,
    )
    where = f"windows of {'x'.join(map(str, static.data.crop))} of {what}"
    told = f"{static.steps} steps of {static.batch_size} windows; flip, crop, colour; cross-entropy weighted by "
    told += f"1/sqrt(frequency). {splits} Chosen on val."
    dynamic = f"{tiles.steps} steps from {static.row} (--init-from); a budget from [0.35, 1] is drawn at every step."
    return (
        make_row(static, f"Static twin: the U-Net without dynamics, {where}.", told),
        make_row(tiles, f"Tiles: blocks run only where their gate keeps a tile, {where}.", dynamic),
    )


ROWS = (
    *_pair(MY, "your own pictures", "Splits as in the folder."),
    *_pair(EM, "membranes under the electron microscope (ISBI 2012)", "Sections in blocks: train 20, val 5, test 5."),
    *_pair(ROADS, "aerial pictures and their roads", "A fixed choice: train 70, val 15, test 15."),
)
