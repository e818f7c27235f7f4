import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from dynjax.config import UserError
from dynjax.run import mesh


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "DYNJAX_DISTRIBUTED"):
        monkeypatch.delenv(name, raising=False)


def test_one_axis_over_all_devices():
    made = mesh.make_mesh()
    assert dict(made.shape) == {"data": 8} and made.axis_types == (AxisType.Auto,)
    assert dict(mesh.make_mesh(2).shape) == {"data": 2}


def test_a_batch_is_split_and_comes_back_in_order():
    made = mesh.make_mesh()
    batch = mesh.share(made, {"image": np.arange(16 * 3).reshape(16, 3), "mask": np.arange(16)})
    assert batch["image"].addressable_shards[0].data.shape == (2, 3)
    assert len(batch["mask"].sharding.device_set) == 8
    np.testing.assert_array_equal(batch["image"], np.arange(48).reshape(16, 3))


def test_replicated_copies_may_be_donated():
    made = mesh.make_mesh()
    state = {"x": jnp.arange(4.0), "half": jnp.ones(2, jnp.bfloat16), "key": jax.random.key(3)}
    copies = mesh.replicate(made, state)
    assert all(x.is_fully_replicated and len(x.sharding.device_set) == 8 for x in jax.tree.leaves(copies))
    assert jax.random.bits(copies["key"]) == jax.random.bits(jax.random.key(3))
    jax.jit(lambda x: x + 1, donate_argnums=0)(copies["x"])
    assert copies["x"].is_deleted()
    np.testing.assert_array_equal(state["x"], [0, 1, 2, 3])


def test_alone():
    assert mesh.initialize() is False
    assert mesh.processes() == {"process_index": 0, "process_count": 1}
    assert mesh.any_process(True) is True and mesh.any_process(False) is False


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1"},
            "JAX_COORDINATOR_ADDRESS set without JAX_NUM_PROCESSES and JAX_PROCESS_ID",
        ),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "set without JAX_COORDINATOR_ADDRESS"),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
            "must be whole numbers: .*'two'",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "JAX_PROCESS_ID is 2: it must be from 0 to JAX_NUM_PROCESSES - 1, which is 1",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "nowhere", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
            "JAX_COORDINATOR_ADDRESS is 'nowhere': it must be HOST:PORT",
        ),
    ],
)
def test_an_environment_that_is_incomplete(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        mesh.initialize()
