"""The documents' tables are what bench/tables.py makes of bench/results.jsonl; listed commands parse."""
import json
import re
import shutil
from importlib import import_module

import pytest
import torch

import train
from bench import gpu, held_out_loss, moved, optimizers, pretend, runs, tables
from datasets import garments
from support import files, settings

PLACES = [(page, name, make) for page, made in tables.PAGES for name, make in made.items()]
ROWS = ("digits", "ablations", "papers", "recipes", "faces")  # modules of bench/ that list rows


@pytest.mark.parametrize(("page", "name", "make"), PLACES)
def test_no_entry_of_a_table_is_typed(page, name, make):
    inside = re.search(rf"<!-- table: {name} -->\n(.*?)\n<!-- end -->", page.read_text(), flags=re.S)
    assert inside and inside[1] == make(), "python -m bench.tables --write"


def test_a_page_without_the_markers_of_a_table_is_refused():
    with pytest.raises(ValueError, match="0 places"):
        tables.replaced("no markers", "digits", "a table")


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_a_command_that_parses(name):
    rows = import_module(f"bench.{name}").ROWS
    assert rows
    for row in rows.values():
        *train, evaluate = runs.commands(row)
        assert evaluate.startswith(f"python evaluate.py {row.out}")
        for command in train:
            assert str(settings.parse(command.split()[2:]).out) == row.out


@pytest.mark.parametrize("name", ROWS)
def test_no_row_replaces_the_run_that_another_row_scores(name):
    trained = [row.out for row in import_module(f"bench.{name}").ROWS.values() if row.train is not None]
    assert len(trained) == len(set(trained))


def test_a_run_folder_in_the_way_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(runs.subprocess, "run", lambda command, **kwargs: made(command))

    def made(command):  # stands for train.py and evaluate.py; meanwhile the programs change
        monkeypatch.setattr(runs, "commit", lambda: "later")
        for name in ("release/privacy.json", "internal/evaluation.json", "release/model.pt"):
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
    line = json.loads((tmp_path / "results.jsonl").read_text())
    assert line["row"] == "row" and line["commit"] == "abc, later"
    assert line["run"] == runs.digest(tmp_path / "r" / "release" / "model.pt") == "44136fa3"  # of "{}"


def test_only_seeds_of_the_same_run_are_averaged():
    rows = {"a": {"run": "1", "date": "2026-01-02"}, "a-seed1": {"run": "1", "date": "2026-01-02"},
            "a-seed2": {"run": "0", "date": "2026-01-02"}, "b": {"run": "1", "date": "2026-01-02"}}
    assert tables.with_seeds(rows, "a") == [rows["a"], rows["a-seed1"]]
    for row in rows.values():
        del row["run"]  # as older ones
    assert len(tables.with_seeds(rows, "a")) == 3
    rows["a-seed2"]["date"] = "2026-01-01"
    assert tables.with_seeds(rows, "a") == [rows["a"], rows["a-seed1"]]


