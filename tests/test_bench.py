"""The README's tables are what bench/tables.py makes of bench/results.jsonl, and every listed command is one that parses."""
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
