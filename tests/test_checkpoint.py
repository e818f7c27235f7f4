import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynjax import checkpoint
from dynjax.config import BudgetConfig, Config, DataConfig, UserError


def state(seed: int = 0) -> dict:
    key = jax.random.key(seed)
    return {
        "params": {
            "kernel": jax.random.normal(key, (16, 8)),
            "list": [jnp.ones(3) * seed, jnp.zeros((), jnp.bfloat16)],
        },
        "count": jnp.uint32(seed),
        "key": key,
    }


def same(a, b) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(checkpoint._key_data(x), checkpoint._key_data(y)), a, b)


def test_everything_comes_back(tmp_path):
    checkpoint.save(tmp_path, 3, state(5), {"next": 7, "inner": [1, None]})
    step, arrays, position = checkpoint.read_newest(tmp_path)
    assert (step, position) == (3, {"next": 7, "inner": [1, None]})
    assert set(arrays) == {"params.kernel", "params.list.0", "params.list.1", "count", "key"}
    filled = checkpoint.fill(state(0), arrays)
    same(filled, state(5))
    assert jax.random.uniform(filled["key"]) == jax.random.uniform(jax.random.key(5))


def test_the_newest_stay_and_a_step_can_be_written_again(tmp_path):
    for step in range(1, 6):
        checkpoint.save(tmp_path, step, state(step), step)
    assert checkpoint.steps(tmp_path) == [3, 4, 5]
    checkpoint.save(tmp_path, 5, state(50), 50)
    assert checkpoint.read(tmp_path, 5)[0]["count"] == 50


def test_nothing_yet(tmp_path):
    assert checkpoint.steps(tmp_path) == []
    assert checkpoint.read_newest(tmp_path) is None


def damage(how: str, path) -> None:
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "gone":
        path.unlink()
    elif content:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :])


@pytest.mark.parametrize("how", ["truncated", "emptied", "gone", "changed"])
def test_any_damaged_file_is_noticed_or_does_no_harm(tmp_path, how):
    """Each file of the newest in turn: the arrays come back as they were, or those of the one before and it is said."""
    checkpoint.save(tmp_path, 1, state(1), "one")
    checkpoint.save(tmp_path, 2, state(2), "two")
    whole = tmp_path / "checkpoints" / "2"
    shutil.copytree(whole, tmp_path / "copy")
    files = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file()]
    fell_back = []
    for name in files:
        shutil.rmtree(whole)
        shutil.copytree(tmp_path / "copy", whole)
        damage(how, whole / name)
        said = []
        step, arrays, position = checkpoint.read_newest(tmp_path, say=said.append)
        same(checkpoint.fill(state(0), arrays), state(step))
        assert position == {1: "one", 2: "two"}[step]
        if step == 1:
            fell_back.append(name)
            assert len(said) == 1 and "checkpoint 2" in said[0] and "falling back to checkpoint 1" in said[0]
    sizes = {name: (tmp_path / "copy" / name).stat().st_size for name in files}
    assert set(fell_back) >= {name for name, size in sizes.items() if size or how == "gone"}


def test_none_can_be_read(tmp_path, capsys):
    checkpoint.save(tmp_path, 4, state(), None)
    (tmp_path / "checkpoints" / "4" / "sidecar" / "process_0.json").write_text("{")
    with pytest.raises(UserError, match=r"no checkpoint of .* can be read \(steps \[4\]"):
        checkpoint.read_newest(tmp_path)
    assert "sidecar/process_0.json is damaged" in capsys.readouterr().err


def test_killed_before_the_first_was_finished(tmp_path):
    checkpoint.save(tmp_path, 4, state(), None)
    (tmp_path / "checkpoints" / "4" / checkpoint.SEAL).unlink()
    said = []
    assert checkpoint.read_newest(tmp_path, say=said.append) is None
    assert "was not finished" in said[0]


def test_tidy_moves_later_ones_aside_and_drops_unfinished(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state(step), None)
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()
    checkpoint.tidy(tmp_path, 1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    assert [path.name for path in (tmp_path / "unreadable").iterdir()] == ["2"]


def test_full_disk(tmp_path, monkeypatch):
    from orbax.checkpoint import v1 as ocp

    def full(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: writing d/12: No space left on device [tensorstore spec]")

    monkeypatch.setattr(ocp, "save_checkpointables", full)
    with pytest.raises(UserError, match=r"cannot write checkpoint 3 in .*: No space left on device"):
        checkpoint.save(tmp_path, 3, state(), None)


def test_other_errors_of_saving_are_not_hidden(tmp_path, monkeypatch):
    from orbax.checkpoint import v1 as ocp

    monkeypatch.setattr(ocp, "save_checkpointables", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoint.save(tmp_path, 3, state(), None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("count"), "count is missing"),
        (
            lambda arrays: arrays.update(count=jnp.zeros(2, jnp.uint32)),
            r"count is uint32\[2\], the model wants uint32\[\]",
        ),
        (lambda arrays: arrays.update(count=jnp.float32(0)), r"count is float32\[\], the model wants uint32\[\]"),
    ],
)
def test_arrays_that_do_not_fit(change, message):
    arrays = checkpoint.named_arrays(state())
    change(arrays)
    with pytest.raises(ValueError, match=message):
        checkpoint.fill(state(), arrays)


ROW = Config(row="a", data=DataConfig(size=(4, 6)), budget=BudgetConfig(target=0.25))


def test_configuration_comes_back(tmp_path):
    checkpoint.check_workdir(tmp_path / "deep" / "down", ROW)
    checkpoint.write_config(tmp_path, ROW, ("sky", "road"))
    assert checkpoint.read_config(tmp_path) == (ROW, ("sky", "road"))
    checkpoint.check_workdir(tmp_path, dataclasses.replace(ROW, checkpoint_every=1, evaluate_every=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(row="b"), "was made by row a, this is row b"),
        (dict(steps=5), "steps is 1000 there and 5 here"),
        (dict(budget=BudgetConfig(target=0.5)), "budget.target is 0.25 there and 0.5 here"),
        (dict(data=DataConfig(size=(4, 8))), r"data.size is \[4, 6\] there and \[4, 8\] here"),
    ],
)
def test_workdir_of_another_run(tmp_path, changes, message):
    checkpoint.write_config(tmp_path, ROW, ())
    with pytest.raises(UserError, match=message):
        checkpoint.check_workdir(tmp_path, dataclasses.replace(ROW, **changes))


def test_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write in workdir .*file/w: Not a directory"):
        checkpoint.check_workdir(tmp_path / "file" / "w", ROW)


def test_no_workdir(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        checkpoint.read_config(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", '{"config": {"row": "a", "colour": 1}, "classes": []}', '{"config": 1}'])
def test_config_that_is_none(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"cannot be read|unknown field 'colour'"):
        checkpoint.read_config(tmp_path)


def test_fields_added_later_take_their_default(tmp_path):
    checkpoint.write_config(tmp_path, ROW, ())
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["config"]["precision"], stored["config"]["data"]["on_error"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert checkpoint.read_config(tmp_path)[0] == ROW


def test_load_wants_a_checkpoint(tmp_path):
    checkpoint.write_config(tmp_path, ROW, ("a", "b"))
    with pytest.raises(UserError, match="has no checkpoint yet"):
        checkpoint.load(tmp_path)
