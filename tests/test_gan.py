"""Generator and discriminator: masked equals compact, costs, sizes, the static twin under every kind of dynamics."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import at, image, make, still
from flax import nnx
from test_cost import xla_macs

import dynjax as dj
from dynjax import execute, models
from dynjax.config import UserError
from dynjax.core import cost, training
from dynjax.core.budget import HIGHEST, LOWEST
from dynjax.core.controls import FixedGate
from dynjax.core.decision import EACH
from dynjax.core.gates import ChannelGate
from dynjax.models import gan
from dynjax.models.discriminator import PhaseGate
from dynjax.models.gan import GanConfig

CLASSES = 3
SMALL = dict(shape=(8, 12, 1), latent=4, widths=(4, 4), steps=3, discriminator=(4, 4), conditional=True)
FORMS = {
    "pictures": dict(dynamics="steps"),
    "tiles": dict(dynamics="steps", tile=3),  # of a map of 4x6: those of the last row are cut
    "random": dict(dynamics="steps", gate="random"),
    "width": dict(dynamics="width"),
    "generated": dict(dynamics="kernels"),
    "mixed": dict(dynamics="kernels", kernel="mixed"),
    "scales": dict(dynamics="scales"),
    "discriminator": dict(dynamics="discriminator"),
}

MIDDLE = -2.0
"""A threshold at which the gates of all that `build` makes tell pictures apart."""


def config(**changes):
    return GanConfig(**SMALL | changes)


def build(**changes):
    """With weights that are none of them zero, and gates that are of another mind about every picture."""
    model = make(lambda rngs: models.build(config(**changes), CLASSES, rngs=rngs))
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name = ".".join(map(str, path))
        if name.endswith("share"):
            variable[...] = jnp.ones(())
        elif name in ("generator.enter.kernel", "generator.mapping.kernel") or name.endswith("logits.out"):
            variable[...] = 6 * variable[...]
        elif name.endswith("logits.bias"):
            variable[...] = 0 * variable[...]
    return model


def given(number):
    return image(number, SMALL["latent"]), jnp.arange(number) % CLASSES


def seen(number):
    return image(number, 8, 12, 1), jnp.arange(number) % CLASSES


def draws(model, *args):
    return model.generator(*args)


def judges(model, *args):
    return model.discriminator(*args)


def ways(call, model, inputs, strategies):
    """What `call` gives of threshold and inputs: masked, its trace, and compact in each of the strategies, whose loops
    never fall back to all examples or the whole map."""

    def run(threshold, *inputs):
        here = at(threshold, model)
        out, trace = dj.traced(call)(still(here), *inputs)
        keep = [decision.keep for decision in trace.decisions.values()]
        return (
            out,
            trace.macs() / trace.full_macs,
            keep,
            [call(still(here, "compact", **s), *inputs) for s in strategies],
        )

    with mock.patch.multiple(execute, BREAK_EVEN_TILES=1e9, BREAK_EVEN_SAMPLES=2.0, CAPACITIES=(0.1, 0.7)):
        return jax.jit(run).lower(jnp.float32(0), *inputs).compile()


BOTH = dict(strategy="loop"), dict(strategy="buckets")


def assert_same(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * float(jnp.abs(wanted).max()))


# Masked equals compact


@pytest.mark.parametrize("form", ["pictures", "tiles", "random", "width", "discriminator"])
def test_masked_equals_compact(form):
    if form == "discriminator":  # two groups, since every number of them is compiled inside of every block
        model, call, inputs, strategies = build(**FORMS[form], discriminator=(2,)), judges, seen(5), [{}]
    else:
        model, call, inputs, strategies = build(**FORMS[form]), draws, given(5), BOTH
    run = ways(call, model, inputs, strategies)
    ends, mixed = [], 0
    for threshold in (LOWEST, -4.0, MIDDLE, 0.0, 2.0, HIGHEST):
        out, share, _, compact = run(jnp.float32(threshold), *inputs)
        for other in compact:
            assert_same(other, out)
        ends.append((out, np.asarray(share)))
        mixed += len(np.unique(share)) > 1
    (most, whole), (least, reduced) = ends[0], ends[-1]
    np.testing.assert_allclose(whole, 1, rtol=1e-6)
    assert (reduced < 0.9).all() and len(np.unique(reduced)) == 1
    assert mixed, "at no threshold do the gates tell the pictures apart"
    assert np.abs(most - least).reshape(5, -1).max(1).min() > 1e-3


@pytest.mark.parametrize("form", ["pictures", "tiles", "width", "generated", "mixed"])
def test_a_picture_is_the_same_in_every_batch_and_execution(form):
    model, (z, label) = build(**FORMS[form]), given(64)

    @jax.jit
    def run(threshold, z, label):
        here = at(threshold, model)
        masked, trace = dj.traced(draws)(still(here), z, label)
        compact = [draws(still(here, "compact"), z[:number], label[:number]) for number in (64, 1)]
        return [masked, *compact], trace.macs()

    pictures, macs = run(jnp.float32(MIDDLE), z, label)
    assert_same(pictures[1], pictures[0])
    assert_same(pictures[2], pictures[0][:1])
    assert np.abs(np.diff(np.asarray(pictures[0]), axis=0)).max((1, 2, 3)).min() > 1e-3, "no two are alike"
    assert (len(np.unique(macs)) > 1) == (form not in ("generated", "mixed"))


def test_generated_kernels_are_those_of_each_picture_by_itself():
    model, (z, label) = build(**FORMS["generated"]), given(3)

    @jax.jit
    def by_hand(z, label):
        found = []
        for index in range(3):
            one, style = (
                nnx.clone(model.generator),
                model.generator.style(z[index : index + 1], label[index : index + 1]),
            )
            for block in (*one.blocks, one.refine.step):
                conv = block.look.conv
                (code,) = conv.attention(style)
                product = conv.left(code).reshape(-1, conv.rank) @ conv.right(code).reshape(conv.rank, -1)
                plain = make(lambda rngs: nnx.Conv(4, 4, (3, 3), rngs=rngs))
                plain.kernel[...] = conv.kernel[...] + product.reshape(conv.kernel.shape)
                plain.bias[...] = conv.bias[...]
                block.look.conv = plain
            found.append(one(z[index : index + 1], label[index : index + 1]))
        return jnp.concatenate(found), model.generator(z, label)

    wanted, found = by_hand(z, label)
    assert_same(found, wanted)


# Sizes


PYRAMID = dict(dynamics="scales", shape=(8, 16, 1), widths=(6, 5, 4), fine=1, discriminator=(3, 4, 5), steps=2)


def test_a_size_is_what_all_sizes_have():
    model, (z, label) = build(**PYRAMID), given(5)

    @jax.jit
    def run(z, label):
        compact = still(model, "compact")
        one_by_one = [still(model).generator(z, label, size=size) for size in range(3)]
        return (
            one_by_one,
            model.generator.sizes(z, label),
            [compact.generator(z, label, size=size) for size in range(3)],
        )

    found = run(z, label)
    assert [each.shape for each in found[0]] == [(5, 8, 16, 1), (5, 4, 8, 1), (5, 2, 4, 1)]
    for mine, all_at_once, compact in zip(*found, strict=True):
        assert_same(all_at_once, mine)
        assert_same(compact, mine)
    for size in (-1, 3):
        with pytest.raises(ValueError, match=f"size={size}: there are painters of 3 sizes, 0 to 2"):
            model.generator(z, label, size=size)
    scores = model.discriminator(found[0][2], label, size=2)
    assert scores.shape == (5,) and len(np.unique(scores)) == 5


def taps(*sides):
    """Of a 3x3 convolution, those on the map."""
    return int(np.prod([3 * side - 2 for side in sides]))


def by_hand(size, latent, widths, steps, coarsest, colours=1, fine=1):
    """MACs of one picture: style, entrance, the maps as far as that of the size, and its painter."""
    height, width = coarsest
    total = (latent + CLASSES) * latent + latent * height * width * widths[0]
    for level in range(len(widths) - size):
        channels, last = widths[level], level == len(widths) - 1
        block = latent * channels + taps(height, width) * channels**2 + height * width * channels**2
        total += block * (steps if last else 1)
        if level == len(widths) - 1 - size:
            return total + taps(height, width) * channels * colours * fine**2
        total += height * width * channels * widths[level + 1]
        height, width = 2 * height, 2 * width


def test_a_small_size_runs_its_prefix_alone():
    # Wide, so that what XLA counts beside products (which it counts too) is little.
    widths = (64, 48, 32)
    made = config(**PYRAMID | dict(widths=widths, latent=32, steps=1))
    model = nnx.eval_shape(lambda: models.build(made, CLASSES, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    inputs = jax.ShapeDtypeStruct((1, 32), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    found = []
    for size in range(3):
        run = functools.partial(lambda model, *args, size: model.generator(*args, size=size), size=size)
        found.append(cost.macs(run, model, *inputs))
        assert found[-1] == by_hand(size, 32, widths, 1, (2, 4))
        of_xla = xla_macs(lambda state, *args, run=run: run(nnx.merge(graphdef, state), *args), state, *inputs)
        assert of_xla == pytest.approx(found[-1], rel=0.04)
    assert found[0] > 2 * found[1] > 4 * found[2]


# Costs


def macs_of(model, call=draws, examples=1):
    return cost.macs(call, still(model), *(given if call is draws else seen)(examples))


def trace_of(model, call, threshold=0.0, number=5):
    inputs = (given if call is draws else seen)(number)
    run = jax.jit(lambda threshold, *inputs: dj.traced(call)(still(at(threshold, model)), *inputs)[1])
    return lambda threshold: run(jnp.float32(threshold), *inputs)


GATE = {"pictures": 4 * 16 + 16, "width": 4 * 16 + 16 * 4, "groups": 4 * 16 + 16 * 4}


def test_so_many_steps_cost_what_a_generator_of_so_many_steps_costs():
    model = build(**FORMS["pictures"])
    fixed = {n: macs_of(build(steps=n)) for n in (1, 2, 3)}
    assert fixed[3] == by_hand(0, 4, (4, 4), 3, (2, 3), fine=2)
    run, numbers = trace_of(model, draws, number=64), set()
    for threshold in (LOWEST, MIDDLE, HIGHEST):
        trace = run(threshold)
        assert trace.full_macs == fixed[3] + 3 * GATE["pictures"]
        assert trace.static_macs == trace.full_macs - 3 * (fixed[3] - fixed[2] + GATE["pictures"])
        (decision,) = trace.decisions.values()
        for taken, macs in zip(np.asarray(decision.keep).sum(1).astype(int), np.asarray(trace.macs()), strict=True):
            assert macs == pytest.approx(fixed[taken] + taken * GATE["pictures"], rel=1e-6)
            numbers.add(taken)
    assert numbers == {1, 2, 3}
    # What every step gives, stopped or not, costs all of the steps.
    assert cost.macs(lambda m, *args: m.generator.predictions(*args)[-1:], still(model), *given(1)) > fixed[3]


def test_so_wide_costs_what_a_view_of_that_width_costs():
    model = build(**FORMS["width"])
    of_width = {width: macs_of(nnx.view(model, width=width)) for width in gan.WIDTHS}
    twin = macs_of(build())
    assert of_width[1.0] == twin
    decisions = 1 + 3  # a block of the coarse map, and one that is applied three times
    run, varied = trace_of(model, draws), set()
    for threshold in (LOWEST, MIDDLE, HIGHEST):
        trace = run(threshold)
        assert len(trace.decisions) == decisions
        assert trace.full_macs == twin + decisions * GATE["width"]
        varied |= set(np.asarray(trace.macs()).tolist())
    assert max(varied) == pytest.approx(trace.full_macs, rel=1e-6) and len(varied) > 2
    assert min(varied) == pytest.approx(of_width[0.25] + decisions * GATE["width"], rel=1e-6)
    # Half of the hidden channels are half of the blocks' products, the scale of the style apart.
    places = {1: (2, 3), 3: (4, 6)}
    block = sum(times * (taps(*place) * 16 + np.prod(place) * 16) for times, place in places.items())
    assert of_width[0.5] == twin - block / 2


def test_tiles_cost_no_more_than_whole_maps_and_stop():
    run, twin = trace_of(build(**FORMS["tiles"]), draws), macs_of(build())
    most, some, least = (run(threshold) for threshold in (LOWEST, MIDDLE, HIGHEST))
    np.testing.assert_allclose(most.macs(), most.full_macs, rtol=1e-6)
    gates = 3 * 2 * 2 * (12 * 16 + 16)  # after every step one for each tile, of what is in it and on the map
    assert most.full_macs == twin + gates
    assert (least.macs() <= some.macs()).all() and len(np.unique(some.macs())) > 2
    (decision,) = least.decisions.values()
    assert np.asarray(decision.keep).sum() == 5 * 4, "every tile takes the first step alone"


def test_generated_kernels_cost_what_they_say():
    model, twin = build(**FORMS["generated"]), macs_of(build())
    rows, rank, hidden = 9 * 4, 4, 16
    one = rows * rank * 4 + hidden * (SMALL["latent"] + rows * rank + rank * 4)
    assert macs_of(model) == twin + (1 + 3) * one
    trace = trace_of(model, draws)(0.0)
    assert trace.static_macs == trace.full_macs == macs_of(model)
    np.testing.assert_allclose(trace.macs(), trace.full_macs)


def test_a_dynamic_discriminator_costs_the_full_one_and_its_gates():
    model, twin = build(**FORMS["discriminator"]), macs_of(build(), judges)
    run = trace_of(model, judges)
    most, least = run(LOWEST), run(HIGHEST)
    assert most.full_macs == twin + 2 * (GATE["pictures"] + GATE["groups"])
    np.testing.assert_allclose(most.macs(), most.full_macs, rtol=1e-6)
    # Both blocks skipped, and so is what looks at their channels; the gates that skip them are left.
    inner = sum(2 * taps(*place) * 16 for place in ((4, 6), (2, 3)))
    np.testing.assert_allclose(least.macs(), twin - inner + 2 * GATE["pictures"], rtol=1e-6)
    # With two of four groups open, half of what the blocks do.
    training.schedule(model.discriminator, 0.0)
    np.testing.assert_allclose(run(LOWEST).macs(), most.full_macs, err_msg="the trace closed over what was")
    half = trace_of(model, judges)(LOWEST)
    np.testing.assert_allclose(half.macs(), most.full_macs - inner / 2, rtol=1e-6)


# The static twin's weights


def test_sorted_hidden_channels_change_nothing_and_the_weightiest_come_first():
    model = build(hidden=3)
    look, x = model.generator.refine.step.look, image(2, 4, 6, 4)
    style = image(2, 4)
    before = look(x, style)
    wanted = np.sort(np.abs(look.linear.kernel[...]).sum(1))[::-1]
    assert (np.diff(np.abs(look.linear.kernel[...]).sum(1)) > 0).any()
    gan.sorted_hidden(look)
    np.testing.assert_allclose(look(x, style), before, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.abs(look.linear.kernel[...]).sum(1), wanted)


@pytest.fixture(scope="module")
def twin():
    """A static twin, what it draws and how it judges."""
    model, (z, label) = build(), given(4)
    return model, jax.jit(lambda m: (m.generator(z, label), m.discriminator(*seen(4))))(still(model))


@pytest.mark.parametrize("form", [form for form in FORMS if form != "random"])
def test_twin_params_give_what_the_static_twin_gives(form, twin):
    model, (pictures, scores) = twin
    state, (z, label) = nnx.state(model, nnx.Param), given(4)

    @nnx.jit
    def made(state):
        return models.build(config(**FORMS[form]), CLASSES, rngs=nnx.Rngs(3), twin_params=state)

    net = made(state)
    dj.budget.set_threshold(net, LOWEST)
    drawn, judged = jax.jit(lambda m: (m.generator(z, label), m.discriminator(*seen(4))))(still(net))
    np.testing.assert_allclose(drawn, pictures, rtol=0, atol=2e-5)
    np.testing.assert_allclose(judged, scores, rtol=1e-4, atol=1e-5)
    assert np.abs(pictures).max() > 0.1
    if form == "width":
        dj.budget.set_threshold(net, HIGHEST)
        at_most = nnx.view(still(net), width=1.0).generator(z, label)
        np.testing.assert_allclose(at_most, pictures, rtol=0, atol=2e-5)
        for block in (*net.generator.blocks, net.generator.refine.step):
            weight = np.abs(block.look.last.layers[1].kernel[...]).sum(1)
            assert (np.diff(weight) <= 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_a_static_twin_that_can_be_built(form):
    other = models.static_twin(config(**FORMS[form]))
    model = nnx.eval_shape(lambda: models.build(other, CLASSES, rngs=nnx.Rngs(0)))
    assert isinstance(model.generator.refine, gan.Repeat) and other.dynamics == "static"
    assert models.difference(config(), config(**FORMS[form])) == ""


# The discriminator's phase


class Says(ChannelGate):
    """The same groups of every two pictures."""

    def __init__(self, keep):
        self.keep = FixedGate(jnp.asarray(keep, jnp.float32), rule=EACH)

    def __call__(self, x):
        return self.keep(x)


def test_a_phase_opens_groups_in_order():
    x = image(2, 3, 3, 4)
    phase = PhaseGate(Says(np.ones((1, 4))), start=0.5, until=0.5)
    assert phase(x).keep.tolist() == [[1, 1, 1, 1]] * 2  # not scheduled: all of it
    opened = []
    for progress in (0.0, 0.1, 0.25, 0.3, 0.5, 1.0):
        training.schedule(phase, jnp.float32(progress))
        decision = phase(x)
        opened.append(int(decision.keep[0].sum()))
        np.testing.assert_array_equal(decision.keep, [[1] * opened[-1] + [0] * (4 - opened[-1])] * 2)
        np.testing.assert_array_equal(decision.probability, decision.keep)
    assert opened == [2, 3, 3, 4, 4, 4]
    quarter = PhaseGate(Says(np.ones((1, 4))), start=0.25, until=1.0)
    assert [_opened(quarter, progress, x) for progress in (0.0, 1 / 3, 2 / 3, 1.0)] == [1, 2, 3, 4]


def _opened(phase, progress, x):
    phase.schedule(progress)
    return int(phase(x).keep[0].sum())


def test_the_picture_has_a_say_within_the_phase():
    phase = PhaseGate(Says([[0, 1, 0, 1], [1, 1, 1, 0]]))
    phase.schedule(0.0)
    np.testing.assert_array_equal(phase(image(2, 3, 3, 4)).keep, [[0, 1, 0, 0], [1, 1, 0, 0]])


def test_the_schedule_reaches_every_block_and_only_by_it():
    model = build(**FORMS["discriminator"])
    training.schedule(model, 0.25)
    shares = [float(each.share[...]) for _, each in nnx.iter_modules(model) if isinstance(each, PhaseGate)]
    assert shares == pytest.approx([0.75, 0.75])
    assert jax.tree.leaves(nnx.state(model, nnx.Param)) and "share" not in str(nnx.state(model, nnx.Param))


# What is refused


def test_pictures_of_classes_want_labels():
    model, (z, label) = build(), given(2)
    with pytest.raises(ValueError, match=r"this generator draws 3 classes: give the labels \(B,\)"):
        model(z)
    with pytest.raises(ValueError, match=r"this discriminator knows 3 classes: give the labels \(B,\)"):
        model.discriminator(image(2, 8, 12, 1))
    free = build(conditional=False)
    without, with_labels = jax.jit(lambda m: (m(z), m(z, label)))(free)
    assert free.classes == 0 and without.shape == (2, 8, 12, 1)
    np.testing.assert_array_equal(without, with_labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(widths=()), r"--model\.widths is empty: it must be one number of channels for each map"),
        (dict(widths=(4, 4, 4, 4)), r"--model\.widths is 4 4 4 4: it must be fewer: 8x12 pixels are no multiple of 16"),
        (dict(shape=(9, 12, 1)), r"--model\.widths is 4 4: .* 9x12 pixels are no multiple of 4"),
        (dict(fine=5), r"--model\.widths is 4 4: .* no multiple of 10"),
        (dict(widths=(4, 0)), r"--model\.widths is 4 0: it must be each from 1"),
        (dict(discriminator=()), r"--model\.discriminator is empty: it must be one number"),
        (dict(discriminator=(4, 4, 4, 4)), r"--model\.discriminator is 4 4 4 4: .* no multiple of 16"),
        (dict(dynamics="scales", discriminator=(4,)), r"--model\.discriminator is 4: .* each of the 2 sizes"),
        (dict(dynamics="scales", widths=(4,), discriminator=(4,)), r"--model\.widths is 4: it must be two numbers"),
        (dict(dynamics="scales", gate="random"), r"--model\.gate is random: it must be learned"),
        (dict(gate="random"), r"--model\.gate is random: it must be learned"),
        (dict(tile=4), r"--model\.tile is 4: it must be 0: only pictures that are refined in steps have tiles"),
        (dict(dynamics="width", tile=4), r"--model\.tile is 4: it must be 0"),
        (dict(dynamics="steps", tile=-1), r"--model\.tile is -1: it must be from 0"),
        (dict(shape=(8, 12, 2)), r"--model\.shape is 8 12 2: .* 1 or 3"),
        (dict(steps=0), r"--model\.steps is 0: it must be from 1"),
        (dict(hidden=0), r"--model\.hidden is 0"),
    ],
)
def test_configurations_that_make_no_sense(changes, message):
    with pytest.raises(UserError, match=message):
        models.build(config(**changes), CLASSES, rngs=nnx.Rngs(0))


def test_bytes_and_numbers_are_each_others_inverse():
    x = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    model = build()
    np.testing.assert_array_equal(gan.to_bytes(model.pixels(x)), x)
    assert model.pixels(x).shape == (1, 16, 16, 1)
    np.testing.assert_array_equal(gan.to_bytes(jnp.array([-9.0, 9.0]).reshape(1, 1, 2, 1))[..., 0], [[[0, 255]]])
    np.testing.assert_allclose(gan.halved(model.pixels(x))[0, 0, 0], model.pixels(x)[0, :2, :2].mean((0, 1)), rtol=1e-6)
