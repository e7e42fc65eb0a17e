"""The empirical audit: published values, known mechanisms, an engine broken on purpose.

A broken engine must be CAUGHT: its rigorous lower bound lies above the epsilon that the accountant claims.
"""
import json

import numpy as np
import pytest
import torch
from scipy.special import logit
from scipy.stats import binom

import accountant
import dp_sgd
from extensions import audit
from support import command_line, files, randomness


@pytest.fixture(autouse=True)
def repeatable(monkeypatch):
    """Every fresh generator is a different one, but the same in every run of the tests."""
    seeds = iter(range(10_000))
    monkeypatch.setattr(randomness, "fresh_generator",
                        lambda device="cpu": torch.Generator(device).manual_seed(next(seeds)))


def coins(seed=0):
    return np.random.default_rng(seed)


# ------------------------------------------------------------------------------------------------- the bounds


def test_the_papers_examples():
    """Steinke et al. 2023: appendix D (75 of 100 guesses, m = 1000), section 7 (1439 of 1510, m = 1e5)."""
    assert 0.66 <= audit.rigorous_bound(75, 100, 1000, 1e-4) <= 0.673
    assert 2.66 <= audit.rigorous_bound(1439, 1510, 100_000, 1e-5) <= 2.676


def test_delta_enters_by_the_worst_distribution_of_free_guesses():
    """Against the definition, term by term, with m > r. delta = 0: a binomial test; all right: ln(m / 3)."""
    m, r, v, epsilon, delta = 50, 20, 17, 0.8, 1e-3
    p = np.exp(epsilon) / (1 + np.exp(epsilon))
    law = [binom.pmf(w, r, p) for w in range(r + 1)]
    gain = max(sum(law[max(0, v - i):v]) / i for i in range(1, m + 1))
    assert audit.p_value(v, r, m, [epsilon], delta)[0] == pytest.approx(sum(law[v:]) + 2 * m * delta * gain,
                                                                        rel=1e-12)
    assert audit.p_value(v, r, m, [epsilon], 0.0)[0] == pytest.approx(sum(law[v:]), rel=1e-12)
    for m in (30, 1000):  # all right: p^m = 5 %, which is near epsilon = ln(m / 3)
        exact = logit(0.05 ** (1 / m))
        assert abs(exact - np.log(m / 3)) < 0.06 and 0 <= exact - audit.rigorous_bound(m, m, m, 0.0) < 0.011
    assert audit.rigorous_bound(10, 20, 100, 1e-5) == 0 == audit.rigorous_bound(0, 20, 100, 1e-5)
    assert audit.rigorous_bound(97, 100, 1000, 1e-3) < audit.rigorous_bound(97, 100, 1000, 1e-6)


def test_the_rigorous_bound_exceeds_randomised_response_in_at_most_five_percent():
    """The mechanism on which the bound is exact: each coin is told truly with probability p. m = r = 200."""
    epsilon, rng = 1.0, np.random.default_rng(0)
    right = rng.binomial(200, 1 / (1 + np.exp(-epsilon)), 2000)
    bounds = {int(v): audit.rigorous_bound(int(v), 200, 200, 0.0) for v in set(right)}
    above = np.mean([bounds[int(v)] > epsilon for v in right])
    assert 0.02 < above <= 0.05 + 3 * (0.05 * 0.95 / 2000) ** 0.5  # a sound bound that is not vacuous


def test_the_rigorous_bound_exceeds_the_claim_in_at_most_five_percent_of_audits():
    claim, most = accountant.epsilon(0.5, 2.0, 3, 1e-3, "pld"), audit.rigorous_bound(40, 40, 100, 1e-3)
    found = [audit.audit([(0.5, 2.0, 3)], 1e-3, 100, guesses=40, rng=coins(i), fast=True) for i in range(100)]
    assert all(f["upper_pld"] == claim < most for f in found)  # all guesses right would exceed the claim
    for score in ("sum", "differences", "regenerated"):
        assert sum(f["lower"][score] > claim for f in found) <= 5
    # mean about 0.1, which one seed or another misses by a little
    lower = np.array([f["lower"]["sum"] for f in found])
    assert lower.mean() > 4 * lower.std() / len(lower) ** 0.5  # and it is not always zero


@pytest.mark.parametrize("plan, m, by_rdp, rigorous, estimated", [
    ((1.0, 3.0, 30), 1000, (9.5, 9.8), (2.3, 3.8), (6.3, 8.6)),
    ((0.1, 1.0, 300), 5000, (13.5, 14.4), (2.9, 3.9), (6.8, 8.2))])
