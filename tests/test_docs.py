"""README.md and docs/ keep their promises: short, in order, no dead name, no command that does not parse."""
import re
import shlex
import sys
from functools import partial
from importlib import util
from pathlib import Path

import pytest
import torch

from support import settings

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
WALK = ROOT / "docs" / "walkthrough.md"  # holds source of the programs, which has rules of its own
PAGES = [README, *sorted(path for path in (ROOT / "docs").glob("*.md") if path != WALK)]
HISTORY = ROOT / "docs" / "lab-notebook.md"  # names of its day
SECTIONS = ["What it is", "Quick start", "What you get, and how long it takes", "The private step",
            "Paper and code", "Read in this order", "Change something", "What epsilon covers",
            "Your own images", "What was never run", "Layout", "Licence"]
page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def blocks(text):
    """Code blocks of a page: fenced, or indented by four blanks after an empty line."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.S | re.M)
    return fenced + [m[0] for m in re.finditer(r"(?:(?<=\n\n)|(?<=\A))(?: {4}.*\n?)+", text)]


def prose(text):
    """Paragraphs and list items of a page, as lists of lines: no code, tables, headings, comments, images."""
    text = re.sub(r"<!--.*?-->|^```.*?^```", "", text, flags=re.S | re.M)
    paragraphs = [[]]
    for line in text.splitlines():
        if not line.strip() or re.match(r" {4}|\||#|!\[", line):
            paragraphs.append([])
        elif re.match(r"\s*(- |\d+\. )", line):
            paragraphs.append([line])
        else:
            paragraphs[-1].append(line)
    return [lines for lines in paragraphs if lines]


def commands(text, program):
    """Words after `python PROGRAM` in code blocks and inline code, comments left out."""
    inline = re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    lines = [line for block in blocks(text) for line in block.splitlines()]
    pattern = rf"\bpython {re.escape(program)}(?= |$)(.*)"
    found = [re.search(pattern, " ".join(line.split())) for line in lines + inline]
    return [shlex.split(m[1], comments=True) for m in found if m]


def test_the_readme_has_its_sections_in_order_and_at_most_200_lines():
    text = README.read_text()
    assert len(text.splitlines()) <= 200
    assert re.findall(r"^## (.*)$", text, flags=re.M) == SECTIONS
    before = text.split("\n## ")[0]
    assert "](docs/digits.png)" in before


def without_edits(text):
    """A page without the patches of docs/exercises.md and their commands, which tests/test_edits.py runs."""
    return re.sub(r"    python train\.py [^\n]+\n\n```diff\n.*?```", "", text, flags=re.DOTALL)


@page
def test_paragraphs_are_short_and_lines_fit(page):
    text = page.read_text()
    assert not [line for line in text.splitlines() if len(line) > 110 and not line.startswith("|")]
    if page != HISTORY:
        assert not [lines[0] for lines in prose(text) if len(lines) > 6]


def test_no_sentence_of_the_readme_has_more_than_two_numbers():
    for lines in prose(README.read_text()):
        text = re.sub(r"`[^`]*`|\]\([^)]*\)", "", " ".join(lines))
        for sentence in re.split(r"(?<=[.!?]) ", text):
            numbers = re.findall(r"(?<![\w.-])\d[\d.,]*", sentence)
            assert len(numbers) <= 2, sentence


@page
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.M)
            anchors = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in anchors, target


@page
def test_every_file_function_and_module_that_a_page_names_exists(page):
    if page == HISTORY:
        return
    text = without_edits(page.read_text())
    for name in re.findall(r"(?<![\w/.-])((?:\w+/)*\w+\.py)\b", text):
        assert (ROOT / name).exists(), name
    for name, functions in re.findall(r"`((?:\w+/)*\w+\.py): ([\w, ]+)`", text):
        source = (ROOT / name).read_text()
        for function in functions.split(", "):
            found = re.search(rf"^ *(def|class) {function}\b|^{function}\b.* = ", source, flags=re.M)
            assert found, f"{name} has no {function}"
    for module in re.findall(r"python -m ((?:bench|tests|extensions)\.\w+)", text):
        assert module == "bench.NAME" or util.find_spec(module), module


@page
def test_every_command_parses(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model.ckpt").touch()  # stands for what the reader has
    text = without_edits(page.read_text())
    for words in commands(text, "train.py"):
        settings.parse([word for word in words if word != "--resume"])
    sources = {"sample.py": "support/arguments.py", "evaluate.py": "evaluate.py",
               "-m extensions.audit": "extensions/audit.py",
               "accountant.py": "support/calculator.py"}
    for program, source in sources.items():
        source = (ROOT / source).read_text()
        for words in commands(text, program):
            assert all(f'"{word}"' in source for word in words if word.startswith("--")), words
    if page == README:
        assert len(commands(text, "train.py")) >= 6  # the test can tell


def test_the_thirteen_lines_of_the_private_step_run():
    import accountant
    import diffusion
    import dp_sgd
    import tuning
    import unet
    from support import randomness

    code = re.search(r"```python\n(.*?)```", README.read_text(), flags=re.S)[1]
    assert len(code.splitlines()) == 13
    torch.manual_seed(0)
    config = unet.UNetConfig(4, 4, 32, channel_mult=(1,), context_dim=8, num_groups=8)
    model = unet.LatentModel(unet.UNet(config), unet.ClassEmbedder(10, 8, True))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    n, T = 20, 3
    given = dict(accountant=accountant, diffusion=diffusion, dp_sgd=dp_sgd, tuning=tuning, torch=torch,
                 randomness=randomness, partial=partial, model=model, n=n, q=0.3, T=T, C=0.1, lr=1e-3,
                 epsilon=8.0, delta=1e-3, schedule=diffusion.Schedule("cosine", "v"),
                 latents=torch.randn(n, 4, 4, 4), labels=torch.arange(n) % 10)
    exec(code, given)
    tuned = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert tuned == {name for name, p in model.named_parameters() if p.requires_grad}
    assert 0 < len(tuned) < len(before)
    assert len(given["ledger"]) == T
    assert 7.9 < accountant.epsilon_of_ledger(given["ledger"], 1e-3, "pld") <= 8


def test_the_makefile_names_only_programs_that_exist():
    for name in re.findall(r"\$\(PY\) (\w+(?:/\w+)*\.py)", (ROOT / "Makefile").read_text()):
        assert (ROOT / name).exists(), name


@pytest.fixture
def weave(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    monkeypatch.delitem(sys.modules, "weave", raising=False)
    import weave
    return weave


def test_the_walkthrough_is_what_its_source_and_the_code_make(weave):
    made = weave.to_markdown((ROOT / "docs" / "walkthrough.in.md").read_text())
    assert WALK.read_text() == made, "make docs"
    assert made.count("```python") >= 15


def test_a_name_that_the_code_no_longer_has_is_refused(weave):
    with pytest.raises(ValueError, match="dp_sgd.py has no DPSGD.privatise"):
        weave.to_markdown("@code dp_sgd.py: DPSGD.privatise\n")


def test_the_page_of_two_columns_shows_the_code_as_it_is(weave):
    text = (ROOT / "docs" / "walkthrough.in.md").read_text()
    page = weave.to_html(text)
    assert "@code" not in page
    assert "\\" not in re.sub(r"<pre>.*?</pre>", "", page, flags=re.S)  # no LaTeX is left
    shown = [re.sub(r"<[^>]*>", "", block) for block in re.findall(r"<pre>(.*?)</pre>", page, flags=re.S)]
    sources = [weave.code(where)[0] for _, where in weave.pieces(text) if where]
    assert [weave.html.unescape(block) for block in shown] == sources
