"""The course with its outputs: docs/course.ipynb -> docs/course.md and docs/course/*.png.

    python docs/render.py                 runs all cells and writes the page (`make course`)
    python docs/render.py FOLDER/NAME.md  the same page, written elsewhere

The cells run in order in this process. What a cell prints stands below it, and so does an image that it gives
to `show`. DPLDM_COURSE_SMOKE=1 makes everything tiny. Standard library only, no Jupyter.
"""
import contextlib
import io
import json
import sys
import textwrap
from pathlib import Path

HERE = Path(__file__).resolve().parent
NOTE = "<!-- made by docs/render.py from course.ipynb: edit the notebook, then run `make course` -->\n\n"
MOST_IMAGES, MOST_BYTES, WIDTH = 8, 1_000_000, 110


def outputs(cells):
    """Run the cells -> pairs (cell, list of what it gave: text or PIL images), one after the other."""
    namespace = {"__name__": "__main__"}
    for cell in cells:
        given = []
        if cell["cell_type"] == "code":
            text = io.StringIO()
            with contextlib.redirect_stdout(text):
                exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
            given.insert(0, text.getvalue())
            given += namespace.pop("shown", [])
            if "show" in namespace:  # the notebook's own needs Jupyter
                namespace["show"] = lambda image: namespace.setdefault("shown", []).append(image)
        yield cell, given


def fitted(text):
    """Text whose lines are as wide as the page, at most."""
    lines = text.rstrip().splitlines()
    return "\n".join(part for line in lines for part in textwrap.wrap(line, WIDTH) or [""])


def write_page(notebook, page):
    """Render the notebook (a path) as the page (a path); images go into a folder of the page's name.

    ValueError for more or larger images than a repository should carry.
    """
    page, folder = page.resolve(), page.resolve().with_suffix("")
    text, images, title = NOTE, [], ""
    for cell, given in outputs(json.loads(notebook.read_text())["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            heads = [line.lstrip("# ") for line in source.splitlines() if line.startswith("#")]
            title = [title, *heads][-1]
        text += f"{source}\n\n" if cell["cell_type"] == "markdown" else f"```python\n{source}\n```\n\n"
        for thing in given:
            if isinstance(thing, str):
                text += f"```text\n{fitted(thing)}\n```\n\n" if thing.strip() else ""
            else:
                images.append(io.BytesIO())
                thing.save(images[-1], "PNG", optimize=True)
                text += f"![{title}]({folder.name}/{len(images)}.png)\n\n"
    total = sum(len(image.getvalue()) for image in images)
    if len(images) > MOST_IMAGES or total > MOST_BYTES:
        raise ValueError(f"{len(images)} images of {total:,} bytes: show fewer, or smaller ones")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    for number, image in enumerate(images, 1):
        (folder / f"{number}.png").write_bytes(image.getvalue())
    page.write_text(text.rstrip() + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    write_page(HERE / "course.ipynb", Path(sys.argv[1]) if sys.argv[1:] else HERE / "course.md")