def test_audit_of_the_real_engine(plan, m, by_rdp, rigorous, estimated):
    """The ranges hold what other, simulated audits of these two plans gave: 3.07 and 6.81; 3.31 and 7.55."""
    found = audit.audit([plan], 1e-5, m, rng=coins(), fast=True)
    for value, (low, high) in ((found["upper_rdp"], by_rdp), (found["lower"]["sum"], rigorous),
                               (found["estimate"], estimated)):
        assert low < value < high
    assert found["lower"]["sum"] < found["estimate"] < found["upper_pld"] <= found["upper_rdp"]
    # an honest engine
    assert max(found["lower"]["differences"], found["lower"]["regenerated"]) < found["lower"]["sum"]


def test_steps_that_differ_secure_noise_and_other_clipping():
    schedule = [(0.5, 1.5, 20), (1.0, 3.0, 10)]
    secure, fast = (audit.audit(schedule, 1e-5, 2000, guesses=200, rng=coins(), fast=f)
                    for f in (False, True))
    rows = [{"q": q, "sigma": s} for q, s, t in schedule for _ in range(t)]
    assert secure["upper_pld"] == accountant.epsilon_of_ledger(rows, 1e-5, "pld")
    for found in (secure, fast):
        assert 2 < found["lower"]["sum"] < found["estimate"] < found["upper_pld"]
    for clipping in ("automatic", "per-layer"):
        found = audit.audit([(1.0, 3.0, 30)], 1e-5, 1000, guesses=100, rng=coins(), fast=True,
                            clipping=clipping, clip_norm=0.1)
        assert 2 < found["lower"]["sum"] < found["upper_pld"]


# ------------------------------------------------------------------------- an engine broken in one place each


def break_noise_halved(monkeypatch):
    honest = dp_sgd.privatise
    monkeypatch.setattr(dp_sgd, "privatise", lambda sums, C, sigma, *rest: honest(sums, C, sigma / 2, *rest))


def break_clipping(monkeypatch):
    monkeypatch.setitem(dp_sgd.CLIPPING, "flat", lambda norms, clip_norm: torch.ones_like(norms))
    monkeypatch.setattr(dp_sgd, "bounded", lambda factors, norms, clip_norm: factors)


def break_sampling(monkeypatch):
    monkeypatch.setattr(dp_sgd, "poisson_sample", lambda n, q, generator=None: torch.arange(n))


def break_noise_repeated(monkeypatch):
    honest = dp_sgd.privatise
    monkeypatch.setattr(dp_sgd, "privatise",
                        lambda *args: honest(*args[:-1], torch.Generator().manual_seed(id(args[-1]) % 997)))


def break_seed_fixed(monkeypatch):
    monkeypatch.setattr(randomness, "fresh_generator",
                        lambda device="cpu": torch.Generator(device).manual_seed(0))


@pytest.mark.parametrize("broken, score, plan, delta, m, guesses", [
    # few guesses among many: only the surest tell a factor 2
    (break_noise_halved, "sum", (1.0, 5.0, 4), 1e-7, 200_000, 800),
    (break_clipping, "sum", (0.05, 1.2, 30), 1e-5, 2000, 200),
    (break_sampling, "sum", (0.05, 1.2, 30), 1e-5, 2000, 200),
    (break_noise_repeated, "differences", (0.05, 1.5, 60), 1e-5, 2000, 200),
    (break_seed_fixed, "regenerated", (0.05, 1.5, 60), 1e-5, 2000, 200)])
def test_a_broken_engine_is_caught(broken, score, plan, delta, m, guesses, monkeypatch):
    honest = audit.audit([plan], delta, m, guesses=guesses, rng=coins(), fast=True)
    assert honest["upper_pld"] <= 2.01 and honest["lower"][score] < honest["upper_pld"]
    broken(monkeypatch)
    caught = audit.audit([plan], delta, m, guesses=guesses, rng=coins(), fast=True)
    assert caught["upper_pld"] == honest["upper_pld"] < caught["lower"][score]


# ---------------------------------------------------------------------------------------------------- program


@pytest.fixture
def run(tmp_path):
    for part in ("release", "internal"):
        (tmp_path / part).mkdir()
    privacy = {"delta": 1e-4, "q": 0.5, "sigma": 2.0, "steps": 8, "clip_norm": 0.1, "clipping": "flat",
               "fast_noise": False}
    files.write_json(privacy, tmp_path / "release" / "privacy.json")
    return tmp_path


