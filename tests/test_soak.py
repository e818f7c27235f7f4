"""The soak run counts what falls short, and ends with what it has."""

import csv

import pytest

# The parts need nothing of what makes tests quick, and a run in earnest is `make soak`.
import soak


def outcomes(*found):
    def part(seed):
        for each in found:
            if each is None:
                raise KeyboardInterrupt
            yield [("a kind", each or None), ("another", None)]

    return part


@pytest.mark.parametrize(
    ("found", "tried", "short", "status"),
    [
        (["", "", ""], 3, 0, 0),
        (["", "differs", "differs"], 3, 2, 1),
        (["", None, "differs"], 1, 0, 0),
    ],
)
def test_counts(monkeypatch, tmp_path, capsys, found, tried, short, status):
    monkeypatch.setattr(soak, "PARTS", {"files": (outcomes(*found), 1.0)})
    out = tmp_path / "soak.csv"
    assert soak.main(["--only", "files", "--out", str(out)]) == status
    with open(out, newline="") as file:
        lines = {line["kind"]: line for line in csv.DictReader(file)}
    assert (int(lines["a kind"]["tried"]), int(lines["a kind"]["fell_short"])) == (tried, short)
    assert lines["another"]["fell_short"] == "0" and lines["another"]["hardware"]
    said = capsys.readouterr()
    assert said.err.count("a kind: differs") == short and said.out.splitlines()[-1].split() == [
        "all",
        str(2 * tried),
        str(short),
    ]


def test_a_part_ends_when_its_time_is_over(monkeypatch, tmp_path):
    monkeypatch.setattr(soak, "PARTS", {"files": (outcomes(*[""] * 10**6), 1.0)})
    assert soak.main(["--only", "files", "--minutes", "1e-9", "--out", str(tmp_path / "soak.csv")]) == 0


@pytest.mark.slow
def test_every_part_in_its_quick_form(tmp_path, capsys):
    status = soak.main(["--minutes", "0.2", "--out", str(tmp_path / "soak.csv")])
    assert status == 0, capsys.readouterr().out
