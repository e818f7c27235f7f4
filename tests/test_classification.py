"""The classification task: losses and scores by hand, blank labels, budgets, exits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import image, make
from flax import nnx
from jaxtyping import TypeCheckError

import dynjax as dj
from dynjax import tasks
from dynjax.config import BudgetConfig, Config, DataConfig, LossConfig, UserError
from dynjax.data import make_source
from dynjax.models.msdnet import MSDNetConfig
from dynjax.ops import PolicySkip, policy
from dynjax.tasks.classification import ClassificationTask, confusion_matrix, cross_entropy, scores
from experiments import rows

NAMES = ("a", "b", "c")
KEY = jax.random.key(0)


def test_cross_entropy_by_hand():
    logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]))
    label = jnp.asarray([0, 2, -1])
    np.testing.assert_allclose(cross_entropy(logits, label), [np.log(2), np.log(10), 0], rtol=1e-6)
    smooth = cross_entropy(logits, label, 0.3)  # 0.8 on the label and 0.1 on the two others
    np.testing.assert_allclose(smooth[0], 0.8 * np.log(2) + 0.2 * np.log(4), rtol=1e-6)
    assert smooth[2] == 0
    # Where types are checked, the shapes are found to disagree before the function looks at them.
    with pytest.raises((ValueError, TypeCheckError), match=r"are not the labels' shape \(2,\)|i32\[2\]"):
        cross_entropy(logits, jnp.zeros(2, jnp.int32))


def test_scores_of_a_confusion_matrix():
    logits = jnp.asarray(np.eye(3)[[0, 1, 1, 2, 0]], jnp.float32)
    confusion = confusion_matrix(logits, jnp.asarray([0, 0, 1, -1, 0]))
    np.testing.assert_array_equal(confusion, [[2, 1, 0], [0, 1, 0], [0, 0, 0]])
    found = scores(np.asarray(confusion))
    assert found["accuracy"] == 0.75
    np.testing.assert_allclose(found["recall"], [2 / 3, 1, np.nan])
    assert np.isnan(scores(np.zeros((3, 3)))["accuracy"])


class Gated(nnx.Module):
    def __init__(self, rngs):
        self.block = dj.Skip(nnx.Linear(4, 4, rngs=rngs), dj.SampleGate(4, rngs=rngs))
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.block(x))


def test_a_model_with_gates_pays_for_its_macs():
    model = make(Gated)
    task = ClassificationTask(NAMES, LossConfig(), BudgetConfig(target=0.5, sampled=False, weight=7.0))
    batch = {"image": image(6, 4), "label": jnp.asarray([0, 1, 2, 0, 1, -1])}
    both = nnx.value_and_grad(lambda model: task.loss(model, batch, KEY, 1.0), has_aux=True)
    (loss, metrics), grads = nnx.jit(both)(model)
    np.testing.assert_allclose(loss, metrics["task_loss"] + metrics["budget_loss"], rtol=1e-6)
    assert metrics["budget_loss"] == pytest.approx(7 * (float(metrics["macs_fraction"]) - 0.5) ** 2, rel=1e-4)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads.block.gate))


def test_blank_examples_do_not_count():
    model = make(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
    task = ClassificationTask(NAMES, LossConfig())
    x, label = image(4, 4), jnp.asarray([0, 1, 2, 1])
    with_blank = {"image": jnp.concatenate([x, 100 + x[:2]]), "label": jnp.concatenate([label, jnp.asarray([-1, -1])])}
    got, wanted = task.loss(model, with_blank, KEY, 0.0), task.loss(model, {"image": x, "label": label}, KEY, 0.0)
    for name, value in wanted[1].items():
        np.testing.assert_allclose(got[1][name], value, rtol=1e-6)
    everything_blank = task.loss(model, {"image": x, "label": jnp.full(4, -1)}, KEY, 0.0)
    assert everything_blank[0] == 0


def test_all_exits_learn():
    class Exiting(nnx.Module):
        def __init__(self, rngs):
            stages = [nnx.Linear(4, 4, rngs=rngs) for _ in range(2)]
            self.exits = dj.Exits(stages, [nnx.Linear(4, 3, rngs=rngs) for _ in range(2)])

        def __call__(self, x):
            return self.exits(x)

        def predictions(self, x):
            return self.exits.predictions(x)

    model, task = make(Exiting), ClassificationTask(NAMES, LossConfig(), BudgetConfig())
    batch = {"image": image(5, 4), "label": jnp.asarray([0, 1, 2, 0, 1])}
    loss, metrics = task.loss(model, batch, KEY, 0.0)
    each = [cross_entropy(logits, batch["label"]).mean() for logits in model.predictions(batch["image"])]
    np.testing.assert_allclose(loss, np.mean(each), rtol=1e-6)
    assert {"accuracy_exit_0", "accuracy_exit_1"} <= metrics.keys()
    assert metrics["accuracy"] == metrics["accuracy_exit_1"]
    grads = nnx.grad(lambda model: task.loss(model, batch, KEY, 0.0)[0])(model)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads) if leaf.size)


def test_the_task_belongs_to_the_source():
    labels = make_source(DataConfig(name="digits8"), "val")
    masks = make_source(DataConfig(name="digits", examples=10, size=(48, 48)), "val")
    task = tasks.make_task(Config(row="r", model=MSDNetConfig(dynamics="exits")), labels)
    assert (task.score, len(task.class_names)) == ("accuracy", 10)
    unet = dataclasses.replace(rows.get_row("digits_unet_static"), row="r")
    assert tasks.make_task(unet, masks).score == "miou"
    with pytest.raises(UserError, match=r"row r \(dense\) needs pictures with masks; data.name=digits has a label"):
        tasks.make_task(unet, labels)
    with pytest.raises(UserError, match=r"row r \(msdnet\) needs pictures with one label each; .* has a mask"):
        tasks.make_task(Config(row="r", model=MSDNetConfig()), masks)


class Policied(nnx.Module):
    def __init__(self, rngs):
        blocks = [nnx.Linear(4, 4, rngs=rngs) for _ in range(6)]
        self.chain = PolicySkip(blocks, dj.ChannelGate(4, 6, bias=0.0, rngs=rngs), straight_through=False)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.chain(x))


def test_a_policy_is_compared_with_itself_at_the_same_threshold(monkeypatch):
    seen = {"kept": []}
    reward, log_probability = policy.blockdrop_reward, policy.log_probability
    monkeypatch.setattr(
        policy,
        "blockdrop_reward",
        lambda right, kept, wrong: seen["kept"].append(kept) or reward(right, kept, wrong),
    )
    monkeypatch.setattr(
        policy, "log_probability", lambda drawn: seen.update(p=drawn.probability) or log_probability(drawn)
    )
    model, task = make(Policied), ClassificationTask(NAMES, LossConfig(), BudgetConfig(target=0.1))
    batch = {"image": image(6, 4), "label": jnp.asarray([0, 1, 2, 0, 1, -1])}
    _, metrics = task.loss(model, batch, KEY, 1.0)
    assert metrics["target"] > 0.2  # far from the row's own target, at which the model is left
    np.testing.assert_allclose(seen["kept"][1], (seen["p"] >= 0.5).mean(-1), rtol=1e-6)
    assert float(model.chain.gate.logits.threshold[...]) == pytest.approx(np.log(9))


def test_the_weight_of_the_cross_entropy():
    model, batch = make(lambda rngs: nnx.Linear(4, 3, rngs=rngs)), {"image": image(4, 4), "label": jnp.arange(4) % 3}
    one, two = (
        ClassificationTask(NAMES, LossConfig(cross_entropy=w)).loss(model, batch, KEY, 0.0)[0] for w in (1.0, 2.0)
    )
    assert float(two) == pytest.approx(2 * float(one))
