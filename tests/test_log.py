import errno
import json
import math
import multiprocessing
import resource

import pytest

from dynjax.config import UserError
from dynjax.run import log


def make(workdir, start=0, quiet=True):
    return log.Log(workdir, start=start, steps=10, images_per_step=4, quiet=quiet)


def write(workdir, start, end):
    made = make(workdir, start)
    for step in range(start + 1, end + 1):
        made.train(step, {"loss": 1.0 / step})
    made.evaluation(end, {"miou": 0.5, "iou": [1.0, math.nan]})
    made.close()


def test_one_json_line_a_record(tmp_path):
    write(tmp_path, 0, 3)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in lines]
    assert [record["step"] for record in records] == [1, 2, 3, 3]
    assert records[1]["loss"] == 0.5 and records[1]["time"] > 1.7e9
    assert records[3]["val/miou"] == 0.5 and records[3]["val/iou"] == [1.0, None]
    assert log.read_metrics(tmp_path) == records


def test_a_resumed_run_drops_the_steps_it_takes_again(tmp_path):
    write(tmp_path, 0, 5)
    write(tmp_path, 3, 6)
    assert [record["step"] for record in log.read_metrics(tmp_path) if "loss" in record] == [1, 2, 3, 4, 5, 6]


def test_a_half_written_line_is_dropped(tmp_path):
    write(tmp_path, 0, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    assert [record["step"] for record in log.read_metrics(tmp_path)] == [1, 2]
    assert log.read_metrics(tmp_path / "nowhere") == []


def test_tensorboard_gets_every_number(tmp_path):
    write(tmp_path, 0, 2)
    content = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"train/loss" in content and b"val/miou" in content and b"images_per_second" in content


def test_the_bar_shows_what_matters(tmp_path, capsys):
    made = make(None, quiet=False)
    made.evaluation(0, {"miou": 0.25})
    for step in range(1, 11):
        made.train(step, {"loss": 2.0, "macs_fraction": 0.5})
    made.close()
    said = capsys.readouterr().err
    assert "10/10" in said and "mIoU=0.250, loss=2.000, MACs=50%, images/s=" in said
    assert list(tmp_path.iterdir()) == []


def test_the_rate_leaves_out_the_first_step_and_pauses(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
    made = make(None)
    for step, seconds in ((1, 60.0), (2, 2.0), (3, 2.0)):
        now[0] += seconds
        made.train(step, {"loss": 1.0})
    assert made.seconds_per_step == 2.0 and made.shown["images/s"] == "2.0"
    now[0] += 100.0
    made.pause()
    now[0] += 2.0
    made.train(4, {"loss": 1.0})
    assert made.seconds_per_step == 2.0


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the log in .*file: Not a directory"):
        make(tmp_path / "file")


@pytest.mark.parametrize("bytes_left", [0, 10, 60, 100, 200, 400])
def test_a_full_disk_is_one_line_and_the_log_goes_on(tmp_path, bytes_left, capfd):
    """By the largest size of a file, which needs no small disk; TensorBoard's file and ours fill up in turn."""
    write(tmp_path, 0, 3)
    before = log.read_metrics(tmp_path)
    size = max(
        (tmp_path / "metrics.jsonl").stat().st_size, *(p.stat().st_size for p in (tmp_path / "tensorboard").iterdir())
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    made = make(tmp_path, 3)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + bytes_left, limits[1]))
    try:
        with pytest.raises(UserError, match=f"cannot write .*: {log.os.strerror(errno.EFBIG)}"):
            for step in range(4, 40):
                made.train(step, {"loss": 1.0 / step})
                made.flush()
        made.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log.read_metrics(tmp_path)[: len(before)] == before
    write(tmp_path, 3, 5)
    assert [record["step"] for record in log.read_metrics(tmp_path) if "loss" in record] == [1, 2, 3, 4, 5]
    assert capfd.readouterr().err == ""


def test_without_shared_memory(tmp_path, monkeypatch):
    """A read-only /dev/shm is no fault of the workdir's: nothing here needs it."""

    def none(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(multiprocessing, "Queue", none)
    write(tmp_path, 0, 2)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_a_log_that_was_removed(tmp_path):
    made = make(tmp_path)
    made.train(1, {"loss": 1.0})
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics.jsonl was removed while training"):
        made.train(2, {"loss": 1.0})
    made.close()


def test_which_steps_were_evaluated(tmp_path):
    write(tmp_path, 0, 3)
    assert [log.evaluated(tmp_path, step) for step in (2, 3, 4)] == [False, True, False]
