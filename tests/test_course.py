"""docs/course.ipynb: every cell runs, nothing in it is stale, and docs/course.md shows the same cells."""
import contextlib
import json
import multiprocessing
import os
import re
import runpy
import sys
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
NOTEBOOK = json.loads((DOCS / "course.ipynb").read_text())
CELLS = [(cell["cell_type"], "".join(cell["source"])) for cell in NOTEBOOK["cells"]]
PAGE = (DOCS / "course.md").read_text()
PUBLIC = ROOT / "pretrained" / "digits"


def run_script(folder, script, arguments):
    """In a process of its own: a script as `python script arguments`, at smoke size, in `folder`."""
    os.chdir(folder)
    os.environ["DPLDM_COURSE_SMOKE"] = "1"
    sys.argv[:] = [str(script), *arguments]
    with open("said", "w") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except BaseException:
            traceback.print_exc()
            raise


def smoke(folder, script, *arguments):
    """The same from here, by a fork of a process that has imported the project -> what the script said."""
    process = multiprocessing.get_context("forkserver").Process(
        target=run_script, args=(folder, script, arguments))
    process.start()
    process.join()
    said = (folder / "said").read_text()
    assert process.exitcode == 0, said[-3000:]
    return said


def test_every_cell_runs_in_order_and_the_page_is_rendered(tmp_path):
    if PUBLIC.exists():
        (tmp_path / "pretrained").mkdir()
        (tmp_path / "pretrained" / "digits").symlink_to(PUBLIC)
    smoke(tmp_path, DOCS / "render.py", "out/page.md")
    page = (tmp_path / "out" / "page.md").read_text()
    images = sorted((tmp_path / "out" / "page").glob("*.png"))
    assert [f"page/{image.name}" for image in images] == re.findall(r"!\[.*\]\((.*)\)", page)
    assert 6 <= len(images) <= 8 and all(image.read_bytes()[:4] == b"\x89PNG" for image in images)
    for said in ("weights are tuned", "images are clipped", "rows in the ledger", "guesses right",
                 "all of them together"):
        assert len(re.findall(rf"^.*\d.*{said}|{said}.*\d.*$", page, flags=re.M)) >= 1, said
    assert not [line for line in page.splitlines() if len(line) > 110]


@pytest.mark.skipif(not PUBLIC.exists(), reason="the other test trains the public networks already")
def test_without_the_public_networks_small_ones_are_trained(tmp_path):
    last = next(i for i, (_, text) in enumerate(CELLS) if "train.main" in text)
    code = "\n\n".join(text for kind, text in CELLS[:last + 1] if kind == "code")
    (tmp_path / "cells.py").write_text(code)
    assert "trained for 2 steps" in smoke(tmp_path, tmp_path / "cells.py")
    assert (tmp_path / "runs" / "course-public" / "public" / "ldm.pt").exists()


def test_outputs_are_stripped_and_cells_are_short():
    for cell, (kind, text) in zip(NOTEBOOK["cells"], CELLS, strict=True):
        assert len(text.splitlines()) <= 25, text
        assert all(len(line) <= 110 for line in text.splitlines()), text
        assert kind == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(CELLS)


def test_the_text_states_no_number():
    for kind, text in CELLS:
        if kind == "markdown":
            prose = re.sub(r"^#.*$|`[^`]*`|\]\([^)]*\)", "", text, flags=re.M)
            assert not re.search(r"\d", prose.replace("Algorithm 1", "")), text


def test_the_code_of_the_project_is_called_and_not_copied():
    sources = [path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("[des]*/*.py")]]
    known = ["\n".join(line.strip() for line in source.splitlines()) for source in sources]
    for kind, text in CELLS:
        lines = [line.strip() for line in text.splitlines()]
        for i in range(len(lines) - 3):
            piece = "\n".join(lines[i:i + 4])
            copied = kind == "code" and "import" not in piece and any(piece in source for source in known)
            assert not copied, piece


def test_the_page_shows_the_cells_of_the_notebook():
    place = 0
    for kind, text in CELLS:
        place = PAGE.find(text if kind == "markdown" else f"```python\n{text}\n```", place)
        assert place >= 0, f"make course: docs/course.md lacks\n{text}"
    assert PAGE.count("```python") == sum(kind == "code" for kind, _ in CELLS)


def test_the_images_of_the_page_are_few_and_small():
    images = [DOCS / name for name in re.findall(r"!\[.*\]\((.*\.png)\)", PAGE)]
    assert sorted(images) == sorted((DOCS / "course").glob("*.png"))
    assert len(images) <= 8 and sum(image.stat().st_size for image in images) <= 1_000_000


def test_the_renderer_is_short_and_needs_the_standard_library_only():
    text = (DOCS / "render.py").read_text()
    assert len(text.splitlines()) <= 80
    imported = re.findall(r"^(?:import|from) (\w+)", text, flags=re.M)
    assert set(imported) <= sys.stdlib_module_names
