"""The six edits of docs/exercises.md, each applied in a copy of the program and run."""
import json
import multiprocessing
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "exercises.md").read_text()
EDITS = re.findall(r"    (python train\.py [^\n]+)\n\n```diff\n(.*?)```", TEXT, re.DOTALL)
TINY = [
    "--vae-steps", "1", "--ldm-steps", "1", "--public-n", "80", "--private-n", "200", "--batch-size", "20",
    "--steps", "2", "--delta", "1e-3", "--sample-steps", "1", "--device", "cpu", "--precision", "float32",
    "--out", "runs/edit"
]


def test_there_are_six_of_at_most_fifteen_lines():
    assert len(EDITS) == 6
    for command, patch in EDITS:
        added = [line for line in patch.splitlines() if line.startswith("+") and not line.startswith("+++")]
        assert 1 <= len(added) <= 15, command


def run_copy(copy, words):
    """In a fork that has torch already: the program in `copy`, and nothing of the project from elsewhere."""
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(copy / name, os.O_WRONLY | os.O_CREAT), stream)
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(ROOT):
            del sys.modules[name]
    os.chdir(copy)
    sys.path[:] = [str(copy), *[p for p in sys.path if not Path(p).resolve().is_relative_to(ROOT)]]
    sys.argv = words
    torch.set_num_threads(1)
    with pytest.raises(SystemExit) as end:
        runpy.run_path("train.py", run_name="__main__")
    assert not end.value.code
    assert all(Path(sys.modules[x].__file__).is_relative_to(copy) for x in ("unet", "tuning", "datasets"))


NAMES = ["modules", "clipping", "data", "denoiser", "optimizer", "accountant"]


@pytest.mark.parametrize("command, patch, plain", [
    *(pytest.param(*edit, False, id=name) for edit, name in zip(EDITS, NAMES, strict=True)),
    pytest.param(*EDITS[1], True, id="clipping, not used")])
def test_an_edit_applies_and_runs(command, patch, plain, tmp_path):
    """plain: the command without its flag, to see that the edit leaves everything else as it was."""
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "runs", "tests", "docs", "bench", "__pycache__", ".*_cache"
    )
    copy = Path(shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored))
    subprocess.run(["git", "apply", "-p0", "-"], input=patch, text=True, cwd=copy, check=True)
    words = ["train.py", "--preset", "smoke"] if plain else command.split()[1:]
    accountant = [] if "--accountant" in words else ["--accountant", "rdp"]  # faster
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=run_copy, args=(copy, [*words, *TINY, *accountant]))
    process.start()
    process.join()
    assert process.exitcode == 0, (copy / "stderr").read_text()[-2000:]
    privacy = json.loads((copy / "runs" / "edit" / "release" / "privacy.json").read_text())
    assert privacy["steps"] == 2 and 9 < privacy["epsilon"] <= 10
    assert privacy["public_set"] == ("stripes" if "stripes" in words else "strokes")
    assert privacy["clipping"] == ("quantile" if "quantile" in words else "flat")
    assert privacy["optimizer"] == ("sgd" if "sgd" in words else "adam")


def test_the_accountant_of_the_edit_never_states_less_than_the_tight_one(tmp_path):
    import accountant
    namespace = {**vars(accountant), "ACCOUNTANTS": {}}
    patch = next(patch for command, patch in EDITS if "moments" in command)
    exec(
        "\n".join(line[1:] for line in patch.splitlines() if line.startswith("+") and line[:3] != "+++"),
        namespace,
    )
    for q, sigma, steps in ((0.5, 1.5, 30), (0.01, 0.8, 500), (1.0, 4.0, 10)):
        counted = {(q, sigma): steps}
        found = namespace["moments"](counted, 1e-5)
        assert accountant.by_pld(counted, 1e-5) < accountant.by_rdp(counted, 1e-5) <= found * (1 + 1e-9)
        assert found < 1.3 * accountant.by_rdp(counted, 1e-5)


def test_the_clipping_of_the_edit_keeps_the_sensitivity():
    import math

    from dp_sgd import SecureGenerator
    patch = next(patch for command, patch in EDITS if "quantile" in command)
    lines = re.findall(r"^\+(.*)$", patch.partition("--- train.py")[0], re.MULTILINE)
    namespace = {"math": math, "CLIPPING": {}}
    exec("\n".join(line for line in lines if not line.startswith("++")), namespace)
    clip = namespace["Quantile"]()
    norms = torch.rand(3, 20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4
    for _ in range(60):
        lengths = (norms.square().sum(0).sqrt() * clip(norms, 0.7)[0])
        assert lengths.max() <= 0.7 * (1 + 1e-12)
        before = clip.count
        clip(norms[:, :1], 0.7)
        assert abs(clip.count - before) == 0.5  # one example more moves the query by 1/2
        clip.count = before
        clip.update(20_000, SecureGenerator())
    median = norms.square().sum(0).sqrt().median()
    assert 0.6 * median < clip.bound < 1.5 * median
