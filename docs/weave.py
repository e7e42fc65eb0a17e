"""The paper's method and this repository's code in one scroll: docs/walkthrough.in.md -> docs/walkthrough.md.

    python docs/weave.py                  writes docs/walkthrough.md
    python docs/weave.py --html FILE      writes a page of two columns as well, text left and code right

In the source a line `@code FILE: NAME` stands for a function, a class or `CLASS.METHOD`. It becomes the
source with its docstring below a link to its lines. Standard library only; `make docs` calls it.
"""
import ast
import html
import io
import re
import sys
import tokenize
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SYMBOLS = {r"\sigma": "σ", r"\epsilon": "ε", r"\alpha": "α", r"\beta": "β", r"\delta": "δ", r"\sum": "Σ",
           r"\prod": "Π", r"\cdot": "·", r"\sim": "~", r"\le": "≤", r"\min": "min", r"\log": "log",
           r"\mathcal N": "𝒩", r"\mathbb E": "𝔼", r"\lVert ": "‖", r" \rVert": "‖", r"\quad": " "}
STYLE = """body {font: 16px/1.5 Georgia, serif; margin: 0 auto; max-width: 1500px; padding: 1rem; color: #222}
section {display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 2fr); gap: 1.5rem}
section {border-top: 1px solid #ddd}
.text {position: sticky; top: 0; align-self: start} h1, h2 {line-height: 1.2} a {color: #06c}
pre {font: 11.5px/1.45 Consolas, Menlo, "DejaVu Sans Mono", monospace}
pre {background: #f6f8fa; padding: .7rem; overflow-x: auto} code {font-size: 85%; overflow-wrap: anywhere}
.math {text-align: center; font-style: italic; overflow-x: auto}
.comment {color: #5a6b2d} .string {color: #7a4a1f} .where {font-size: 85%; margin: .8rem 0 0}
@media (max-width: 900px) {section {display: block} .text {position: static} pre {font-size: 10.5px}}"""


def code(where):
    """"FILE: NAME" -> (source, its first line, its last line). ValueError if the file has no such name."""
    name, _, path = where.partition(": ")
    lines = (ROOT / name).read_text().splitlines()
    node = ast.parse("\n".join(lines))
    for part in path.split("."):
        found = [child for child in node.body if getattr(child, "name", None) == part]
        if not found:
            raise ValueError(f"walkthrough.in.md: {name} has no {path}")
        node = found[0]
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    source = lines[first - 1:node.end_lineno]
    return "\n".join(line[node.col_offset:] for line in source), first, node.end_lineno


def pieces(text):
    """The source page -> list of (words, where): text, and the code after it; where is None at the end."""
    parts = re.split(r"^@code (.*)$", text, flags=re.M)
    return list(zip(parts[::2], [*parts[1::2], None], strict=True))


def to_markdown(text):
    page = "<!-- made by docs/weave.py from walkthrough.in.md: edit that file, then run `make docs` -->\n\n"
    for words, where in pieces(text):
        page += words
        if where:
            source, first, last = code(where)
            link = f"../{where.partition(': ')[0]}#L{first}-L{last}"
            page += f"[`{where}`]({link}), lines {first} to {last}:\n\n```python\n{source}\n```"
    return page


def highlighted(source):
    """Source as HTML, with comments and strings marked."""
    lines, page, row, column = source.splitlines(keepends=True), "", 1, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = {tokenize.COMMENT: "comment", tokenize.STRING: "string"}.get(token.type)
        if kind:
            here = lines[token.start[0] - 1]
            between = "".join(lines[row - 1:token.start[0]])  # whole lines: cut both ends
            between = between[column:len(between) - len(here) + token.start[1]]
            page += f'{html.escape(between)}<span class="{kind}">{html.escape(token.string)}</span>'
            row, column = token.end
    return page + html.escape("".join(lines[row - 1:])[column:])


def formula(latex):
    """The little LaTeX that the walkthrough uses, as HTML."""
    latex = re.sub(r"\\bar\{(\w)\}", "\\1\u0304", latex)  # combining macron and tilde
    latex = re.sub(r"\\tilde\{(\w)\}", "\\1\u0303", latex)
    latex = re.sub(r"\\sqrt\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}", r"√(\1)", latex)
    latex = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/(\2)", latex)
    for name in sorted(SYMBOLS, key=len, reverse=True):
        latex = latex.replace(name, SYMBOLS[name])
    latex = html.escape(latex)
    latex = re.sub(r"\^\{([^{}]*)\}|\^(\w)", lambda m: f"<sup>{m[1] or m[2]}</sup>", latex)
    latex = re.sub(r"_\{([^{}]*)\}|_(\w)", lambda m: f"<sub>{m[1] or m[2]}</sub>", latex)
    return re.sub(r"\^\{(.*?)\}", r"<sup>\1</sup>", latex)


def inline(text):
    """Inline Markdown as HTML: code, formulas, links, emphasis."""
    def replace(m):
        if m[1]:
            return f"<code>{html.escape(m[1])}</code>"
        if m[2]:
            return f"<i>{formula(m[2])}</i>"
        if m[3]:
            return f'<a href="{html.escape(m[4])}">{inline(m[3])}</a>'
        return f"<b>{m[5]}</b>" if m[5] else f"<i>{m[6]}</i>" if m[6] else html.escape(m[0], quote=False)
    marks = r"`([^`]+)`|\$([^$]+)\$|\[([^]]+)\]\(([^)]+)\)|\*\*(.+?)\*\*|\*(.+?)\*|[&<>]"
    return re.sub(marks, replace, text)


def prose(words):
    """Paragraphs, headings, lists and formulas of the source page as HTML."""
    page = ""
    for paragraph in filter(None, (p.strip() for p in re.split(r"\n\s*\n", words))):
        if heading := re.fullmatch(r"(#+) (.*)", paragraph):
            page += f"<h{len(heading[1])}>{inline(heading[2])}</h{len(heading[1])}>\n"
        elif paragraph.startswith("$$"):
            page += f'<p class="math">{formula(paragraph.strip("$ ").replace(chr(10), " "))}</p>\n'
        elif paragraph.startswith("- "):
            items = re.split(r"^- ", paragraph, flags=re.M)[1:]
            page += f"<ul>{''.join(f'<li>{inline(item)}</li>' for item in items)}</ul>\n"
        else:
            page += f"<p>{inline(paragraph)}</p>\n"
    return page


def to_html(text):
    introduction, text = re.split(r"(?=^## )", text, maxsplit=1, flags=re.M)
    sections = prose(introduction)
    for words, where in pieces(text):
        right = ""
        if where:
            source, first, last = code(where)
            right = f'<p class="where"><code>{where}</code>, lines {first} to {last}</p>'
            right += f"<pre>{highlighted(source)}</pre>"
        sections += f'<section><div class="text">\n{prose(words)}</div><div>{right}</div></section>\n'
    return ('<!doctype html><html lang="en"><meta charset="utf-8"><title>DP-LDM: paper and code</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{STYLE}</style><body>\n{sections}</body></html>\n")


def main(argv):
    text = (HERE / "walkthrough.in.md").read_text()
    (HERE / "walkthrough.md").write_text(to_markdown(text))
    if argv[:1] == ["--html"] and len(argv) == 2:
        Path(argv[1]).write_text(to_html(text))


if __name__ == "__main__":
    main(sys.argv[1:])
