"""Players: several losses, each with parameters of its own, one after the other in a step."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import standin
from flax import nnx

from dynjax.config import OptimizerConfig
from dynjax.run import log, step, train
from dynjax.tasks import Player

RATES = {"generator": 0.02, "critic": 0.05}


class Two(nnx.Module):
    """Two nets whose losses pull at each other's outputs, one with batch statistics."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.generator = nnx.Sequential(
            nnx.Linear(3, 4, use_bias=False, rngs=rngs), nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        )
        self.critic = nnx.Linear(4, 1, rngs=rngs)


class Game:
    """The generator wants what the critic calls large; the critic wants to see it as small, at every `every` steps."""

    def __init__(self, every=1):
        rate = OptimizerConfig(learning_rate=RATES["critic"], warmup=0.0, weight_decay=0.0)
        self.players = (
            Player("generator", self.generate, nnx.PathContains("generator")),
            Player("critic", self.judge, nnx.PathContains("critic"), every=every, optimizer=rate),
        )

    def _judged(self, model, batch, key):
        x = batch["image"].mean((1, 2)) / 255
        return model.critic(model.generator(x + 0.1 * jax.random.normal(key, x.shape)))

    def generate(self, model, batch, key, progress):
        return -(self._judged(model, batch, key) ** 3).mean(), {"progress": progress}

    def judge(self, model, batch, key, progress):
        return (self._judged(model, batch, key) ** 2).mean(), {}


def config(**changes):
    return standin.config(learning_rate=RATES["generator"], warmup=0.0, weight_decay=0.0, ema=0.5, **changes)


def by_hand(steps, every=1):
    """Parameters after so many steps, written without `make_step`: two gradients, two Adams."""
    model, game = Two(), Game()
    names = list(RATES)
    updates = {name: nnx.state(getattr(model, name), nnx.Param) for name in names}
    counts = {"generator": steps, "critic": -(-steps // every)}
    adams = {
        name: optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.scale_by_adam(),
            optax.scale_by_learning_rate(
                lambda n, name=name: RATES[name] * 0.5 * (1 + jnp.cos(jnp.pi * n / counts[name]))
            ),
        )
        for name in names
    }
    states = {name: adams[name].init(updates[name]) for name in names}
    for number, batch in enumerate(itertools.islice(standin.Batches(), steps)):
        key = jax.random.fold_in(jax.random.key(0), number)
        for place, player in enumerate(game.players):
            name = player.name
            if name == "critic" and number % every:
                continue

            own = nnx.state(getattr(model, name), nnx.Param)
            graphdef, rest = nnx.split(model)

            def pure(own, name=name, player=player, place=place, key=key, batch=batch, graphdef=graphdef, rest=rest):
                copy = nnx.merge(graphdef, rest, copy=True)
                nnx.update(getattr(copy, name), own)
                value, _ = player.loss(copy, batch, jax.random.fold_in(key, place), 0.0)
                return value, nnx.state(copy, nnx.BatchStat)

            grads, statistics = jax.grad(pure, has_aux=True)(own)
            nnx.update(model, statistics)
            change, states[name] = adams[name].update(grads, states[name], own)
            nnx.update(getattr(model, name), optax.apply_updates(own, change))
    return model


def test_two_players_are_two_steps_one_after_the_other():
    _compare(every=1)


def test_a_player_that_rests_changes_nothing():
    _compare(every=2)


def _compare(every):
    state, one = step.make_step(Two(), Game(every), config(steps=4), nnx.Nothing())
    one = jax.jit(one)
    for number, batch in enumerate(itertools.islice(standin.Batches(), 4)):
        state, metrics = one(state, batch)
        rests = number % every != 0
        assert (metrics["critic/loss"] == 0) == rests and float(metrics["generator/grad_norm"]) > 0
        assert metrics["loss"] == metrics["generator/loss"] + metrics["critic/loss"]
    wanted = nnx.to_pure_dict(nnx.state(by_hand(4, every), nnx.Any(nnx.Param, nnx.BatchStat)))
    found = nnx.to_pure_dict(state.params)
    statistics = nnx.to_pure_dict(nnx.filter_state(state.rest, nnx.BatchStat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found["critic"], wanted["critic"])
    layers = wanted["generator"]["layers"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found["generator"]["layers"][0], layers[0]
    )
    np.testing.assert_allclose(statistics["generator"]["layers"][1]["mean"], layers[1]["mean"], rtol=1e-5)


def test_players_go_on_with_the_same_bits(tmp_path):
    def fit(steps, workdir):
        loader = itertools.islice(standin.Batches(), steps)
        return standin.fit(config(), workdir, model=Two(), task=Game(2), loader=loader)

    whole = standin.arrays(standin.fit(config(), tmp_path / "whole", model=Two(), task=Game(2)))
    with pytest.raises(train.UserError, match="the data ended after 3"):
        fit(3, tmp_path / "w")  # checkpoint 2 is there
    again = standin.arrays(fit(6, tmp_path / "w"))
    for name, array in whole.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)
    records = log.read_metrics(tmp_path / "w")
    assert [("critic/loss" in record, "generator/loss" in record) for record in records] == [
        (number % 2 == 0, True) for number in range(6)
    ]


def test_one_player_may_accumulate_beside_another():
    changed = config(steps=2, batch_size=16, accumulate=2)
    state, one = step.make_step(Two(), Game(2), changed, nnx.Nothing())
    state, metrics = jax.jit(one)(state, next(standin.Batches(16)))
    assert np.isfinite([float(value) for value in metrics.values()]).all()


@pytest.mark.parametrize("every", [(2, 2), ()])
def test_players_that_make_no_sense(every):
    game = Game()
    game.players = tuple(dataclasses.replace(game.players[0], every=n) for n in every)
    with pytest.raises(ValueError, match="players must have names of their own"):
        step.make_step(Two(), game, config(), nnx.Nothing())
