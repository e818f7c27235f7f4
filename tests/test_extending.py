"""What a newcomer adds, each as it would stand in a file of his own, and nothing of it is in the package.

README's "Adding ..." says the same in words. Each is trained for two steps, deployed at a budget and evaluated by the
same commands as the rows that are here.
"""

import dataclasses
import inspect
import json
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dynjax as dj
from dynjax import data, models, tasks
from dynjax.config import Config, DataConfig
from dynjax.core.decision import EACH, Rule
from dynjax.core.gates import Threshold, one_hot_argmax, straight_through
from dynjax.data.source import Field
from dynjax.models.backbones.residual import ResidualConfig
from dynjax.models.dense import BackboneConfig, DenseConfig, DynamicsConfig, HeadConfig, sites_of
from dynjax.models.dynamics.skip import SkipConfig
from dynjax.models.heads.unet import UNetHeadConfig
from dynjax.models.registry import BUDGET, Family
from dynjax.run import checkpoint, train
from experiments import evaluate

SCENES = DataConfig(name="digits", size=(48, 48), examples=8)


def train_and_evaluate(folder, row, data, model, **changes):
    """Two steps, then deployed at two budgets and evaluated; the scores at each."""
    config = Config(row=row, data=data, model=model, steps=2, batch_size=8, checkpoint_every=2, **changes)
    train.train(config, folder, quiet=True)
    evaluate.main(["--workdir", str(folder), "--budgets", "0.7", "1.0", "--timing", "2", "--batch-size", "8"])
    assert (folder / "curve.csv").exists()
    return json.loads((folder / "evaluation.json").read_text())


@pytest.fixture(autouse=True)
def registered():
    """What a test registers is gone after it."""
    tables = (*models.registry.OPEN.values(), data._MAKES, tasks._TASKS)
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


# A gated op with a rule of its own: two neighbours of K blocks run, one after the other

NEIGHBOURS = Rule("neighbours", most=2)


class NeighbourGate(nnx.Module):
    def __init__(self, features, kinds, *, rngs):
        self.score, self.threshold = nnx.Linear(features, kinds - 1, rngs=rngs), Threshold(jnp.zeros(()))

    def __call__(self, x):
        logits = self.score(x.mean((1, 2)).astype(jnp.float32))
        logits = logits - self.threshold[...] * jnp.arange(logits.shape[1], dtype=jnp.float32)[None]
        keep, likely = (
            jnp.pad(chosen, ((0, 0), (0, 1))) + jnp.pad(chosen, ((0, 0), (1, 0)))
            for chosen in (one_hot_argmax(logits), jax.nn.softmax(logits))
        )
        return dj.Decision(straight_through(keep, likely), likely / 2, "example", NEIGHBOURS)


class Neighbours(dj.Wrapper):
    """Of K blocks, the cheapest first, every example runs two neighbours."""

    def __init__(self, blocks, gate):
        self.blocks, self.gate = nnx.List(blocks), gate

    def __call__(self, x):
        shape = (x.shape[0], len(self.blocks))
        decision = self.expect(self.gate(x), "example", NEIGHBOURS, shape, "use a NeighbourGate")
        inputs = []
        for block, keep, likely in zip(self.blocks, decision.keep.T, decision.probability.T, strict=True):
            inputs.append(x)
            x = self.samples(block, x, keep, probability=likely)
        if self.tracing:
            self.account_blocks(decision, self.blocks, inputs)
        return x


@dataclasses.dataclass(frozen=True)
class NeighboursConfig:
    family: Literal["neighbours"] = "neighbours"


def with_neighbours(config, model, *, rngs):
    def wrap(block, channels, level):
        blocks = [models.blocks.PlainBlock(channels, rngs=rngs) for _ in range(2)]
        return Neighbours([*blocks, block], NeighbourGate(channels, 3, rngs=rngs))

    return model.wrap(wrap)


