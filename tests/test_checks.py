"""Options of models that do not fit: one line that names the option, its value and what is allowed."""

import dataclasses

import odd_models
import pytest

from dynjax import models
from dynjax.config import UserError
from dynjax.run import checks
from dynjax.run.build import build
from experiments import rows


def changed(config, fields):
    """The configuration with these fields; a dict has those of a part."""
    for name, each in fields.items():
        new = changed(getattr(config, name), each) if isinstance(each, dict) else each
        config = dataclasses.replace(config, **{name: new})
    return config


def test_the_rows_pass():
    for row in rows.ROWS.values():
        checks.check_config(row())
        checks.check_config(rows.tiny(row()))


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            "digits_unet_static",
            dict(backbone=dict(stem_stride=3)),
            "--model.backbone.stem-stride is 3: it must be 1, 2 or 4",
        ),
        ("digits_resnet_skip", dict(stem_stride=4), "--model.stem-stride is 4: it must be 1 or 2"),
        (
            "digits_resnet_skip",
            dict(blocks=(1,)),
            "--model.blocks is 1: it must be one number for each stage, of which --model.widths has 3",
        ),
        ("digits_resnet_skip", dict(blocks=(0, 0, 0)), "1 or more in one of them: skip needs blocks"),
        ("digits_unet_tiles", dict(dynamics=dict(tiles=())), "--model.dynamics.tiles is empty"),
        ("digits_unet_static", dict(head=dict(blocks=())), "--model.head.blocks is empty: it must be one number"),
        (
            "digits_unet_static",
            dict(backbone=dict(widths=(10**9,) * 4)),
            "--model.backbone.widths is .*: it must be each from 1 to 65536",
        ),
        ("digits_transformer", dict(features=10), "--model.features is 10: it must be a multiple of --model.heads"),
        ("digits_moe_experts", dict(top=9), "--model.top is 9: it must be at most --model.experts, which is 4"),
        ("digits_slimmable_channels", dict(groups=5), "--model.groups is 5: it must be a divisor of all"),
        ("digits_vqvae", dict(halvings=4), "--model.halvings is 4: it must be such that 8x8 pixels"),
        ("digits_routed_single", dict(gate="random"), "--model.gate is random: it must be learned"),
    ],
)
def test_options_that_do_not_fit(row, options, message):
    model = changed(rows.ROWS[row]().model, options)
    with pytest.raises(UserError, match=message):
        models.check(model)


@pytest.mark.parametrize("name", ["cross_entropy", "dice", "focal", "lovasz", "boundary", "one_vs_all"])
@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_of_losses_are_numbers_from_0(name, weight):
    config = changed(rows.get_row("digits_unet_static"), dict(loss={name: weight}))
    with pytest.raises(UserError, match=f"--loss.{name.replace('_', '-')} is {weight}: it must be 0 or more"):
        checks.check_config(config)


def test_the_parts_of_a_model_of_codes():
    model = rows.ROWS["digits_codes_exits"]().model
    model = dataclasses.replace(model, prior=dataclasses.replace(model.prior, features=10, heads=4))
    with pytest.raises(
        UserError, match=r"--model\.prior\.features is 10: it must be a multiple of --model\.prior\.heads"
    ):
        models.check(model)


def test_odd_options_are_refused_in_one_line_or_run():
    counts = odd_models.try_all(3)
    assert counts["ran"] == 3 and counts["refused"] > 1000


def test_a_model_that_no_memory_holds():
    config = rows.get_row("digits_unet_static")
    config = changed(config, dict(model=dict(backbone=dict(widths=(60_000, 60_000, 64, 96)))))
    with pytest.raises(UserError, match=r"row digits_unet_static: the model would take \d+\.\d GB, and there are"):
        build(config, 3)
