import dataclasses
import json
import os
import subprocess

import pytest

from dynjax.config import BudgetConfig, Config, DataConfig, UserError
from dynjax.models.resnet import ResNetConfig
from dynjax.run import lock
from dynjax.run.workdir import check_workdir, read_config, write_config

ROW = Config(row="a", model=ResNetConfig(), data=DataConfig(size=(4, 6)), budget=BudgetConfig(target=0.25))


def test_configuration_comes_back(tmp_path):
    check_workdir(tmp_path / "deep" / "down", ROW)
    write_config(tmp_path, ROW, ("sky", "road"))
    assert read_config(tmp_path) == (ROW, ("sky", "road"))
    check_workdir(tmp_path, dataclasses.replace(ROW, checkpoint_every=1, evaluate_every=3))


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
    write_config(tmp_path, ROW, ())
    with pytest.raises(UserError, match=message):
        check_workdir(tmp_path, dataclasses.replace(ROW, **changes))


def test_the_labelled_pictures_are_kept_and_must_be_the_same(tmp_path):
    labelled = ("3 c.png", "17 \udce9t\udce9.png")  # a name that is not UTF-8
    write_config(tmp_path, ROW, ("a", "b"), 2, labelled)
    assert (tmp_path / "labelled.txt").read_bytes() == b"3 c.png\n17 \xe9t\xe9.png\n"
    check_workdir(tmp_path, ROW, ("a", "b"), 2, labelled)
    with pytest.raises(UserError, match=r"other labelled pictures: 4 d\.png is one there or here alone"):
        check_workdir(tmp_path, ROW, ("a", "b"), 2, (*labelled, "4 d.png"))
    write_config(tmp_path / "all", ROW, (), 2)
    assert not (tmp_path / "all" / "labelled.txt").exists()


def test_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write in workdir .*file/w: Not a directory"):
        check_workdir(tmp_path / "file" / "w", ROW)


def test_no_workdir(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", '{"config": {"row": "a", "colour": 1}, "classes": []}', '{"config": 1}'])
def test_config_that_is_none(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"cannot be read|unknown field 'colour'"):
        read_config(tmp_path)


def test_fields_added_later_take_their_default(tmp_path):
    write_config(tmp_path, ROW, ())
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["config"]["precision"], stored["config"]["data"]["on_error"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert read_config(tmp_path)[0] == ROW


# One run at a time


def test_one_at_a_time(tmp_path):
    with lock.hold(tmp_path):
        with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on \S+: wait for it, or give another"):
            with lock.hold(tmp_path):
                pass
    with pytest.raises(ZeroDivisionError), lock.hold(tmp_path):
        raise ZeroDivisionError
    holder = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print(1, flush=True); time.sleep(99)"
    )
    process = subprocess.Popen([os.sys.executable, "-S", "-c", holder, tmp_path / "lock"], stdout=subprocess.PIPE)
    process.stdout.read(1)
    with pytest.raises(UserError, match="in use by another process"), lock.hold(tmp_path):
        pass
    process.kill()  # nothing is left behind
    process.communicate()
    with lock.hold(tmp_path):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def none(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with lock.hold(tmp_path):
        pass