def test_a_gated_op_with_a_rule_of_its_own(tmp_path):
    models.register(Family(NeighboursConfig, with_neighbours, uses=lambda _: BUDGET), DynamicsConfig)
    backbone, head = ResidualConfig(widths=(8, 12), blocks=(1, 1)), UNetHeadConfig(blocks=(1,))
    model = DenseConfig(backbone, head, NeighboursConfig())
    found = train_and_evaluate(tmp_path, "neighbours", SCENES, model)
    kept = found["layers"]["1"]
    assert len(kept) == 3 and all(0 <= each["kept"] <= 1 for each in kept.values())
    # Masked equals compact, whatever is chosen.
    rngs, x = nnx.Rngs(0), jax.random.normal(jax.random.key(0), (5, 6, 7, 4))
    blocks = [nnx.Conv(4, 4, (3, 3), rngs=rngs) for _ in range(3)]
    op = nnx.view(Neighbours(blocks, NeighbourGate(4, 3, rngs=rngs)), deterministic=True)
    masked, trace = dj.traced(op)(x)
    compact = nnx.jit(lambda op, x: op(x))(nnx.view(op, execution="compact"), x)
    np.testing.assert_allclose(masked, compact, rtol=1e-5, atol=1e-6)
    assert trace.full_macs - trace.static_macs == 2 * dj.cost.macs(blocks[0], x[:1])


# A backbone and a head


@dataclasses.dataclass(frozen=True)
class PoolingConfig:
    family: Literal["pooling"] = "pooling"
    widths: tuple[int, ...] = (8, 16)
    blocks: tuple[int, ...] = (1, 1)


class Pooling(nnx.Module):
    """Each level: half the resolution by the mean of 2x2 pixels, a convolution, and blocks."""

    def __init__(self, config, *, rngs):
        self.widths, self.strides = config.widths, tuple(2 ** (k + 1) for k in range(len(config.widths)))
        pairs = zip((3, *config.widths), config.widths, strict=False)
        self.enter = nnx.List([nnx.Conv(a, b, (3, 3), rngs=rngs) for a, b in pairs])
        levels = zip(config.widths, config.blocks, strict=True)
        self.blocks = nnx.List([nnx.List([models.blocks.Block(w, rngs=rngs) for _ in range(n)]) for w, n in levels])

    def __call__(self, image):
        x, maps = image.astype(self.enter[0].kernel.dtype) / 255, []
        for enter, blocks in zip(self.enter, self.blocks, strict=True):
            x = enter(nnx.avg_pool(x, (2, 2), (2, 2), "SAME"))
            for block in blocks:
                x = block(x)
            maps.append(x)
        return maps

    def sites(self):
        return sites_of(self.blocks, self.widths)

    @property
    def tail(self):
        return self.blocks[-1]


@dataclasses.dataclass(frozen=True)
class LinearHeadConfig:
    family: Literal["linear"] = "linear"


class LinearHead(nnx.Module):
    """Logits of the coarsest map, at the size of the picture."""

    def __init__(self, config, backbone, classes, *, rngs):
        self.linear = nnx.Linear(backbone.widths[-1], classes, rngs=rngs)

    def __call__(self, maps, size):
        logits = self.linear(maps[-1]).astype(jnp.float32)
        return jax.image.resize(logits, (logits.shape[0], *size, logits.shape[-1]), "bilinear")

    def sites(self):
        return ()


def test_a_backbone_and_a_head(tmp_path):
    models.register(Family(PoolingConfig, Pooling), BackboneConfig)
    models.register(Family(LinearHeadConfig, LinearHead), HeadConfig)
    found = train_and_evaluate(
        tmp_path, "pooling", SCENES, DenseConfig(PoolingConfig(), LinearHeadConfig(), SkipConfig())
    )
    assert len(found["layers"]["0.7"]) == 2 and 0 <= found["scores"]["1"]["miou"] <= 1
    config, model, step = checkpoint.load(tmp_path)
    assert (config.model.backbone, step) == (PoolingConfig(), 2)
    assert model(jnp.zeros((1, 21, 30, 3), jnp.uint8)).shape == (1, 21, 30, 11)


# A task of two players: one draws digits, the other tells them from real ones


@dataclasses.dataclass(frozen=True)
class DuelConfig:
    family: Literal["duel"] = "duel"
    dynamics: Literal["static", "skip"] = "skip"
    gate: Literal["learned"] = "learned"


class Duel(nnx.Module):
    def __init__(self, config, *, rngs):
        block = nnx.Sequential(nnx.Linear(32, 32, rngs=rngs), nnx.relu)
        block = block if config.dynamics == "static" else dj.Skip(block, dj.SampleGate(32, rngs=rngs))
        self.maker = nnx.Sequential(nnx.Linear(8, 32, rngs=rngs), block, nnx.Linear(32, 64, rngs=rngs), nnx.sigmoid)
        self.judge = nnx.Sequential(nnx.Linear(64, 16, rngs=rngs), nnx.relu, nnx.Linear(16, 1, rngs=rngs))


