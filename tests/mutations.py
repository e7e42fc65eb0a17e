"""Put the mistakes of docs/pitfalls.md back, one at a time, and demand that the test named there goes red.

    python -m tests.mutations            all of them, some minutes
    python -m tests.mutations 4 12       those rows only; 0: audit, secure generator (not in the table)

Run by hand (pytest does not collect it). The source is copied to a temporary folder; there a line is
replaced, the named test is run, the line is restored. Fails, exit code 1, if a line no longer stands in its
file exactly once, if a test stays green under its mistake, or if it is not green without. A test that cannot
fail proves nothing: this shows they can.
"""
import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import scipy.stats  # noqa: F401 (this and torch: imported once, for all)
import torch  # noqa: F401
import torchvision  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
TUNE, ENGINE, PIT = "tests/test_train.py", "tests/test_dp_sgd.py", "tests/test_pitfalls.py"
PUBLIC = "tests/test_public.py"
CRASH = "tests/test_crash.py"
FAULTS = "tests/test_faults.py"
VOTE = "tests/test_vote.py"


class Mutation(NamedTuple):
    row: int
    mistake: str
    file: str
    changes: tuple  # ((old, new), ...), each old standing in the file exactly once
    test: str


MUTATIONS = [Mutation(*m) for m in (
    (1, "a random batch of fixed size, as from shuffling", "dp_sgd.py",
     (("return (coins < q).nonzero()[:, 0]", "return coins.argsort()[:round(n * q)].sort()[0]"),),
     f"{ENGINE}::test_poisson_batches_are_binomial_and_examples_independent"),
    (2, "division by the actual batch size", "dp_sgd.py",
     (("self.noise_multiplier, self.expected_batch_size, self.generator)",
       "self.noise_multiplier, max(1, sum(f.shape[1] for f in self.metrics)), self.generator)"),),
     f"{ENGINE}::test_the_sum_is_divided_by_the_expected_batch_size_and_cleared"),
    (3, "empty batches are skipped", "train.py",
     (("        for part in batch.to(s.device).split(size):",
       "        if not len(batch):\n            continue\n        for part in "
       "batch.to(s.device).split(size):"),),
     f"{PIT}::test_empty_batches_are_steps_of_noise_and_count"),
    (4, "the last micro-batch replaces the sum", "dp_sgd.py",
     (("torch._foreach_add_(self.sums, sums)", "self.sums = sums"),),
     f"{ENGINE}::test_the_size_of_micro_batches_changes_nothing"),
    (4, "the sum of a micro-batch is clipped, not each example", "dp_sgd.py",
     (("            factors = usable(factors, norms, losses)",
       "            total = norms.square().sum(1, keepdim=True).sqrt().expand_as(norms)\n"
       "            factors = usable(self.clipping(total, self.clip_norm), norms, losses)"),),
     f"{ENGINE}::test_the_size_of_micro_batches_changes_nothing"),
    (4, "noise with every micro-batch", "dp_sgd.py",
     (("torch._foreach_add_(self.sums, sums)",
       "torch._foreach_add_(self.sums, privatise(sums, self.clip_norm, self.noise_multiplier, 1.0, "
       "self.generator))"),),
     f"{PIT}::test_noise_is_added_once_whatever_the_number_of_micro_batches"),
    (5, "the micro-batch's rate in the ledger", "support/progress.py",
     (('row = {"step": step, "q": self.plan["q"],', 'row = {"step": step, "q": self.s.micro_batch / self.plan["n"],'),),  # noqa: E501
     f"{PIT}::test_the_ledger_has_one_row_per_step_with_the_rate_that_drew_the_batch"),
    (6, "the lower end of the bisection", "accountant.py",
     (("    return high  # not low: this", "    return low  # not low: this"),),
     "tests/test_accountant.py::test_noise_multiplier_is_the_smallest_on_the_safe_side"),
    (7, "orders up to about 60 only", "accountant.py",
     (("while -12 < t < 40 and g(t + step) < g(t):", "while -12 < t + step < 3.1 and g(t + step) < g(t):"),),
     "tests/test_accountant.py::test_rdp_epsilon_over_all_orders"),
    (8, "BatchNorm is let through", "dp_sgd.py",
     (('if isinstance(m, nn.modules.batchnorm._BatchNorm) or getattr(m, "track_running_stats", '
       'False):', "if False:"),),
     f"{ENGINE}::test_layers_whose_gradient_would_be_wrong_are_refused_by_name"),
    (9, "a layer without a rule is let through", "extensions/bookkeeping.py",
     (("        if reason := without_rule(module, params):", '        if reason := "":'),),
     f"{ENGINE}::test_layers_whose_gradient_would_be_wrong_are_refused_by_name"),
    (9, "a weight that is used outside its layer goes unnoticed", "dp_sgd.py",
     (("if not (got - expected).norm() <= 0.02 * size + 1e-12:", "if False:"),),
     f"{ENGINE}::test_the_check_against_the_loop_sees_what_hooks_do_not"),
    (10, "frozen layers are recorded as well", "dp_sgd.py",
     (("for k, p in m.named_parameters(recurse=False) if p.requires_grad}",
       "for k, p in m.named_parameters(recurse=False)}"),),
     f"{ENGINE}::test_one_forward_one_backward_and_no_weight_gradients"),
    (11, "norms and sums under autocast", "dp_sgd.py",
     (("with torch.no_grad(), torch.autocast(device.type, enabled=False):", "with torch.no_grad():"),),
     f"{ENGINE}::test_bfloat16_autocast_keeps_norms_and_sums_in_float32"),
    (11, "what a Gram matrix loses to underflow is not counted", "extensions/bookkeeping.py",
     (("    bound += S_raised.square() - S.square()\n", ""),),
     f"{ENGINE}::test_tiny_inputs_and_huge_gradients_do_not_escape_the_clip"),
    (12, "a fixed seed in the engine", "dp_sgd.py",
     (("self.generator = SecureGenerator() if generator is None else generator",
       "self.generator = torch.Generator().manual_seed(0) if generator is None else generator"),),
     f"{ENGINE}::test_randomness_is_fresh_and_leaves_the_global_generator_alone"),
    (12, "the public seed for the private stage", "support/randomness.py",
     (("    sampling = noise = dp_sgd.SecureGenerator()\n",
       "    sampling, noise = (torch.Generator().manual_seed(s.seed) for _ in range(2))\n"),),
     f"{PIT}::test_two_private_runs_never_share_noise_or_batches"),
    (26, "the private stage draws noise and batches from torch's generator", "support/randomness.py",
     (("    sampling = noise = dp_sgd.SecureGenerator()\n", "    sampling = noise = fresh_generator()\n"),),
     f"{PIT}::test_noise_and_batches_come_from_the_secure_generator_unless_fast_and_are_stated"),
    (26, "the engine's noise is torch's", "dp_sgd.py",
     (("self.generator = SecureGenerator() if generator is None else generator",
       "self.generator = torch.Generator() if generator is None else generator"),),
     "tests/test_noise_attack.py::test_the_default_noise_is_not"),
    (26, "weights without a gradient are trained on noise", "tuning.py",
     (("(id(p) in chosen and name not in no_gradient)", "(id(p) in chosen)"),),
     "tests/test_unet.py::test_weights_without_a_gradient_are_not_trained"),
    (0, "classes are matched by position", "support/conditions.py",
     (("    rows = {name: public.index(name) for name in names if name in public}",
       "    rows = {name: i for i, name in enumerate(names)}"),),
     f"{TUNE}::test_private_classes_begin_with_the_embedding_of_the_same_name"),
    (27, "noise in float32", "dp_sgd.py",
     (("noise = torch.randn(s.shape, dtype=torch.float64,", "noise = torch.randn(s.shape, dtype=s.dtype,"),),
     "tests/test_noise.py::test_fast_noise_is_drawn_in_float64_as_well"),
    (27, "normals that end at 5.77", "dp_sgd.py",
     (("        return out.div_(2).view(shape)", "        return out.div_(2).clamp_(-5.768, "
                                                 "5.768).view(shape)"),),
     "tests/test_noise.py::test_outputs_beyond_float32_s_last_normal_are_possible_without_an_example"),
    (27, "the plan does not look at the noise's end", "support/guarantee.py",
     (("if sigma and randomness.beyond_the_noise(limit, q, sigma, steps) > NEGLIGIBLE * delta:", "if False:"),),  # noqa: E501
     f"{TUNE}::test_a_plan_whose_noise_ends_too_early_is_refused"),
    (13, "the latent scale from private latents", "train.py",
     (("    return torch.cat(latents).contiguous()", "    return torch.cat(latents).contiguous() / "
                                                     "torch.cat(latents).std()"),),
     f"{PIT}::test_the_latent_of_a_picture_depends_on_no_other_picture"),
    (13, "the autoencoder sees private pictures", "train.py",
     (("train_autoencoder(s, public.images,", "train_autoencoder(s, private.images,"),),
     f"{PIT}::test_public_stages_see_public_pictures_only"),
    (13, "networks that know the private pictures are called public", "support/start.py",
     (('str(c.get("trained_on")) for', '"?" for'),),
     f"{TUNE}::test_public_networks_that_know_the_private_pictures_are_refused"),
    (14, "losses and gradient norms beside the model", "support/progress.py",
     (('self.folder / "log.jsonl")', 'self.s.out / "log.jsonl")'),),
     f"{PIT}::test_the_private_stage_writes_into_internal_only"),
    (14, "private losses on the terminal", "support/progress.py",
     (("        if self.s.show_private:  # exact", "        if True:  # exact"),),
     f"{TUNE}::test_the_bar_shows_private_numbers_only_when_asked"),
    (15, "the average with the best private loss is released", "train.py",
     (("optim.update_ema(average, engine.parameters, s.ema, state.done)\n",
       "optim.update_ema(average, engine.parameters, s.ema, state.done); "
       "new = engine.last['loss'], [a.clone() for a in average]; "
       "best = new if not state.done or new[0] < best[0] else best\n"),
      ("    torch._foreach_copy_([p.data for p in engine.parameters], average)\n",
       "    torch._foreach_copy_([p.data for p in engine.parameters], best[1])\n")),
     f"{PIT}::test_the_last_average_is_released_and_nothing_is_chosen"),
    (16, "labels follow a histogram", "sample.py",
     (("return torch.arange(n) % num_classes", "return torch.arange(n) ** 2 % num_classes"),),
     f"{PIT}::test_labels_are_drawn_uniformly_and_not_from_the_private_histogram"),
    (17, "the average moves with every micro-batch", "train.py",
     (("                engine.accumulate(loss_fn, *drawn)\n",
       "                engine.accumulate(loss_fn, *drawn)\n"
       "            optim.update_ema(average, engine.parameters, s.ema, state.done)\n"),),
     f"{PIT}::test_the_average_holds_tuned_parameters_only_and_moves_once_per_step"),
    (18, "resuming without the ledger", "support/run_folder.py",
     (("if count > spent or count < 0:", "if False:"),),
     f"{TUNE}::test_resume_refuses_what_would_change_the_guarantee"),
    (18, "resuming goes by the checkpoint, not by the ledger", "support/progress.py",
     (('first, total = len(self.rows), self.plan', 'first, total = self.done, self.plan'),),
     f"{TUNE}::test_a_step_lost_in_a_crash_stays_spent"),
    (19, "the sums of the other processes are left out", "support/team.py",
     (("    collective(partial(dist.reduce, dst=0), engine.sums)\n", ""),),
     "tests/test_processes.py::test_the_total_of_two_processes_is_the_sum_of_one_and_gets_the_noise_once"),
    (20, "a delta above 1/n", "support/guarantee.py",
     (("if delta >= 1 / n:", "if False:"),), f"{PIT}::test_the_statement_carries_what_a_guarantee_needs"),
    (20, "no neighbouring relation", "support/guarantee.py",
     (('"adjacency": "add or remove one image", ', ""),),
     f"{PIT}::test_the_statement_carries_what_a_guarantee_needs"),
    (21, "checkpoints are unpickled", "support/files.py",
     (("weights_only=True)\n", "weights_only=False)\n"),), "tests/test_fuzz.py::test_a_pickle_does_not_run"),
    (22, "a distance without its resolution", "evaluate.py",
     (("{d['n'][0]:,} samples against {d['split']}, {d['resize']}; ", "{d['n'][0]:,} samples; "),),
     f"{PIT}::test_every_distance_is_printed_with_what_it_depends_on"),
    (23, "a factor of zero instead of a mask", "dp_sgd.py",
     (("return torch.where(rows_kept, a, 0.0) if a.is_floating_point() else a",
       "return a * rows_kept if a.is_floating_point() else a"),),
     f"{ENGINE}::test_one_more_example_moves_the_sum_by_at_most_the_sensitivity"),
    (24, "no epsilon for several pictures of a person", "support/guarantee.py",
     (("GROUP: numbers[GROUP],", "GROUP: epsilon,"),),
     f"{PIT}::test_the_statement_carries_what_a_guarantee_needs"),
    (25, "several runs: the largest instead of the sum", "support/calculator.py",
     (("        total.update(steps)\n", "        total = Counter(steps)\n"),),
     "tests/test_accountant.py::test_command_line_runs"),
    (25, "runs marked NOT PRIVATE are summed as private", "support/calculator.py",
     (('    if spent and void or stated.get("private", True) is not True:', "    if False:"),),
     "tests/test_accountant.py::test_a_run_that_is_not_private_counts_as_infinite_alone_and_in_the_sum"),
    (25, "a truncated ledger wins over the statement", "support/calculator.py",
     (("        counts |= by_statement  #", "        counts = counts or by_statement  #"),),
     "tests/test_accountant.py::test_the_larger_of_ledger_and_statement_counts"),
    (25, "nothing said of other runs", "support/guarantee.py",
     (('their epsilons add up, and so do their deltas",\n', '",\n'),),
     f"{PIT}::test_the_statement_carries_what_a_guarantee_needs"),
    (28, "labels are counted to find the classes of private arrays", "datasets/arrays.py",
     (("    if private and not names:\n", "    if False:\n"),),
     "tests/test_faces.py::test_the_classes_of_private_arrays_are_declared_and_never_counted"),
    (28, "the private set is not said to be private", "support/start.py",
     (("private=True, classes=declared)", "classes=declared)"),),
     f"{PUBLIC}::test_private_classes_are_declared_on_the_command_line"),
    (28, "a class folder counts by its pictures", "datasets/photos.py",
     (("            top = sorted(folders, key=natural)\n",
       "            top = sorted((n for n in folders if any(os.scandir(os.path.join(base, n)))), key=natural)\n"),),  # noqa: E501
     "tests/test_faces.py::test_class_folders_declare_the_classes"),
    (29, "what the networks of --init were trained on is forgotten", "support/start.py",
     (("            known.append(own.flatten())\n", "            pass\n"),),
     f"{PUBLIC}::test_init_does_not_hide_what_the_networks_know"),
    (29, "the public set at hand is not compared", "support/start.py",
     (("    known = [digests]\n", "    known = [digests[:0]]\n"),),
     f"{PUBLIC}::test_the_public_set_at_hand_is_checked_as_well"),
    (29, "networks without digests are trusted", "support/start.py",
     (("        elif not datasets.is_drawn(origin):\n",
       "        elif False:\n"),),
     f"{PUBLIC}::test_networks_from_before_digests_are_taken_only_if_drawn_images_made_them"),
    (29, "a folder within the public one is another place", "datasets/__init__.py",
     (("first == second or first in second.parents or second in first.parents", "first == second"),),
     f"{PUBLIC}::test_one_place_is_refused_before_any_image_is_read"),
    (29, "without private steps the sets may be the same", "support/start.py",
     (("    if any(datasets.same_images(origin, s.private,", "    if s.steps and "
                                                             "any(datasets.same_images(origin, s.private,"),),
     f"{PUBLIC}::test_one_place_is_refused_before_any_image_is_read"),
    (29, "a release passes for a public network", "support/files.py",
     (('    if "privacy" in checkpoint:\n', "    if False:\n"),),
     f"{PUBLIC}::test_a_release_is_no_public_network"),
    (14, "internal/ may be read by all", "support/files.py",
     (('mode = 0o600 if private or Path(path).parent.name == "internal" else 0o666', "mode = 0o666"),),
     "tests/test_faces.py::test_internal_is_its_owners_alone"),
    (1, "other examples than those drawn enter the gradient", "train.py",
     (("        for part in batch.to(s.device).split(size):",
       "        for part in torch.arange(len(batch), device=s.device).split(size):"),),
     "tests/test_pitfalls.py::test_the_drawn_examples_enter_the_gradient_once_with_the_noise_of_the_plan"),
    (1, "half the noise of the plan", "train.py",
     (('noise_multiplier=plan["sigma"]', 'noise_multiplier=plan["sigma"] / 2'),),
     "tests/test_pitfalls.py::test_the_drawn_examples_enter_the_gradient_once_with_the_noise_of_the_plan"),
    (12, "the draws of the loss have a public seed", "support/randomness.py",
     (("    draws = fresh_generator(s.device)\n",
       "    draws = fresh_generator(s.device).manual_seed(s.seed)\n"),),
     "tests/test_pitfalls.py::test_the_draws_of_the_loss_are_unknown"),
    (13, "stage 2 learns private images without noise", "train.py",
     (("autoencoder, scale, public, embedder_entry)", "autoencoder, scale, private, embedder_entry)"),),
     "tests/test_pitfalls.py::test_public_stages_see_public_pictures_only"),
    (25, "the statement does not look into the ledger", "support/guarantee.py",
     (('settled(plan["numbers"], privacy_numbers(randomness.reach(s), all_steps, s.delta))',
       'plan["numbers"]'),),
     "tests/test_pitfalls.py::test_the_statement_carries_what_a_guarantee_needs"),
    (0, "the same sums are released twice after an error", "dp_sgd.py",
     (("        self.sums, self.metrics = zeros(self.parameters), []\n        for p", "        for p"),
      ("            one.step()\n", "            one.step()\n        self.sums, self.metrics = "
                                  "zeros(self.parameters), []\n")),
     "tests/test_dp_sgd.py::test_a_failed_update_cannot_release_the_same_sums_twice"),
    (30, "a resumed run calibrates sigma again", "support/guarantee.py",
     (('if s.resume and (path := s.out / "internal" / "plan.json").exists():', "if (path := None):"),),
     f"{CRASH}::test_the_stored_plan_rules_when_another_machine_finds_other_last_digits"),
    (30, "pictures that cannot be drawn are noticed when all is spent", "support/settings.py",
     (("if not 1 <= s.sample_steps <= s.schedule.T:", "if False:"),),
     f"{TUNE}::test_a_run_is_refused_before_its_first_private_step_or_ends_with_a_release"),
    (30, "the public model replaces a finished release", "support/run_folder.py",
     (("if stated and not done:", "if False:"), ('if spent and spent >= plan["steps"] and not '
                                                 'done:', "if False:")),
     f"{CRASH}::test_resuming_never_loses_count_and_never_replaces_a_release_by_less"),
    (30, "the release is not asked how many steps are spent", "support/run_folder.py",
     (('("the release", stated)', '("the release", 0)'),),
     f"{CRASH}::test_resuming_never_loses_count_and_never_replaces_a_release_by_less"),
    (30, "a public stage goes on with other images", "support/run_folder.py",
     (('files.read_json(path).get("images") != found', "False"),),
     "tests/test_faults_of_runs.py::test_public_images_that_change_before_a_run_goes_on"),
    (19, "processes share out different copies of the private set", "support/run_folder.py",
     (("        if from_rank0((images, labels)) != (images, labels):", "        if False:"),),
     "tests/test_processes.py::test_processes_that_read_other_private_images_are_refused"),
    (9, "a norm that overflows counts as zero", "extensions/bookkeeping.py",
     (("torch.where(squared.isfinite(), squared.clamp(min=0), torch.inf)", "squared.clamp(min=0)"),),
     f"{ENGINE}::test_products_that_overflow_make_no_norm_smaller"),
    # Row 0: not of the table; the audit's theorem and the secure generator.
    (0, "original weights in a network with another number of groups", "extensions/original_weights.py",
     (("    if (groups := network.config.num_groups) != GROUPS:", "    if groups := 0:"),),
     "tests/test_original_weights.py::test_other_groups_than_the_original_s_are_refused"),
    (0, "original weights that are not numbers", "extensions/original_weights.py",
     (("        if not value.isfinite().all():", "        if False:"),),
     "tests/test_original_weights.py::test_bad_checkpoints_are_refused_in_one_line"),
    (0, "printed bounds are rounded down", "support/rounding.py",
     (("rounding=ROUND_CEILING)", "rounding='ROUND_FLOOR')"),),
     "tests/test_accountant.py::test_printed_bounds_are_rounded_up"),
    (0, "an accountant that gives nan passes every target", "accountant.py",
     (("    if not value >= 0:  #", "    if value < 0:  #"),),
     "tests/test_accountant.py::test_an_accountant_that_gives_no_epsilon_is_refused"),
    (0, "the steps that Renyi allows are allowed by every accountant", "support/calculator.py",
     (("    low = low if fits(low) else 0\n", ""),),
     "tests/test_accountant.py::test_an_accountant_of_ones_own_goes_everywhere"),
    (0, "attacker's rates where float64 has ended", "extensions/pld.py",
     (("        known = (eps >= grid[0]) & np.isfinite(value)  #", "        known = (eps >= grid[0])  #"),
      ("        value = (np.maximum(value, 0.0) + error)", "        value = (value + error)")),
     "tests/test_accountant.py::test_simple_attacks_stay_below_the_tight_numbers"),
    (0, "an older run goes on with --fast-noise, unnoticed", "support/settings.py",
     (('        stored.setdefault("fast_noise", randomness.can_be_computed(stored))\n', ""),
      ("- FREE - {*run_folder.KEPT}", "- FREE - given.keys()")),
     "tests/test_train.py::test_noise_of_older_runs_that_can_be_computed_stays_stated"),
    (0, "a diffusion model that diverged is kept for --init", "support/run_folder.py",
     (("        checkpoint = self.known.get(name) or make()\n",
       "        checkpoint = self.known.get(name) or make()\n"
       "        files.save(checkpoint, self.s.out / 'public' / name)\n"),),
     "tests/test_train.py::test_a_diffusion_model_that_diverged_is_not_kept"),
    (0, "losses of full batches from rounded ratios", "extensions/pld.py",
     (("    if small.any():", "    if False:"),),
     "tests/test_accountant.py::test_full_batches_beside_sampled_ones"),
    (0, "steps that rounding pushed up are not taken back", "extensions/pld.py",
     (("    while gammainc(jumps + 1, rate) > eta:", "    while False:"),),
     "tests/test_accountant.py::test_steps_that_were_rounded_up_too_often_are_taken_back"),
    (0, "delta left out of the rigorous bound", "extensions/audit.py",
     (("binom.sf(correct - 1, guesses, p) + 2 * m * delta * worst)", "binom.sf(correct - 1, guesses, p))"),),
     "tests/test_audit.py::test_delta_enters_by_the_worst_distribution_of_free_guesses"),
    (0, "delta times the guesses, not the canaries", "extensions/audit.py",
     (("+ 2 * m * delta * worst", "+ 2 * guesses * delta * worst"),),
     "tests/test_audit.py::test_the_papers_examples"),
    (0, "a bound at 50 % confidence", "extensions/audit.py",
     (("CONFIDENCE = 0.95", "CONFIDENCE = 0.5"),),
     "tests/test_audit.py::test_the_rigorous_bound_exceeds_randomised_response_in_at_most_five_percent"),
    (0, "the coins given away to the attacker", "extensions/audit.py",
     (('scores["sum"] += weight * y', 'scores["sum"] += weight * (y + torch.from_numpy(member) * 9)'),),
     "tests/test_audit.py::test_the_rigorous_bound_exceeds_the_claim_in_at_most_five_percent_of_audits"),
    (0, "a resumed run's bar begins at epsilon 0", "support/progress.py",
     (("        self.epsilon = epsilon_after(s, plan, self.covered)\n", "        self.epsilon = 0.0\n"),),
     f"{CRASH}::test_a_resumed_run_shows_its_epsilon_at_once"),
    (0, "the bar lags behind the epsilon that is spent", "support/progress.py",
     (("self.covered = min(spent + every - 1, total)", "self.covered = spent + every - 1"),
      ("            self.epsilon = epsilon_after(self.s, self.plan, self.covered)\n",
       "            self.epsilon = epsilon_after(self.s, self.plan, spent)\n")),
     f"{CRASH}::test_the_epsilon_on_the_way_is_never_below_the_true_one"),
    (0, "scores beside a copied release", "evaluate.py",
     (("    scored.check_place(args, run, is_folder)\n", ""),),
     "tests/test_evaluate.py::test_nothing_uncovered_is_written_beside_a_copied_release"),
    (0, "images are split by the names of their files", "datasets/photos.py",
     (("return zlib.crc32(path.read_bytes())", "return zlib.crc32(path.name.encode())"),),
     f"{FAULTS}::test_renamed_images_stay_on_their_side"),
    (0, "pixels are scaled by the largest there is", "datasets/pixels.py",
     (("np.rint(values * np.float32(255 / top))", "np.rint(values * np.float32(255 / values.max()))"),),
     f"{FAULTS}::test_pixels_are_scaled_by_constants_of_the_dtype_and_never_by_the_set"),
    (0, "what is transparent becomes black", "datasets/photos.py",
     (('Image.new("RGBA", image.size, "white")', 'Image.new("RGBA", image.size, "black")'),),
     f"{FAULTS}::test_no_pixels_are_destroyed_in_silence"),
    (0, "the last of several captions wins", "datasets/photos.py",
     (("options[key % len(options)]", "options[-1]"),),
     f"{FAULTS}::test_of_several_captions_an_image_draws_one_by_its_own_bytes"),
    (0, "linked folders vanish", "datasets/photos.py",
     (("onerror=unreadable, followlinks=True", "onerror=unreadable"),),
     f"{FAULTS}::test_linked_and_unreadable_folders_do_not_vanish"),
    (0, "classes in the order of their letters", "datasets/photos.py",
     (("sorted(folders, key=natural)", "sorted(folders)"),),
     f"{FAULTS}::test_numbers_in_names_of_classes_are_numbers"),
    (0, "labels that are names are taken for places", "datasets/arrays.py",
     (('        by_name = bool(of_labels) and "class_names" not in arrays\n', "        by_name = False\n"),),
     f"{FAULTS}::test_labels_that_count_from_one"),
    (0, "devices are replaced by files", "support/files.py",
     (("    if write_through(path):\n", "    if False:\n"),),
     f"{FAULTS}::test_only_plain_files_are_replaced"),
    (0, "running code is proposed for any file", "extensions/original_weights.py",
     (('    if "Unsupported global" not in cause or "blocked" in cause:\n', "    if False:\n"),),
     f"{FAULTS}::test_files_of_another_kind_are_told_apart_by_their_first_bytes"),
    (0, "normals from two pairs instead of four", "dp_sgd.py",
     (("u = self.uniforms(8 * half).view(2, 4, half)", "u = self.uniforms(4 * half).view(2, 2, half)"),
      ("        return out.div_(2).view(shape)", "        return out.div_(2 ** 0.5).view(shape)")),
     "tests/test_noise.py::test_every_normal_takes_four_pairs_and_none_is_wasted"),
    (27, "the noise ends where its uniforms do", "dp_sgd.py",
     (("for power in range(32, 961, 32):", "for power in range(0):"),
      ("radius = u[0].log_().mul_(-2).sqrt_()", "radius = u[0].neg_().log1p_().mul_(-2).sqrt_()")),
     "tests/test_noise.py::test_the_tail_goes_on_far_beyond_the_reach"),
    (27, "uniforms are drawn anew below another threshold than they are compared with", "dp_sgd.py",
     (("(small := u[0] < 2.0 ** -power)", "(small := u[0] < 2.0 ** (12 - power))"),),
     "tests/test_noise.py::test_only_what_is_below_the_threshold_is_drawn_anew_and_its_angle_stays"),
    (31, "noisy sums keep their low bits", "dp_sgd.py",
     (("(total / grid).round_() * grid if std else total", "total"),),
     "tests/test_noise.py::test_no_low_bit_of_the_noise_tells_which_sum_it_was"),
    (32, "a full disk is noticed after the step is spent", "support/progress.py",
     (("        self.save()  # is there room?", "        pass  # is there room?"),),
     "tests/test_crash.py::test_a_disk_without_room_for_the_state_costs_no_step"),
    (32, "a run goes on from the untuned model", "support/run_folder.py",
     (("    if logged and not done:", "    if False:"),),
     "tests/test_crash.py::test_a_state_that_is_lost_on_the_way_is_refused"),
    (32, "lost public networks are trained anew", "support/start.py",
     (("        if len(known) < 2 and (", "        if False and ("),),
     "tests/test_crash.py::test_a_public_network_that_is_gone_is_not_trained_anew[ldm.pt]"),
    (33, "micro-batches add up in float32", "dp_sgd.py",
     (("torch.zeros_like(p, dtype=torch.float64)", "torch.zeros_like(p, dtype=torch.float32)"),),
     f"{ENGINE}::test_in_a_large_batch_rounding_moves_the_sum_by_less_than_the_noise_allows_for"),
    (33, "the noise does not allow for rounding", "dp_sgd.py",
     (("privatise(self.sums, self.clip_norm * (1 + ROUNDING),", "privatise(self.sums, self.clip_norm,"),),
     "tests/test_noise.py::test_the_tail_goes_on_far_beyond_the_reach"),
    (34, "a clipping rule is trusted", "dp_sgd.py",
     (("    return factors * (clip_norm / length).clamp(max=1)\n", "    return factors\n"),),
     f"{ENGINE}::test_a_clipping_rule_that_does_not_clip_cannot_break_the_sensitivity"),
    (35, "the last batch of latents is smaller", "train.py",
     (("        x = torch.cat([x, x.new_zeros(at_a_time - len(part), *x.shape[1:])])\n", ""),),
     f"{PIT}::test_the_latent_of_a_picture_depends_on_no_other_picture"),
    (36, "the feature network learns what the public folder holds by now", "metrics.py",
     (("        if seen is not None and", "        if False and"),),
     "tests/test_evaluate.py::test_a_feature_network_learns_no_private_image"),
    (37, "votes by rounded distances", "extensions/vote.py",
     (("images.double(), 2)", "images.float(), 2)"),), f"{VOTE}::test_votes_are_exact"),
    (37, "an image votes twice", "extensions/vote.py",
     (("for k in range(len(candidates))]).double()", "for k in range(len(candidates))]).double() * 2"),),
     f"{VOTE}::test_one_image_more_is_one_vote_more_whatever_the_others"),
    (37, "the counts go on without noise", "extensions/vote.py",
     (("        [votes] = dp_sgd.privatise", "        [_] = dp_sgd.privatise"),),
     f"{VOTE}::test_only_the_noisy_counts_go_on"),
    (37, "a generation is spent after its votes are used", "extensions/vote.py",
     (("        spend(g)\n        [votes] = dp_sgd.privatise([votes], 1.0, sigma, 1, None)",
       "        [votes] = dp_sgd.privatise([votes], 1.0, sigma, 1, None)\n        spend(g)"),),
     f"{VOTE}::test_a_generation_is_spent_before_its_votes_are_used"),
    (37, "less noise than the statement says", "extensions/vote.py",
     (("private.labels, sigma, args.generations,", "private.labels, sigma / 100, args.generations,"),),
     f"{VOTE}::test_the_noise_is_that_of_the_statement"),
    (37, "noise from a seed", "extensions/vote.py",
     (("sigma, 1, None)", "sigma, 1, torch.Generator())"),),
     f"{VOTE}::test_the_noise_is_that_of_the_statement"),
    (38, "of two accounts of a vote the last counts", "extensions/vote.py",
     (("        steps = known | Counter(", "        steps = Counter("),),
     f"{VOTE}::test_the_same_vote_counts_once_and_two_votes_twice"),
    (38, "a ledger that was cut hides what the drawings say", "extensions/vote.py",
     (("    return merged([{checksum: vote}, {", "    return merged([{"),),
     f"{VOTE}::test_what_a_vote_cost_is_the_most_that_a_file_tells"),
    (38, "a vote among public images", "extensions/vote.py",
     (('.role == "public":', '.role == "none":'),), f"{VOTE}::test_votes_that_cannot_be"),
    (38, "the log forgets the vote", "support/progress.py",
     (('rows = [*guarantee.vote_steps(plan["before"]), (plan', 'rows = [(plan'),),
     f"{VOTE}::test_the_cost_of_the_vote_is_part_of_the_run_that_takes_its_drawings"),
    (38, "without private steps a vote is held against no bound", "support/guarantee.py",
     (("            return with_numbers(s, plan)\n        return",
       "            spent = accountant.epsilon_of_ledger(vote_steps(before), s.delta, s.accountant)\n"
       "            return {**plan, \"epsilon\": spent,\n"
       "                    \"numbers\": privacy_numbers(randomness.reach(s), [], s.delta)}\n"
       "        return"),),
     f"{VOTE}::test_deltas_too_large_for_those_who_voted_and_low_accountants_are_refused"),
    (38, "the plan forgets what a vote has cost", "train.py",
     (('len(private), votes)', "len(private), [])"),),
     f"{VOTE}::test_the_cost_of_the_vote_is_part_of_the_run_that_takes_its_drawings"),
    (38, "networks forget that their images were voted for", "support/start.py",
     (("before = votes(s, known)", "before = {}"),),
     f"{VOTE}::test_networks_that_learned_from_the_vote_carry_its_cost"),
    (38, "drawings that were voted for are read as free ones", "datasets/arrays.py",
     (('if not voted and "voted" in arrays:', "if False:"),), f"{VOTE}::test_refused_in_one_line"),
    (38, "the calculator forgets the vote", "support/calculator.py",
     (("(counts + before).items()", "counts.items()"),), f"{VOTE}::test_the_calculator_counts_it_too"),
    (25, "a ledger that was cut is believed where there is no statement", "support/calculator.py",
     (("    if done > sum(counts.values()):", "    if False:"),),
     "tests/test_accountant.py::test_a_run_without_statement_counts_the_steps_that_log_and_state_tell_of"),
    (25, "noise that can be computed counts as noise", "support/calculator.py",
     (("    void = known_seed or fast_noise\n", "    void = known_seed\n"),),
     "tests/test_accountant.py::test_a_run_that_is_not_private_counts_as_infinite_alone_and_in_the_sum"),
    (26, "--fast-noise is called private", "support/guarantee.py",
     (("(s.insecure_seed is not None or s.fast_noise)", "s.insecure_seed is not None"),),
     f"{PIT}::test_noise_and_batches_come_from_the_secure_generator_unless_fast_and_are_stated"),
    (0, "secure noise rounded before it is added", "dp_sgd.py",
     (("total = s.double() + std * noise", "total = (s + (std * noise).to(s.dtype)).double()"),),
     "tests/test_noise.py::test_noise_is_added_in_double_and_rounded_once"),
    (0, "secure noise with half the deviation", "dp_sgd.py",
     (("        return out.div_(2).view(shape)", "        return out.div_(4).view(shape)"),),
     "tests/test_noise.py::test_normals_are_normal_and_independent"),
    (0, "secure mode draws batches from an ordinary generator", "dp_sgd.py",
     (("        coins = generator.uniforms(n)\n", "        coins = torch.rand(n, dtype=torch.float64)\n"),),
     "tests/test_noise.py::test_the_engine_and_the_sampler_draw_from_it_alone"),
)]