def test_program_audits_a_run(run, capsys):
    assert audit.main([str(run), "--canaries", "500"]) == 0
    out = capsys.readouterr().out
    assert (
        "q 0.5, sigma 2, 8 steps; delta 0.0001" in out
        and "no violation" in out
        and out.count("rigorous") == 3
    )
    assert f"{accountant.epsilon(0.5, 2.0, 8, 1e-4, 'pld'):.2f}" in out
    picture = (run / "internal" / "audit.png").read_bytes()
    assert (
        picture.startswith(b"\x89PNG") and len(picture) > 2000 and not list((run / "release").glob("*.png"))
    )
    row = {"q": 0.25, "sigma": 1.0}
    (run / "internal" / "ledger.jsonl").write_text("".join(json.dumps(row | {"sigma": s}) + "\n"
                                                           for s in (1.0, 3.0, 3.0)))
    assert audit.main([str(run), "--canaries", "500", "--out", str(run / "x.png")]) == 0
    # ledger and statement
    expected = "q 0.25, sigma 1, 1 steps; q 0.25, sigma 3, 2 steps; q 0.5, sigma 2, 8 steps"
    assert expected in capsys.readouterr().out and (run / "x.png").exists()


@pytest.mark.parametrize("stated, words, fast", [
    ({}, [], False), ({"fast_noise": True}, [], True), ({"fast_noise": False}, ["--fast-noise"], True),
    ({"fast_noise": None, "secure_noise": True}, [], False),
    ({"fast_noise": None, "secure_noise": False}, [], True),
    ({"fast_noise": None}, [], True)])
def test_program_audits_the_generator_of_the_run(stated, words, fast, run, monkeypatch):
    """Older statements have secure_noise instead, the oldest neither; None here: not in the statement."""
    path = run / "release" / "privacy.json"
    statement = files.read_json(path) | stated
    files.write_json({key: value for key, value in statement.items() if value is not None}, path)
    asked, honest = [], randomness.fresh_generator
    monkeypatch.setattr(randomness, "fresh_generator",
                        lambda device="cpu": asked.append("fast") or honest(device))
    secure = dp_sgd.SecureGenerator
    monkeypatch.setattr(dp_sgd, "SecureGenerator", lambda: asked.append("secure") or secure())
    monkeypatch.setattr(dp_sgd, "privatise", lambda sums, *rest: sums)  # the noise itself is not at stake
    monkeypatch.setattr(dp_sgd, "poisson_sample", lambda n, q, generator=None: torch.arange(n))
    audit.main([str(run), "--canaries", "50", *words])
    assert asked == ["fast" if fast else "secure"] * 3


def test_program_without_a_run_and_its_verdict(capsys, monkeypatch):
    plan = ["--q", "0.05", "--sigma", "1", "--steps", "30", "--canaries", "1000", "--fast-noise"]
    assert audit.main(plan) == 0 and "no violation" in capsys.readouterr().out
    break_sampling(monkeypatch)
    assert audit.main(plan) == 1 and "VIOLATED" in capsys.readouterr().out


@pytest.mark.parametrize("words, message", [
    ("", "runs/digits"), ("--q 0.1 --sigma 1", "give either a run"), ("no/such/run", "no/such/run"),
    ("--q 0.1 --sigma 0 --steps 3", "nothing to audit"), ("--q 2 --sigma 1 --steps 3", "nothing to audit"),
    ("--q 0.1 --sigma 1 --steps 0", "--steps"),
    ("--q 0.1 --sigma 1 --steps 3 --canaries 5", "--canaries"),
    ("--q 0.1 --sigma 1 --steps 3 --delta 0", "delta"),
    ("x --q 0.1 --sigma 1 --steps 3", "give either a run")])
def test_bad_input_is_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        command_line.run_cli(lambda: audit.main(words.split()))
    error = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and len(error) == 1 and message in error[0]


def test_a_run_with_a_known_seed_is_refused(run):
    path = run / "release" / "privacy.json"
    files.write_json(files.read_json(path) | {"insecure_seed": True}, path)
    with pytest.raises(ValueError, match="known noise seed"):
        audit.main([str(run)])
    path.unlink()  # unfinished: the settings have the seed itself
    files.write_json({"insecure_seed": 0}, run / "internal" / "settings.json")
    (run / "internal" / "ledger.jsonl").write_text('{"step": 0, "q": 0.1, "sigma": 1.0}\n')
    with pytest.raises(ValueError, match="known noise seed"):
        audit.main([str(run)])
