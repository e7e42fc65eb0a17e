"""The README's tables are what bench/tables.py makes of bench/results.jsonl, and every listed command is one that parses."""
import json
import re
from importlib import import_module

import pytest

import settings
from bench import runs, tables


@pytest.mark.parametrize("name", tables.TABLES)
def test_no_figure_of_the_readme_is_typed(name):
    inside = re.search(rf"<!-- table: {name} -->\n(.*?)\n<!-- end -->", tables.README.read_text(), flags=re.S)
    assert inside and inside[1] == tables.TABLES[name](), "python -m bench.tables --write"


@pytest.mark.parametrize("name", tables.TABLES)
def test_every_row_is_a_command_that_parses(name):
    rows = import_module(f"bench.{name}").ROWS
    assert rows
    for row in rows.values():
        *train, evaluate = runs.commands(row)
        assert evaluate.startswith(f"python evaluate.py {row.out}")
        for command in train:
            assert str(settings.parse(command.split()[2:]).out) == row.out


def test_a_run_folder_in_the_way_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(runs.subprocess, "run", lambda command, **kwargs: made(command))

    def made(command):  # stands for train.py and evaluate.py
        for name in ("release/privacy.json", "internal/evaluation.json"):
            (tmp_path / "r" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "r" / name).write_text("{}")

    monkeypatch.setattr(runs, "commit", lambda: "abc")
    monkeypatch.setattr(runs, "cpu", lambda: "cpu")
    for name in ("r", "r.old1"):
        (tmp_path / name / "internal").mkdir(parents=True)
        (tmp_path / name / "internal" / "ledger.jsonl").write_text(name)
    runs.measure("table", "row", runs.Row("label", "--out r", "r"))
    assert (tmp_path / "r.old2" / "internal" / "ledger.jsonl").read_text() == "r"
    assert (tmp_path / "r.old1" / "internal" / "ledger.jsonl").read_text() == "r.old1"
    assert not (tmp_path / "r" / "internal" / "ledger.jsonl").exists()
    assert json.loads((tmp_path / "results.jsonl").read_text())["row"] == "row"
