import contextlib
import os
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynjax.config import BudgetConfig, Config, DataConfig, UserError
from dynjax.models.resnet import ResNetConfig
from dynjax.run import checkpoint
from dynjax.run.arrays import fill, key_data, named_arrays
from dynjax.run.workdir import check_workdir, write_config


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
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(key_data(x), key_data(y)), a, b)


def test_everything_comes_back(tmp_path):
    checkpoint.save(tmp_path, 3, state(5), {"next": 7, "inner": [1, None]})
    step, arrays, position = checkpoint.read_newest(tmp_path)
    assert (step, position) == (3, {"next": 7, "inner": [1, None]})
    assert set(arrays) == {"params.kernel", "params.list.0", "params.list.1", "count", "key"}
    filled = fill(state(0), arrays)
    same(filled, state(5))
    assert jax.random.uniform(filled["key"]) == jax.random.uniform(jax.random.key(5))


def test_the_newest_stay_and_a_step_can_be_written_again(tmp_path):
    for step in range(1, 6):
        checkpoint.save(tmp_path, step, state(step), step)
    assert checkpoint.steps(tmp_path) == [3, 4, 5]
    checkpoint.save(tmp_path, 5, state(50), 50)
    assert checkpoint.read(tmp_path, 5)[0]["count"] == 50


def test_the_last_good_one_stays(tmp_path):
    for step in range(1, 7):
        checkpoint.save(tmp_path, step, state(step), step, good=2 if step > 2 else -1)
    assert checkpoint.steps(tmp_path) == [2, 4, 5, 6]


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
        same(fill(state(0), arrays), state(step))
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
    arrays = named_arrays(state())
    change(arrays)
    with pytest.raises(ValueError, match=message):
        fill(state(), arrays)


ROW = Config(row="a", model=ResNetConfig(), data=DataConfig(size=(4, 6)), budget=BudgetConfig(target=0.25))


def test_load_wants_a_checkpoint(tmp_path):
    write_config(tmp_path, ROW, ("a", "b"))
    with pytest.raises(UserError, match="has no checkpoint yet"):
        checkpoint.load(tmp_path)


# What else lies in a workdir


def test_only_what_orbax_left_half_written_is_removed(tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 6):
        checkpoint.save(tmp_path, step, state(step), None)
    shutil.copytree(folder / "6", folder / "6-backup")
    for name in ("best", "²", "007", "9.orbax-checkpoint-tmp", "9.orbax-checkpoint-tmp-1234"):
        (folder / name).mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "12").write_text("a file")
    assert checkpoint.steps(tmp_path) == [1, 2, 6]
    checkpoint.tidy(tmp_path, 2)
    assert {path.name for path in folder.iterdir()} == {"1", "2", "6-backup", "best", "²", "007", "notes.txt", "12"}
    assert [path.name for path in (tmp_path / "unreadable").iterdir()] == ["6"]


def test_links_and_files_do_not_stop_pruning(tmp_path):
    """The oldest checkpoint is a link to another disk, a later one is in the way as a file, another as a dead link."""
    folder = tmp_path / "w" / "checkpoints"
    folder.mkdir(parents=True)
    checkpoint.save(tmp_path / "w", 1, state(1), None)
    (folder / "1").rename(tmp_path / "elsewhere")
    (folder / "1").symlink_to(tmp_path / "elsewhere")
    assert checkpoint.read_newest(tmp_path / "w")[0] == 1
    (folder / "2").write_text("a file")
    (folder / "3").symlink_to(tmp_path / "nowhere")
    for step in (2, 3, 4):
        checkpoint.save(tmp_path / "w", step, state(step), None)
    assert checkpoint.steps(tmp_path / "w") == [2, 3, 4] and not os.path.lexists(folder / "1")
    assert (tmp_path / "elsewhere" / checkpoint.SEAL).exists()
    assert (tmp_path / "w" / "unreadable" / "2").read_text() == "a file"


@pytest.mark.parametrize("name", ["checkpoints", "unreadable"])
def test_a_file_where_a_folder_should_be(tmp_path, name):
    (tmp_path / name).write_text("")
    assert checkpoint.steps(tmp_path) == []
    with pytest.raises(UserError, match=f"{name} is no folder: move it away"):
        check_workdir(tmp_path, ROW)


def test_a_workdir_that_is_there_no_more(tmp_path):
    with pytest.raises(UserError, match=r"workdir .*/w is there no more: it was moved or removed while training"):
        checkpoint.save(tmp_path / "w", 1, state(), None)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_more_or_fewer_processes(tmp_path, monkeypatch):
    """Each process has a position of its own; who was not there takes that of the first."""
    checkpoint.save(tmp_path, 1, state(1), "first")
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    arrays, position = checkpoint.read(tmp_path, 1)
    assert position == "first"
    same(fill(state(0), arrays), state(1))


@contextlib.contextmanager
def disk_of(kilobytes, folder):
    folder.mkdir(exist_ok=True)
    made = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(made, capture_output=True).returncode:
        pytest.skip("small file systems cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("looks_first", [True, False])
def test_a_small_disk_is_full_in_one_line(tmp_path, monkeypatch, capfd, looks_first):
    """Also where the room that was seen is not there (a quota): what is unfinished goes, what is finished stays."""
    if not looks_first:
        monkeypatch.setattr(checkpoint, "_check_room", lambda *args: None)
    for kilobytes in (8, 20, 40, 60):
        with disk_of(kilobytes, tmp_path / "disk") as disk:
            with pytest.raises(UserError, match=r"cannot write checkpoint \d+ in .*: No space left on device"):
                for step in range(1, 9):
                    checkpoint.save(disk, step, state(step), step)
            left = checkpoint.steps(disk)
            assert {path.name for path in (disk / "checkpoints").iterdir()} == {str(step) for step in left}
            for step in left:
                same(fill(state(0), checkpoint.read(disk, step)[0]), state(step))
    assert capfd.readouterr().err == ""
