import dataclasses
import re

import numpy as np
import pytest
from PIL import Image
from test_commands import last_scores, make

from dynjax import models, tasks
from dynjax.config import UserError
from dynjax.run import train
from dynjax.run.workdir import read_config
from experiments import rows

LAYOUTS = {
    "camvid": ("{}", "{}annot", 12),
    "folder": ("{}/images", "{}/masks", 11),
    "isbi_em": ("image", "label", 256),
    "aerial_roads": ("images", "groundtruth", 256),
}
"""Folders of pictures and of masks, and below what number the ids of these are; by the name of the set."""


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """A folder for each layout, with a few pictures of noise."""
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    for name, (images, masks, ids) in LAYOUTS.items():
        for number, split in enumerate(("train", "val", "test")):
            left, right = (folder / name / part.format(split) for part in (images, masks))
            for part in (left, right):
                part.mkdir(parents=True, exist_ok=True)
            for index in range(4 * number, 4 * number + 4):
                Image.fromarray(rng.integers(0, 256, (48, 48, 3), np.uint8)).save(left / f"{index}.png")
                Image.fromarray(rng.integers(0, ids, (48, 48), np.uint8)).save(right / f"{index}.png")
    return folder


@pytest.mark.parametrize("name", rows.ROWS)
def test_a_row_says_what_it_is(name):
    config = rows.get_row(name)
    assert config.row == name
    first, blank, *rest = rows.ROWS[name].__doc__.splitlines()
    assert first.endswith(".") and not blank
    assert "Protocol:" in " ".join(rest)
    assert config == rows.ROWS[name]()


ONE_OF_A_KIND = (
    "digits_unet_tiles camvid_small_random digits_resnet_skip "
    "digits200_unet_shortlist "
    "digits_policy_reinforce digits_slimmable_slices digits_halt_sact digits_halt_pondernet "
    "digits_routed_gates digits_moe_experts digits_dyconv_kernels "
    "digits_pixelcnn cifar10_pixelcnn digits_transformer digits_pixelcnn_labels "
    "digits_codes digits_codes_exits digits_transformer_exits digits_vae_groups "
    "digits_gan_steps digits_gan_dynamicd"
).split()
"""Rows whose tiny form is trained in every run of the tests; the others' in `make test-slow`. What only goes into
blocks of segmentation has tests of its own, as have generated kernels, exits of MSDNet and a VAE of colours."""


def in_tiny_form():
    """One row of each that are alike once they are tiny."""
    seen = {rows.tiny(rows.get_row(name)).model for name in ONE_OF_A_KIND}
    for name in rows.ROWS:
        config = rows.tiny(rows.get_row(name))
        if name in ONE_OF_A_KIND:
            yield name
        elif models.task_of(config.model) == "segmentation" or config.model not in seen:
            seen.add(config.model)
            yield pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", list(in_tiny_form()))
def test_the_tiny_form_trains_two_steps(name, tmp_path, noise):
    config, row = rows.tiny(rows.get_row(name)), tmp_path / "row"
    if config.data.name in LAYOUTS:
        data = dataclasses.replace(config.data, path=str(noise / config.data.name))
        config = dataclasses.replace(config, data=data)
        train.train(config, row, quiet=True)
    elif config.model.family == "codes":
        vqvae = make(tmp_path / "vqvae", name.split("_")[0] + "_vqvae")
        scores = last_scores(vqvae)
        assert scores["psnr"] > 0 and 1 <= scores["perplexity"] <= config.model.vqvae.codes
        make(row, name, init_from=str(vqvae))
    elif models.base_of(config.model) != config.model:
        make(row, name, init_from=str(make(tmp_path / "twin", name.split("_")[0] + "_gan_static")))
    else:
        make(row, name)
    scores = last_scores(row)
    assert 0 < scores["macs_fraction"] <= 1 + 1e-6
    task = models.task_of(config.model)
    if task == "reconstruction":
        assert scores["psnr"] > 0
        return
    if task in ("autoregressive", "variational"):
        assert 0 < scores["bits_per_dim"] < 20
        return
    if task == "adversarial":
        assert scores["frechet"] > 0 and scores["diversity"] >= 0 and 0 <= scores["discriminator"] <= 1
        with Image.open(row / "samples" / "0000002.png") as picture:
            assert min(picture.size) >= 8 * 8 * 2  # 64 pictures, twice as large
        return
    segments = task == "segmentation"
    assert 0 <= scores["miou" if segments else "accuracy"] <= 1
    assert len(scores["iou" if segments else "recall"]) == len(read_config(row)[1])


