"""Documents that anybody may have changed: read, or refused in one line."""

import dataclasses
import json
from math import nan
from typing import Literal

import damage_json
import jax.numpy as jnp
import pytest

from dynjax.config import UserError
from dynjax.run import checkpoint, files, log
from dynjax.run.workdir import read_config, write_config
from dynjax.show import report
from dynjax.show.curve import Point
from experiments import deployed, evaluate, results, rows, table


@dataclasses.dataclass(frozen=True)
class Inner:
    share: float = 0.5
    sides: tuple[int, int] | None = None
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Outer:
    count: int
    kind: Literal["a", "b"] = "a"
    on: bool = True
    inner: Inner = Inner()


def test_what_fits_comes_back():
    text = '{"count": 3, "kind": "b", "on": false, "inner": {"share": 1, "sides": [2, 3], "names": ["x"]}}'
    found = files.typed(files.parse_json(text), Outer)
    assert found == Outer(3, "b", False, Inner(1.0, (2, 3), ("x",))) and type(found.inner.share) is float
    assert files.typed({"count": 1, "inner": {"sides": None}, "other": 4}, Outer, more=True) == Outer(1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"count": ""}', r'count is "": it must be a whole number'),
        ('{"count": true}', "count is true: it must be a whole number"),
        ('{"count": 1.0}', "count is 1.0: it must be a whole number"),
        ("{}", "count is missing"),
        ("[]", "the document is .*: it must be an object"),
        ('{"count": 1, "cuont": 2}', 'unknown field "cuont" of Outer: did you mean count'),
        ('{"count": 1, "kind": "c"}', 'kind is "c": it must be one of a, b'),
        ('{"count": 1, "on": 1}', "on is 1: it must be true or false"),
        ('{"count": 1, "inner": {"share": "1"}}', r"inner\.share is .*: it must be a number"),
        ('{"count": 1, "inner": {"share": NaN}}', "NaN is no value"),
        ('{"count": 1, "inner": {"sides": [1]}}', r"inner\.sides is \[1\]: it must be a list of 2 values"),
        ('{"count": 1, "inner": {"sides": [1, null]}}', r"inner\.sides\[1\] is null"),
        ('{"count": 1, "inner": {"names": "ab"}}', r"inner\.names is \"ab\": it must be a list"),
        ('{"count": 1, "count": 2}', '"count" is given twice'),
        ("[" * 100_000, "nested too deeply"),
        (b"\xff\xfe\x00", "not UTF-8|no JSON"),
        ('{"count": 1', "no JSON at line 1"),
    ],
)
def test_what_does_not_fit_is_said(text, message):
    with pytest.raises(ValueError, match=message):
        files.typed(files.parse_json(text), Outer)


def test_folders_are_asked_and_not_made(tmp_path):
    (tmp_path / "file").write_text("")
    assert files.folder_trouble(tmp_path / "a" / "b") is None
    assert files.folder_trouble(tmp_path / "file" / "b") == "Not a directory"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# Every document that is read again, damaged in many ways


@pytest.mark.parametrize("row", ["digits_unet_tiles", "digits_codes"])
def test_damaged_configurations(tmp_path, row):
    write_config(tmp_path, rows.ROWS[row](), ("a", "b"), 5)

    def read(content):
        (tmp_path / "config.json").write_bytes(content)
        return read_config(tmp_path)

    counts = damage_json.read_all(damage_json.mutants((tmp_path / "config.json").read_text(), count=300), read)
    assert counts["read"] and counts["refused"] > counts["read"]


def test_damaged_sidecars(tmp_path):
    path = tmp_path / "process_0.json"
    arrays = {"count": [[], "uint32"], "kernel": [[4, 3], "bfloat16"], "key": [[2], "uint32"]}

    def read(content):
        path.write_bytes(content)
        try:
            return checkpoint._read_sidecar(path)
        except ValueError as error:
            raise UserError(str(error)) from None

    text = json.dumps({"position": {"next": 7}, "arrays": arrays})
    counts = damage_json.read_all(damage_json.mutants(text), read)
    assert counts["read"] and counts["refused"] > counts["read"]


@pytest.mark.parametrize("text", ["[]", '{"position": 1, "arrays": {"count": 3}}', "[" * 100_000])
def test_a_sidecar_of_another_kind_falls_back_to_the_checkpoint_before(tmp_path, text):
    """Its checksum is right: somebody wrote it."""
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"count": jnp.uint32(step)}, step)
    folder, said = tmp_path / "checkpoints" / "2", []
    (folder / "sidecar" / "process_0.json").write_text(text)
    checkpoint._seal(folder)
    step, arrays, position = checkpoint.read_newest(tmp_path, say=said.append)
    assert (step, int(arrays["count"]), position) == (1, 1, 1)
    assert len(said) == 1 and "sidecar/process_0.json" in said[0] and "\n" not in said[0]


RECORD = {
    "row": "digits_nextscale",
    "data": "digits8",
    "split": "test",
    "seed": 0,
    "step": 2,
    "hardware": "a machine",
    "commit": "",
    "command": "python",
    "size": [8, 8],
    "score": "bits/dim",
    "thresholds": {"0.5": 0.25},
    "calibration": {"0.5": {"met": True, "mean": 3.0}},
    "scores": {"0.5": {"bits_per_dim": 1.5, "iou": [None, 0.5]}},
    "more": 1,
}
POINT = Point(0.5, 1.5, nan, 3.0, 0.5, nan, nan, nan, nan, True, 3.0, 3.0, 6.0, images=2)


def test_damaged_evaluations(tmp_path, capsys):
    report.write_points(tmp_path / "curve.csv", [POINT])

    def read(content):
        (tmp_path / "evaluation.json").write_bytes(content)
        known = deployed.read_evaluation(str(tmp_path), 2)
        assert known is None or all(isinstance(each, float) for each in known.thresholds.values())
        return results.collect((str(tmp_path),), "")

    (line,) = read(json.dumps(RECORD).encode())
    assert (line.score, line.mmacs, line.met) == ("1.5000", "0.0", "yes")
    counts = damage_json.read_all(damage_json.mutants(json.dumps(RECORD), count=300), read)
    assert counts["read"] and counts["refused"] > counts["read"]
    assert all(line.endswith("the budget is solved anew") for line in capsys.readouterr().err.splitlines())
    assert evaluate.read_record(tmp_path / "nowhere") is None


def test_damaged_logs(tmp_path):
    good = json.dumps({"step": 1, "time": 1.5, "loss": 2.0, "val/iou": [0.5, None]})

    def read(content):
        (tmp_path / "metrics.jsonl").write_bytes(f"{good}\n".encode() + content + f"\n{good}\n".encode())
        kept = log.read_metrics(tmp_path)
        assert len(kept) >= 2 and json.loads(good) in kept
        return max(record["step"] for record in kept)

    counts = damage_json.read_all(damage_json.mutants(good), read)
    assert not counts["refused"]


def test_a_resumed_log_is_json_whatever_was_in_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 1e999}\n[]\n{"step": "1"}\n{"loss": 1}\n{"step": 9}\n{"st'
    )
    log.Log(tmp_path, start=3, steps=9, images_per_step=1, quiet=True).close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 1, "loss": None}
    ]


def test_a_table_of_results_that_is_none(tmp_path):
    path = tmp_path / "results.csv"
    for content in (
        b"row\nx\n",
        b"\xff\xfe\n",
        b"",
        (",".join(f.name for f in dataclasses.fields(table.Result))).encode() + b"\nx\n",
    ):
        path.write_bytes(content)
        try:
            assert table.read(path) == []
        except UserError as error:
            assert "\n" not in str(error)