def test_the_program_for_a_gpu_runs_on_a_cpu(tmp_path, monkeypatch):
    """All four parts, tiny; a part that fails is a line, and so is one that does not fit into the time."""
    monkeypatch.setattr(gpu, "sampling", lambda bench: 1 / 0)
    command = ["--device", "cpu", "--tiny", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    assert gpu.main([*command, "--minutes", "9"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "gpu.jsonl").read_text().splitlines()]
    failed = {row["what"]: row["error"] for row in rows if "error" in row}
    assert failed == {"Poisson batches, generators": "ZeroDivisionError: division by zero"}
    assert [row["part"] for row in rows] == [1] * 7 + [2, 3, 4, 0]
    assert not any("skipped" in row for row in rows) and {row["card"] for row in rows} == {"cpu"}
    for name in ("default", "faces-64"):
        assert (tmp_path / "out" / f"{name}-comparison.png").exists()
        assert (tmp_path / "out" / f"{name}-privacy.json").exists()
    assert gpu.main([*command, "--minutes", "0.3", "--parts", "3,4"]) == 0
    *_, third, fourth, _ = (tmp_path / "out" / "gpu.jsonl").read_text().splitlines()
    assert "skipped" in json.loads(third) and "skipped" in json.loads(fourth)


def test_a_row_with_more_sampling_seeds_is_told_by_their_mean():
    rows = {name: {"row": name, "date": f"2026-11-{day}",
                   "evaluation": {"accuracy": {"cnn": {"small": 0.1, "large": x}}}}
            for name, day, x in (("a-eps1", 24, 0.5), ("a-eps1-seed1", 24, 0.6), ("a-eps10", 24, 0.9),
                                 ("a-eps10-seed1", 24, 0.9), ("a-eps1-seed2", 23, 0.1))}  # of an earlier run
    assert tables.over_seeds(rows, "a-eps1") == pytest.approx(0.55)


def test_the_optimizers_are_compared_line_by_line(capsys):
    optimizers.main(["smoke", "--steps", "2", "--n", "300", "--lr", "1e-3"])
    cells = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| smoke")]
    assert [row[1] for row in cells] == ["1, autoencoder"] * 2 + ["2, diffusion"] * 2
    assert sorted(row[2] for row in cells[:2]) == ["adamw", "muon"] and len({row[-1] for row in cells}) == 4


def test_pretend_garments_change_the_cloth_and_not_the_background():
    generator = torch.Generator().manual_seed(0)
    plain = garments.draw(torch.arange(40) % 10, generator)
    changed = pretend.restyle(plain, generator)
    assert changed.shape == plain.shape and changed.dtype == torch.uint8
    corner = (slice(None), 0, 0, 0)
    assert (changed[corner][plain[corner] == 0] == 0).float().mean() > 0.9  # an outline may be bent into it
    assert all((one != other).float().mean() > 0.1 for one, other in zip(plain, changed, strict=True))


def test_a_pretend_set_is_named_npz(tmp_path):
    with pytest.raises(ValueError, match="npz"):
        pretend.main([str(tmp_path / "set.png"), "garments"])


def test_held_out_loss_tells_a_better_model_from_a_worse(tmp_path, capsys):
    out, worse = tmp_path / "run", tmp_path / "worse"
    train.main(["--preset", "smoke", "--steps", "0", "--ldm-steps", "30", "--out", str(out)])
    shutil.copytree(out, worse)
    checkpoint = files.load(worse / "release" / "model.pt")
    last = [key for key in checkpoint["model"] if key.startswith("unet.out.")]
    checkpoint["model"] |= {key: checkpoint["model"][key] + 1 for key in last}
    files.save(checkpoint, worse / "release" / "model.pt")
    capsys.readouterr()
    held_out_loss.main([str(out), str(out), str(worse), "--n", "50"])
    once, again, bad = [float(re.search(r"loss ([\d.]+) of 50", line)[1])
                        for line in capsys.readouterr().out.splitlines() if " loss " in line]
    assert once == again < bad


def test_moved_tells_the_length_and_the_likeness_of_changes(tmp_path, capsys):
    first, same, other = (tmp_path / name for name in ("first", "same", "other"))
    train.main(["--preset", "smoke", "--steps", "0", "--out", str(first)])
    public = moved.starting_weights(first, [str(digit) for digit in range(10)])
    changed = {"embedder": 0.3, "attn1.to_v": 0.2}  # parts of names of weights that "tuning" moves
    for run, sign in ((first, 1), (same, 2), (other, -1)):
        if run != first:
            shutil.copytree(first, run)
        checkpoint, step = files.load(run / "release" / "model.pt"), torch.Generator().manual_seed(0)
        for name, size in changed.items():
            for key in (key for key in public if name in key):
                checkpoint["model"][key] = public[key] + sign * size * torch.randn(public[key].shape,
                                                                                  generator=step)
        files.save(checkpoint, run / "release" / "model.pt")
    rows = {kind: numbers for kind, *numbers in moved.changes([first, same, other])}
    assert [kind.split(", ")[-1] for kind in rows] == ["self-attention", "condition embedder"]
    for (before, lengths, cosines), size in zip(rows.values(), (0.2, 0.3), strict=True):
        assert before > 0 and lengths == pytest.approx([size, 2 * size, size], rel=0.1)
        assert cosines == pytest.approx([1, -1])
    moved.main([str(first), str(other)])
    assert "self-attention" in capsys.readouterr().out
    checkpoint = files.load(other / "public" / "ldm.pt")
    checkpoint["model"] = {key: w + 1 for key, w in checkpoint["model"].items()}
    files.save(checkpoint, other / "public" / "ldm.pt")
    with pytest.raises(ValueError, match="other public networks"):
        moved.changes([first, other])
    shifted = tmp_path / "shifted"
    train.main(["--preset", "smoke", "--steps", "1", "--tune", "attention+shift", "--init", str(first),
                "--out", str(shifted)])
    with pytest.raises(ValueError, match="shift"):
        moved.changes([first, shifted])