def test_rows_of_a_family_differ_in_what_they_are_for():
    small = {name: rows.get_row(name) for name in rows.ROWS if name.startswith("camvid_small")}
    static = small["camvid_small_static"]
    for name, config in small.items():
        assert (config.data, config.loss, config.batch_size) == (static.data, static.loss, static.batch_size), name
    assert small["camvid_small_random"].model.dynamics.gate == "random"
    assert rows.get_row("camvid_unet_static").data.size == (360, 480)
    assert static.data.size == (180, 240)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits_unet_tile", "unknown row 'digits_unet_tile': did you mean digits_unet_tiles"),
        ("xyz", "unknown row 'xyz': the rows are digits_unet_static, "),
    ],
)
def test_unknown_rows(name, message):
    with pytest.raises(UserError, match=re.escape(message)):
        rows.get_row(name)


def test_every_row_uses_the_options_that_it_sets():
    for name in rows.ROWS:
        tasks.refuse_unused(rows.get_row(name))


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("digits_resnet_static", "loss.dice", 1.0),
        ("digits_resnet_static", "loss.focal", 1.0),
        ("digits_resnet_skip", "loss.one_vs_all", 1.0),
        ("digits_resnet_skip", "loss.class_weights", "sqrt"),
        ("digits_resnet_skip", "loss.load_balance", 0.1),
        ("digits_resnet_skip", "loss.wrong", 2.0),
        ("digits_resnet_static", "budget.target", 0.4),
        ("digits_resnet_exits", "budget.weight", 1.0),
        ("digits_condconv_kernels", "budget.sampled", False),
        ("digits_moe_random", "loss.router_z", 0.1),
        ("digits_unet_tiles", "loss.load_balance", 0.1),
        ("digits_unet_tiles", "loss.presence", 0.1),
        ("digits200_unet_random", "loss.presence", 0.1),
        ("digits200_unet_shortlist", "budget.weight", 1.0),
        ("digits_unet_select", "loss.router_z", 0.1),
        ("digits_unet_halt", "loss.ponder", 0.1),
        ("digits_unet_select", "loss.ponder", 0.1),
        ("digits_unet_select", "loss.reinforce", 2.0),
        ("digits_pixelcnn", "budget.target", 0.4),
        ("digits_transformer_exits", "budget.weight", 1.0),
        ("digits_nextscale", "loss.label_smoothing", 0.1),
        ("digits_codes_exits", "loss.cross_entropy", 2.0),
        ("digits_vqvae", "loss.dice", 1.0),
        ("digits_vqvae", "loss.lovasz", 1.0),
        ("digits_gan_static", "loss.boundary", 1.0),
        ("digits_vae_static", "budget.target", 0.4),
        ("digits_gan_scales", "budget.target", 0.4),
        ("digits_vae_static", "features", "inception"),
        ("digits_vae_groups", "loss.label_smoothing", 0.1),
    ],
)
def test_an_option_that_a_row_does_not_use_is_refused(name, option, value, tmp_path):
    *part, field = option.split(".")
    row, new = rows.get_row(name), {field: value}
    for each in part:
        new = {each: dataclasses.replace(getattr(row, each), **new)}
    row = dataclasses.replace(row, **new)
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')} {value}: row {name} .* does not use it"):
        train.train(row, tmp_path / "w", quiet=True)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("digits_resnet_static", "--loss.cross-entropy is"),
        ("digits_policy_reinforce", "--loss.cross-entropy, --loss.reinforce are all"),
        ("digits_unet_tiles", "--loss.cross-entropy, --loss.boundary, .*, --loss.one-vs-all are all"),
    ],
)
def test_a_row_that_learns_nothing_is_refused(name, options, tmp_path):
    row = rows.get_row(name)
    none = dataclasses.replace(row.loss, cross_entropy=0.0, reinforce=0.0 if "reinforce" in name else 1.0)
    with pytest.raises(UserError, match=f"^row {name} has nothing to learn from: {options} 0$"):
        train.train(dataclasses.replace(row, loss=none), tmp_path / "w", quiet=True)
    assert not (tmp_path / "w").exists()


def test_a_row_may_have_any_one_of_its_losses():
    row = rows.get_row("digits_unet_tiles")
    for name in ("dice", "focal", "lovasz", "boundary", "one_vs_all"):
        loss = dataclasses.replace(row.loss, **{"cross_entropy": 0.0, name: 1.0})
        tasks.refuse_unused(dataclasses.replace(row, loss=loss))


def test_all_losses_of_segmentation_together(tmp_path):
    weights = dict(dice=1.0, focal=1.0, lovasz=1.0, boundary=1.0, one_vs_all=1.0)
    row = rows.tiny(rows.get_row("digits_unet_tiles"))
    row = dataclasses.replace(row, loss=dataclasses.replace(row.loss, **weights))
    train.train(row, tmp_path / "w", quiet=True)
    scores = last_scores(tmp_path / "w")
    assert 0 <= scores["boundary_f1"] <= 1 and len(scores["iou"]) == 11
    assert not {"class_dice", "class_boundary_f1"} & scores.keys()
