"""bench/prompts.py: classifiers of single attributes judge what prompts name."""
from pathlib import Path

import pytest
import torch

import metrics
from bench import prompts

ROOT = Path(__file__).resolve().parent.parent


def test_as_many_faces_with_the_attribute_as_without():
    values = torch.arange(100) % 10 == 0  # 10 of 100
    for found in (values, ~values):
        for most, n in ((8, 8), (50, 10)):
            chosen = prompts.balanced(found, most, torch.Generator().manual_seed(0))
            assert len(set(chosen.tolist())) == 2 * n and int(found[chosen].sum()) == n
    with pytest.raises(ValueError, match="teaches nothing"):
        prompts.balanced(values & ~values, 8, None)
    images, worn = prompts.drawn_faces("Eyeglasses", 32, 0, 30)
    assert images.shape == (60, 3, 32, 32) and int(worn.sum()) == 30


def test_shares_are_those_of_the_prompts(monkeypatch):
    """Images are white where a prompt names the attribute; the judge calls white images so."""
    monkeypatch.setattr(metrics, "predict", lambda model, images: torch.stack(
        [torch.full((len(images),), 100.0), images[:, 0, 0, 0].float()], 1))
    asked = list(prompts.PROMPTS) * 4
    named = {name: torch.tensor([prompts.PROMPTS[prompt].get(name, False) for prompt in asked])
             for name in ("Male", "Young", "Bald", "No_Beard")}
    images = {name: (255 * v.byte())[:, None, None, None].expand(-1, 3, 8, 8) for name, v in named.items()}
    shares = {name: prompts.shares(None, images[name], asked) for name in named}
    for name, given in shares.items():
        assert given == {prompt: float(attributes.get(name, False))
                         for prompt, attributes in prompts.PROMPTS.items()}
    given = {"a bald man": 0.75, "a young man": 0.25}  # and 0 for all others
    bald = {prompt: given.get(prompt, 0.0) for prompt in prompts.PROMPTS}
    judges = {name: {"shares": shares.get(name, shares["No_Beard"])}
              for attributes in prompts.PROMPTS.values() for name in attributes}
    text = prompts.table(judges | {"Bald": {"shares": bald}})
    assert "Bald 75% (others 2%)" in text  # 0.25 / 11
    assert "a young woman                   not Male 100% (others 0%); Young 100%" in text
    assert "not No_Beard 100% (others 100%)" in text  # no sample has what nobody asked for


def test_the_prompts_for_sample_py_are_those_that_are_judged():
    assert (ROOT / "docs" / "prompts.txt").read_text().splitlines() == list(prompts.PROMPTS)