@dataclasses.dataclass(frozen=True)
class DuelTask:
    """The score is how real the judge finds what was drawn."""

    budget: None = None
    score, score_name, percent, timed = "realism", "realism", True, (1,)

    @property
    def players(self):
        mine, his = (lambda path, _, own=own: path[0] == own for own in ("maker", "judge"))
        return tasks.Player("judge", self.judged, his, every=2), tasks.Player("maker", self.made, mine)

    def judged(self, model, batch, key, progress):
        real = model.judge(batch["image"].mean(-1).reshape(-1, 64) / 255)
        drawn = model.judge(model.maker(jax.random.normal(key, (real.shape[0], 8))))
        return jax.nn.softplus(drawn - real).mean(), {"gap": (real - drawn).mean()}

    def made(self, model, batch, key, progress):
        drawn, trace = dj.traced(lambda model, z: model.judge(model.maker(z)))(
            model, jax.random.normal(key, (batch["image"].shape[0], 8))
        )
        return jax.nn.softplus(-drawn).mean() + dj.budget_loss(trace, 0.8), {"macs": trace.fraction().mean()}

    def prepare(self, model, batch):
        return batch | {"noise": jax.random.normal(jax.random.key(0), (batch["image"].shape[0], 8))}

    def infer(self, model, batch):
        return model.maker(batch["noise"])

    def counts(self, model, output, batch):
        valid = (batch["label"] >= 0).astype(jnp.float32)
        return jnp.stack([jax.nn.sigmoid(model.judge(output)[:, 0]) @ valid, valid.sum()])

    def scores(self, counts):
        return {"realism": float(counts[0] / counts[1])}

    def show(self, folder, shown):
        return ""


def test_a_task_of_two_players(tmp_path):
    tasks.register("duel", lambda config, source, training: DuelTask())
    build = lambda config, classes, *, rngs, twin_params=None: Duel(config, rngs=rngs)  # noqa: E731
    models.register(Family(DuelConfig, build, task="duel", uses=lambda _: BUDGET))
    digits = DataConfig(name="digits8", size=(8, 8), examples=16)
    found = train_and_evaluate(tmp_path, "duel", digits, DuelConfig())
    assert 0 < found["scores"]["0.7"]["realism"] < 1
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert {"judge/gap", "judge/loss", "maker/macs"} <= first.keys()


# A source of text, and a gated op inside a scan over time


class Sequences:
    """Rising or falling numbers as words."""

    name, classes, handed, seen = "sequences", ("rising", "falling"), False, None

    def __init__(self, split):
        self.split = split
        self.spec = {"words": Field((12,), np.int32, "text", 0), "label": Field((), np.int32, "label", -1)}

    def __len__(self):
        return 24

    def __getitem__(self, index):
        words = np.sort(np.random.default_rng([index, len(self.split)]).integers(1, 20, 12))
        return {"words": words[:: 1 - index % 2 * 2].astype(np.int32), "label": np.int32(index % 2)}

    def describe(self):
        return f"sequences {self.split}: {len(self)} texts of 12 words"


class Update(dj.Wrapper):
    """A recurrent cell that leaves its state as it is where the gate says so (Skip RNN, Campos et al. 2018)."""

    def __init__(self, features, *, rngs):
        self.mix = nnx.Linear(2 * features, features, rngs=rngs)
        self.gate = dj.SampleGate(2 * features, rngs=rngs)

    def initial(self, examples):
        return jnp.zeros((examples, self.mix.out_features))

    def __call__(self, x, carry):
        both = jnp.concatenate([x, carry], -1)
        decision = self.expect(self.gate(both), "example", EACH, x.shape[:1], "use a SampleGate")
        step = nnx.Sequential(self.mix, nnx.tanh)
        if self.tracing:
            self.account_blocks(decision, [step], [both])
        carry = self.samples(step, both, decision.keep, otherwise=lambda _: carry)
        return carry, carry


@dataclasses.dataclass(frozen=True)
class ReaderConfig:
    family: Literal["reader"] = "reader"
    features: int = 8
    dynamics: Literal["static", "update"] = "update"
    gate: Literal["learned"] = "learned"


