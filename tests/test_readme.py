import itertools
import pathlib
import re

import pytest

from experiments.rows import ROWS

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_there_is_code_to_run():
    assert BLOCKS


def test_code_runs():
    """In its order: a later block goes on with what an earlier one made."""
    names = {}
    for code in BLOCKS:
        exec(compile(code, "README.md", "exec"), names)


def test_links_point_to_files():
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_row_is_named_and_no_other():
    table = README[README.index("| rows | data |") :].split("\n\n")[0]
    firsts = [line.split("|")[1] for line in table.splitlines()[2:]]
    named = []
    for name in re.findall(r"`([^`]+)`", " ".join(firsts)):
        parts = [part.split(",") for part in re.split(r"[{}]", name)]
        named += ["".join(way) for way in itertools.product(*parts)]
    assert len(named) == len(set(named))
    assert set(named) == set(ROWS)


def test_commands_exist():
    modules = set(re.findall(r"python -m ([\w.]+)", README))
    assert modules
    for module in modules:
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module


def test_arguments_of_commands_exist(capsys):
    """Every --option of a training or evaluation command in the README is one of that command."""
    from experiments import evaluate, label, predict, train

    helps = {"train": (train.main, ["digits_unet_tiles", "--help"]), "evaluate": (evaluate.main, ["--help"])}
    helps |= {"predict": (predict.main, ["--help"]), "label": (label.main, ["--help"])}
    known = {}
    for name, (main, arguments) in helps.items():
        with pytest.raises(SystemExit):
            main(arguments)
        known[name] = set(re.findall(r"--[\w.-]+", capsys.readouterr().out)) | {"--list"}
    used = re.findall(r"python -m experiments\.(train|evaluate|predict|label)\b([^\n#]*)", README)
    options = list(itertools.chain.from_iterable([(n, o) for o in re.findall(r"--[\w.-]+", rest)] for n, rest in used))
    assert options
    assert [(name, option) for name, option in options if option not in known[name]] == []