def passes(folder, *tests):
    """Do the tests pass in that copy? RuntimeError if one cannot be collected: it would look red, no test.

    In a fork of this process, which has imported torch and nothing of the project: saves most of the time.
    """
    log = folder / "mutations.log"
    if (child := os.fork()) == 0:
        code = 3
        try:
            os.chdir(folder)
            sys.path[:] = [str(folder), *(p for p in sys.path if Path(p).resolve() != ROOT)]
            # a stale .pyc would hide a mistake of the same length in the same second
            sys.dont_write_bytecode = True
            for stream in (1, 2):
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests])
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, 1):
        raise RuntimeError(f"{' '.join(tests)} could not be run (code {code}):\n{log.read_text()[-1000:]}")
    return code == 0


def changed(mutation, text):
    """The file's text with the mistake; ValueError where a line is not there exactly once."""
    for old, new in mutation.changes:
        if (found := text.count(old)) != 1:
            raise ValueError(f"row {mutation.row} ({mutation.mistake}): {found} times in {mutation.file}: "
                             f"{old.strip()!r}")
        text = text.replace(old, new)
    return text


def copy(folder):
    ignore = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache")
    return Path(shutil.copytree(ROOT, folder, ignore=ignore))


def red(mutation, folder):
    """Does the named test fail under the mistake? The copy is as before afterwards."""
    path = folder / mutation.file
    text = path.read_text()
    path.write_text(changed(mutation, text))
    try:
        return not passes(folder, mutation.test)
    finally:
        path.write_text(text)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Put each pitfall back and see its test go red.")
    parser.add_argument("rows", nargs="*", type=int, help="rows of the table [all]")
    chosen = parser.parse_args(argv).rows
    if unknown := {*chosen} - {m.row for m in MUTATIONS}:
        parser.error(f"the table has no row {min(unknown)} with a mutation")
    mutations = [m for m in MUTATIONS if not chosen or m.row in chosen]
    for m in mutations:  # a line that has moved: say so before minutes are spent
        changed(m, (ROOT / m.file).read_text())
    bad = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = copy(Path(temporary) / "copy")
        tests = list(dict.fromkeys(m.test for m in mutations))
        all_green = passes(folder, *tests)  # in one go; one by one only to find the culprit
        green = {test: all_green or passes(folder, test) for test in tests}
        print(f"{'row':>3}  {'without':7}  {'with':6} {'s':>5}  mistake -> test")
        for m in mutations:
            start = time.monotonic()
            failed = red(m, folder)
            good = green[m.test] and failed
            bad += not good
            print(f"{m.row:3}  {'green' if green[m.test] else 'RED !!':7}  "
                  f"{'red' if failed else 'GREEN!!':6} "
                  f"{time.monotonic() - start:5.1f}  {m.mistake} -> {m.test}", flush=True)
    print(f"{len(mutations) - bad} of {len(mutations)} mistakes are seen by their tests")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