class Reader(nnx.Module):
    def __init__(self, config, classes, *, rngs, twin_params=None):
        self.embed, self.cell = nnx.Embed(20, config.features, rngs=rngs), Update(config.features, rngs=rngs)
        self.head = nnx.Linear(config.features, classes, rngs=rngs)

    def __call__(self, words, carry=None):
        states, _ = dj.scan(self.cell, self.embed(words), carry)
        return self.head(states[:, -1]).astype(jnp.float32)


def test_a_source_of_text_and_a_gated_op_inside_a_scan_over_time(tmp_path):
    data.register("sequences", lambda config, split, *, seed, classes: Sequences(split))
    models.register(Family(ReaderConfig, Reader, uses=lambda _: BUDGET))
    found = train_and_evaluate(tmp_path, "reader", DataConfig(name="sequences"), ReaderConfig())
    assert list(found["layers"]["0.7"]) == ["cell"] and 0 <= found["scores"]["1"]["accuracy"] <= 1
    *_, model, _ = checkpoint.load(tmp_path)
    words = jnp.asarray(np.stack([Sequences("test")[k]["words"] for k in range(6)]))
    fast = dj.deploy(model, 0.8, [words])
    logits, trace = dj.traced(fast)(words)
    (decision,) = trace.decisions.values()
    assert decision.place == "time" and decision.keep.shape == (6, 12)
    np.testing.assert_allclose(nnx.view(fast, execution="masked")(words), logits, rtol=1e-5, atol=1e-6)


# A source of film


class Films:
    """A bright square that moves to the left or to the right."""

    name, classes, handed, seen = "films", ("left", "right"), True, None

    def __init__(self, split):
        self.split = split
        self.spec = {"film": Field((4, 12, 12, 3), np.uint8, "film", 0), "label": Field((), np.int32, "label", -1)}

    def __len__(self):
        return 24

    def __getitem__(self, index):
        film, row = np.zeros((4, 12, 12, 3), np.uint8), index % 9
        for time in range(4):
            film[time, row : row + 3, 2 * time : 2 * time + 3] = 255
        return {"film": film if index % 2 else film[::-1], "label": np.int32(index % 2)}

    def describe(self):
        return f"films {self.split}: {len(self)} films of 4 pictures"


@dataclasses.dataclass(frozen=True)
class FilmConfig:
    family: Literal["film"] = "film"
    dynamics: Literal["static", "skip"] = "skip"
    gate: Literal["learned"] = "learned"


class FilmNet(nnx.Module):
    """The last picture beside the first, and a block that films which are plain skip."""

    def __init__(self, config, classes, *, rngs, twin_params=None):
        self.enter, block = nnx.Conv(6, 8, (3, 3), 2, rngs=rngs), models.blocks.Block(8, rngs=rngs)
        self.block = block if config.dynamics == "static" else dj.Skip(block, dj.SampleGate(8, rngs=rngs))
        self.head = nnx.Linear(8, classes, rngs=rngs)

    def __call__(self, film):
        film = film.astype(self.enter.kernel.dtype) / 255
        x = self.block(nnx.relu(self.enter(jnp.concatenate([film[:, 0], film[:, -1]], -1))))
        return self.head(x.mean((1, 2))).astype(jnp.float32)


def test_a_source_of_film(tmp_path):
    data.register("films", lambda config, split, *, seed, classes: Films(split))
    models.register(Family(FilmConfig, FilmNet, uses=lambda _: BUDGET))
    found = train_and_evaluate(tmp_path, "films", DataConfig(name="films"), FilmConfig())
    assert list(found["layers"]["0.7"]) == ["block"] and 0 <= found["scores"]["1"]["accuracy"] <= 1


PARTS = {
    "op": (NeighbourGate, Neighbours, NeighboursConfig, with_neighbours),
    "backbone and head": (PoolingConfig, Pooling, LinearHeadConfig, LinearHead),
    "two players": (DuelConfig, Duel, DuelTask),
    "text": (Sequences,),
    "op inside a scan": (Update, ReaderConfig, Reader),
    "film": (Films, FilmConfig, FilmNet),
}


@pytest.mark.parametrize("name", PARTS)
def test_each_takes_few_lines(name):
    lines = [line for part in PARTS[name] for line in inspect.getsource(part).splitlines() if line.strip()]
    assert len(lines) <= 40, len(lines)
