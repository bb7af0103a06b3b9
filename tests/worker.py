"""What only two ranks can show: started once per test session by test_distributed.py, under torchrun.

    torchrun --standalone --nproc_per_node=2 tests/worker.py OUT

Every `check_...` below runs on both ranks, in this order, and returns plain values; OUT/rank0.json and OUT/rank1.json
hold what each returned, or the traceback with which it ended. test_distributed.py says what the values must be.
A check that ends on one rank alone leaves the other waiting: after LIMIT seconds both print where they stand, and end.
`CONFIGS` are whole runs of train.py's own loop, of a step or two each.
"""

from __future__ import annotations

import copy
import faulthandler
import gc
import hashlib
import json
import os
import sys
import threading
import traceback
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from offload_checks import offload_checks
from reference import (
    DENSE, FAMILIES, REWARDS, ROOT, SEQUENCES, TINY_BASE, CaptureGradients, fresh_saver, largest_error, load_plain,
    make_groups, make_run, naive_score, naive_update, same_bits, save_model, score_error, tiny_config, weights,
    wiki_passages,
)  # fmt: skip
from torch.distributed.checkpoint import FileSystemWriter

import train
from benchmarks import evaluate as evaluation
from benchmarks.evaluate import evaluate, read_settings
from checkpoint import finish_save, load_checkpoint, make_saver, newest_checkpoint, save_checkpoint
from config import read_config
from data import Corpus, Passage
from eval import make_probe, perplexity, run_probe
from grpo import bundle, bundle_length, make_optimizer, make_samples, micro_batch_plan, score, update
from methods import METHODS
from metrics import read_rows
from model import build_policy, ema_update, load_replica, load_tokenizer, refresh
from prompts import BOXED_OPENING
from ranks import Ranks, gather, start_ranks
from relatives import rlvr
from relatives.rlp import Position, information_gain, make_frame
from relatives.rlvr import verify_predictions
from rollout import generate, make_sampler, rollout

LIMIT = 60
"""Seconds for one check."""
TEXTS = ["The moon turns around the earth.", "Bonn lies on the Rhine.", "Salt melts ice.", "An owl hunts by night."]
PASSAGES = [Passage(f"{number}#0", f"T{number}", "", text) for number, text in enumerate(TEXTS)]


def setting(folder: Path, ranks: Ranks, family="smollm3", **changes):
    """(config, replica, policy) of this family, fresh from its checkpoint."""
    config = tiny_config(folder / family, **changes)
    replica = load_replica(config, ranks)
    return config, replica, build_policy(replica, config, ranks)


def fresh_sampler(folder: Path, ranks: Ranks, **changes):
    config = tiny_config(folder / "smollm3", **changes)
    return make_sampler(load_replica(config, ranks), load_tokenizer(config), config, ranks)


def digest(tensors: dict) -> str:
    """One word for all bits of these tensors, to compare ranks by."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def compare(folder: Path, ranks: Ranks, rewards, family="smollm3", **changes) -> dict:
    """One update on two ranks and the naive loop on each alone: the largest error of gradients and metrics."""
    config, _, policy = setting(folder, ranks, family, max_grad_norm=1e9, temperature=0.7, **changes)
    plain = load_plain(config.model)
    groups = make_groups(plain, rewards)
    expected, found = CaptureGradients(plain), CaptureGradients(policy)
    metrics = naive_update(plain, expected, groups, config)
    samples = make_samples(groups, config)
    result = update(policy, found, samples, config, ranks, 0)
    lengths = [bundle_length(one) for one in bundle(samples, config)]
    bins = micro_batch_plan(lengths, config.tokens_per_micro_batch, ranks.world)
    return {
        "gradients": largest_error(found.gradients, expected.gradients),
        "metrics": max(abs(result[key] - metrics[key]) / max(abs(metrics[key]), 1e-9) for key in metrics),
        "micro_batches": len(bins) // ranks.world,
        "tokens_per_rank": [sum(lengths[i] for one in bins[r :: ranks.world] for i in one) for r in range(ranks.world)],
    }


# ---- the update
def check_gradients_equal_the_naive_loop(folder, ranks):
    """All families, two micro-batch sizes, with and without checkpointing and shared prompts; work is uneven."""
    return {
        f"{family}, {budget} tokens, checkpointing {on}, shared prompts {share}": compare(
            folder, ranks, REWARDS, family, tokens_per_micro_batch=budget, gradient_checkpointing=on,
            share_prompts=share,
        )
        for family in DENSE
        for budget in (60, 10_000)
        for on in (False, True)
        for share in (False, True)
    }  # fmt: skip


def check_a_rank_with_nothing_to_train(folder, ranks):
    """One response is left of two, the other was cut at its length: the second rank packs a dummy."""
    groups = make_groups(load_plain(folder / "smollm3"), [[1.0, 0.0]])
    for response, finish in zip(groups[0].rollouts, ("eos", "length"), strict=True):
        response.finish = finish
    plain = load_plain(folder / "smollm3")
    expected = CaptureGradients(plain)
    config, _, policy = setting(folder, ranks, mask_truncated=True, max_grad_norm=1e9)
    found = CaptureGradients(policy)
    samples = make_samples(groups, config)
    naive_update(plain, expected, groups, config)
    update(policy, found, samples, config, ranks, 0)
    return {"samples": len(samples), "gradients": largest_error(found.gradients, expected.gradients)}


def check_several_optimizer_steps_on_a_batch(folder, ranks):
    """Two passes over it whole, two mini-batches, and both."""
    results = {}
    for passes, parts in ((2, 1), (1, 2), (2, 2)):
        changes = {"updates_per_batch": passes, "mini_batches": parts, "learning_rate": 1.0, "lr_schedule": "constant"}
        config, _, policy = setting(folder, ranks, tokens_per_micro_batch=60, **changes)
        plain = load_plain(config.model)
        groups, before = make_groups(plain, REWARDS), weights(plain)
        metrics = naive_update(plain, torch.optim.SGD(plain.parameters(), lr=1.0), groups, config)
        optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
        result = update(policy, optimizer, make_samples(groups, config), config, ranks, 0)
        moves = [{name: one - before[name] for name, one in weights(model).items()} for model in (policy, plain)]
        results[f"{passes} x {parts}"] = {
            "moves": largest_error(*moves), "clip_fraction": result["clip_fraction"],
            "metrics": max(abs(result[key] - metrics[key]) / abs(metrics[key]) for key in metrics),
        }
    return results


def refused(policy, samples, config, ranks) -> dict:
    before, message = weights(policy), ""
    try:
        update(policy, make_optimizer(policy, config), samples, config, ranks, 4)
    except FloatingPointError as error:
        message = str(error)
    return {"message": message, "unchanged": same_bits(weights(policy), before)}


def check_a_loss_that_is_not_finite_on_one_rank(folder, ranks):
    config, _, policy = setting(folder, ranks)
    samples = make_samples(make_groups(load_plain(config.model), REWARDS), config)
    lengths = [len(one.rollout.prompt_ids + one.rollout.completion_ids) for one in samples]
    of_rank_1 = micro_batch_plan(lengths, config.tokens_per_micro_batch, ranks.world)[1][0]
    samples[of_rank_1].rollout.sampler_logprobs[0] = float("nan")
    return refused(policy, samples, config, ranks)


def check_a_gradient_that_is_not_finite_on_one_rank(folder, ranks):
    """Born in the backward of the last layer, on the second rank alone, and summed over both by FSDP."""
    results = {}
    for on in (False, True):
        config, _, policy = setting(folder, ranks, gradient_checkpointing=on)
        samples = make_samples(make_groups(load_plain(config.model), REWARDS), config)
        last = [m for m in policy.modules() if type(m).__name__.endswith("DecoderLayer")][-1]

        def spoil(module, inputs, output):
            output.register_hook(lambda gradient: gradient * float("nan"))

        if ranks.rank == 1:
            last.mlp.register_forward_hook(spoil)
        results[f"checkpointing {on}"] = refused(policy, samples, config, ranks)
    return results


# ---- two copies
def check_replica_equals_masters_after_each_refresh(folder, ranks):
    results = {}
    for family in FAMILIES:
        for dtype in ("float32", "bfloat16"):
            config, replica, policy = setting(folder, ranks, family, dtype=dtype, learning_rate=1e-2,
                                              lr_schedule="constant")
            loaded = weights(replica)
            refresh(policy, replica)
            untouched = same_bits(weights(replica), loaded)
            optimizer, digests, equal = make_optimizer(policy, config), [], []
            groups = make_groups(load_plain(config.model), REWARDS)
            for step in range(2):
                update(policy, optimizer, make_samples(groups, config), config, ranks, step)
                refresh(policy, replica)
                masters = {name: one.to(getattr(torch, dtype)) for name, one in weights(policy).items()}
                equal.append(same_bits(weights(replica), masters))
                digests.append(digest(weights(replica)))
            moved = len({digest(loaded), *digests}) == 3
            results[f"{family} {dtype}"] = {"untouched": untouched, "equal": equal, "moved": moved, "digests": digests}
    return results


def check_masters_are_cut_over_the_ranks(folder, ranks):
    _, replica, policy = setting(folder, ranks)
    own = sum(parameter.to_local().numel() for parameter in policy.parameters())
    return {"own": own, "all": sum(parameter.numel() for parameter in replica.parameters())}


def check_masters_on_the_host(folder, ranks):
    return offload_checks(folder, ranks)


def check_the_second_copy(folder, ranks):
    # One sequence's length: as many micro-batches as there are sequences, dummies where the ranks do not divide them
    changes = {"tokens_per_micro_batch": 62, "learning_rate": 1e-2, "lr_schedule": "constant", "method": "rlp"}
    run = make_run(fresh_sampler(folder, ranks, **changes))
    config, policy, reference = run.config, run.policy, run.reference
    plain, replica = load_plain(config.model).eval(), weights(run.sampler.replica)
    results = {
        "own": sum(parameter.to_local().numel() for parameter in reference.parameters()),
        "all": sum(one.numel() for one in replica.values()), "equal": same_bits(weights(reference), replica),
        "no_gradients": not any(parameter.requires_grad for parameter in reference.parameters()),
    }

    # Scores, of many sequences, of fewer than ranks and of none, by both models
    scored = {
        f"{name} {count} at {temperature}": (score(model, SEQUENCES[:count], config, ranks, temperature), temperature)
        for name, model in (("reference", reference), ("policy", policy))
        for count, temperature in ((5, 1.0), (5, 0.7), (1, 1.0), (0, 1.0))
    }
    errors = [
        score_error(found, naive_score(plain, SEQUENCES[: len(found)], temperature))
        for found, temperature in scored.values()
    ]
    everywhere = gather([scored])
    results["agree"] = all(one == everywhere[0] for one in everywhere)

    # No tags, no instruction, no thought: nothing was gained
    frame = make_frame(replace(run.sampler, config=replace(config, rlp_prompt="{passage}")))
    positions = [Position(prefix, continuation[:1]) for prefix, continuation in SEQUENCES]
    gains = information_gain(run, positions, [[[]]] * len(positions), frame)
    errors += [abs(gain) for group in gains for gain in group]

    # The recurrence over three steps of a policy that moves; whole tensors beside the shards
    expected, samples = weights(reference), make_samples(make_groups(plain, REWARDS), config)
    for step in range(3):
        update(policy, run.optimizer, samples, config, ranks, step)
        ema_update(reference, policy, 0.5)
        expected = {name: 0.5 * expected[name] + 0.5 * one for name, one in weights(policy).items()}
    errors.append(largest_error(weights(reference), expected))
    results["moved"] = largest_error(weights(reference), replica) > 1e-3
    plain.load_state_dict(weights(reference), strict=False)  # and it scores with what it now holds
    errors.append(score_error(score(reference, SEQUENCES, config, ranks), naive_score(plain, SEQUENCES)))

    # Nothing is sent: one rank can do it alone
    before = weights(reference)
    if ranks.rank == 0:
        ema_update(reference, policy, 0.0)
    after = weights(reference)
    results["alone"] = not same_bits(after, before)
    ema_update(reference, policy, 1.0)
    return results | {"frozen": same_bits(weights(reference), after), "error": max(errors)}


# ---- rollouts
def check_rollouts_are_one_list_in_prompt_order(folder, ranks):
    sampler = fresh_sampler(folder, ranks)
    prompts = [[9, 8, 7], [1], list(range(30)), [5, 5], [77] * 12]  # an odd number: three here, two there
    groups = rollout(sampler, prompts, 3, 6, BOXED_OPENING, (0, "predict"))
    lone = rollout(sampler, prompts[:1], 3, 6, BOXED_OPENING, (0, "predict"))  # nothing for the second rank
    twins = rollout(sampler, prompts[:1] * 2, 3, 6, BOXED_OPENING, (0, "predict"))  # one on each rank
    return {
        "prompts": [[response.prompt_ids for response in group] == [prompt] * 3
                    for prompt, group in zip(prompts, groups, strict=True)],
        "all": [[asdict(response) for response in group] for group in groups],
        "twins": [[response.completion_ids for response in group] for group in twins],
        "lone": [[asdict(response) for response in group] for group in lone],
    }  # fmt: skip


def check_gather_joins_in_rank_order(folder, ranks):
    return gather([f"{ranks.rank}{letter}" for letter in "ab"[: ranks.rank + 1]])


def check_a_failing_request_names_its_rank(folder, ranks):
    sampler = fresh_sampler(folder, ranks)
    if ranks.rank == 1:

        def broken(*words, **keys):
            raise ValueError("out of luck")

        sampler.replica.forward = broken
    try:  # not `rollout`: the other rank would wait for this one until torchrun ends it
        generate(sampler, [[1, 2]], 2, 4, BOXED_OPENING, 0)
    except RuntimeError as error:
        return str(error)
    return ""


def check_masks_that_are_all_invalid(folder, ranks):
    """A random model writes no \\mask{}: no prediction, no kept group, no update, no hang."""
    run = make_run(fresh_sampler(folder, ranks), PASSAGES)
    before = digest(weights(run.policy))
    done = train.step(run, 0)
    return {
        "causes": sorted({task.mask.invalid for group in done.proposals for task in group}),
        "groups": [[group.role, group.rewards] for group in done.groups],
        "metrics": {key: done.row.get(key, 0) for key in ("loss", "grad_norm", "trained_tokens", "trained_responses")},
        "unchanged": digest(weights(run.policy)) == before and not run.optimizer.state,
    }


# ---- tasks
def check_tasks_are_drawn_alike(folder, ranks):
    sizes = {"passages_per_step": 5, "masks_per_passage": 3, "max_prompt_tokens": 192, "tokens_per_micro_batch": 256}
    config = tiny_config(TINY_BASE, method="entropy_token", **sizes)
    run, drawn = make_run(make_sampler(load_replica(config, ranks), load_tokenizer(config), config, ranks)), {}
    for config.method in ("random_span", "random_token", "entropy_token", "sft", "rlp"):
        groups = METHODS[config.method].propose(run, wiki_passages(5), 3)
        drawn[config.method] = [
            [[asdict(task.mask), task.prompt_ids, repr(task.position)] for task in group] for group in groups
        ]
    return drawn


def check_answers_are_verified_in_shares(folder, ranks):
    """Three questions: two on one rank, one on the other."""
    answers = [["0.5", r"\frac12", "2", None], ["12.0"], ["7", "8"]]
    asked, check = [], rlvr.check_answers

    def counted(pairs, seconds):
        asked.extend(gold for gold, _ in pairs)
        return check(pairs, seconds)

    rlvr.check_answers = counted
    try:
        verdicts = verify_predictions(answers, ["1/2", "12", "7"], tiny_config(), ranks)
    finally:
        rlvr.check_answers = check
    return {"verdicts": verdicts, "asked": asked, "none": verify_predictions([], [], tiny_config(), ranks)}


# ---- evidence
def check_a_checkpoint_restores_every_bit(folder, ranks):
    """Of rlp, whose moving average is saved too."""
    run = folder / "run"
    changes = {"run_dir": str(run), "learning_rate": 1e-2, "lr_schedule": "constant", "method": "rlp"}
    first, second = (make_run(fresh_sampler(folder, ranks, **changes, keep_last=2)) for _ in range(2))
    config, start, tokenizer = first.config, weights(first.reference), first.sampler.tokenizer
    groups = make_groups(load_plain(config.model), REWARDS)
    savers = [make_saver(one.policy, one.optimizer, one.sampler, one.reference) for one in (first, second)]

    def step(run, number):
        update(run.policy, run.optimizer, make_samples(groups, config), config, ranks, number)
        refresh(run.policy, run.sampler.replica)
        ema_update(run.reference, run.policy, 0.9)

    for number in range(3):
        step(first, number)
        savers[0].done = number + 1
        save_checkpoint(savers[0])
    finish_save(savers[0])
    latest, facts = newest_checkpoint(Path(config.run_dir))
    load_checkpoint(savers[1], latest, facts)

    def same() -> list[bool]:
        pairs = [(one.policy, one.sampler.replica, one.reference) for one in (first, second)]
        equal = [same_bits(weights(ours), weights(theirs)) for ours, theirs in zip(*pairs, strict=True)]
        return [*equal, same_bits(state(first.optimizer), state(second.optimizer))]

    average = weights(first.reference)
    results = {
        "kept": sorted(path.name for path in (run / "checkpoints").iterdir()), "latest": latest.name,
        "done": savers[1].done, "same": same(),
        "exported": same_bits(weights(load_plain(latest / "hf")), weights(first.sampler.replica)),
        "tokenizer": load_tokenizer(replace(config, model=str(latest / "hf"))).get_vocab() == tokenizer.get_vocab(),
        "apart": not same_bits(average, start) and not same_bits(average, weights(first.policy)),
        "no_gradients": not any(parameter.requires_grad for parameter in second.reference.parameters()),
    }
    for one in (first, second):
        step(one, 3)
    return results | {"next_step": same()}


def check_a_save_copies_before_the_next_step_changes_all(folder, ranks):
    """Threads write what was copied, while steps are made. Before the first update there is no optimizer state, and
    asking for it must not make one: Adam's count of steps would then be ahead."""
    changes = {"run_dir": str(folder / "ahead"), "learning_rate": 1e-2, "lr_schedule": "constant", "keep_last": 0}
    saver = fresh_saver(tiny_config(folder / "smollm3", **changes), ranks)
    config, policy, optimizer, replica = saver.sampler.config, saver.policy, saver.optimizer, saver.sampler.replica
    groups = make_groups(load_plain(config.model), REWARDS)
    release, writing = threading.Event(), FileSystemWriter.write_data

    def slowly(*words):
        assert release.wait(LIMIT)
        return writing(*words)

    then, optimizers, results = {}, {}, {}
    FileSystemWriter.write_data = slowly
    try:
        for number in range(2):
            then[number], optimizers[number] = weights(policy), copy.deepcopy(state(optimizer))
            saver.done = number
            release.clear()
            save_checkpoint(saver)
            results[f"no grads {number}"] = all(p.grad is None for p in policy.parameters())
            results[f"untouched {number}"] = same_state(state(optimizer), optimizers[number])
            update(policy, optimizer, make_samples(groups, config), config, ranks, number)
            refresh(policy, replica)
            dist.barrier()
            results[f"waits {number}"] = not saver.pending.done()
            release.set()
            results[f"saved {number}"] = finish_save(saver)
    finally:
        FileSystemWriter.write_data = writing
    for number in range(2):
        path = Path(config.run_dir) / "checkpoints" / f"step_{number:06d}"
        other_saver = fresh_saver(config, ranks)
        other, other_optimizer = other_saver.policy, other_saver.optimizer
        load_checkpoint(other_saver, path, json.loads((path / "checkpoint.json").read_text()))
        results[f"masters {number}"] = same_bits(weights(other), then[number])
        results[f"optimizer {number}"] = same_state(state(other_optimizer), optimizers[number])
        results[f"export {number}"] = same_bits(weights(load_plain(path / "hf")), then[number])
        for rest in range(number, 2):
            update(other, other_optimizer, make_samples(groups, config), config, ranks, rest)
        results[f"goes on {number}"] = same_bits(weights(other), weights(policy))
    return results


def state(optimizer) -> dict:
    """This rank's shards of the optimizer's state, by parameter number."""
    states = enumerate(optimizer.state_dict()["state"].values())
    found = {(n, key): value for n, one in states for key, value in one.items()}
    return {key: value.to_local() if hasattr(value, "to_local") else value for key, value in found.items()}


def same_state(found: dict, expected: dict) -> bool:
    """same_bits of optimizer states, which may be empty."""
    return found.keys() == expected.keys() and (not found or same_bits(found, expected))


def check_the_probe_is_the_same_on_every_rank(folder, ranks):
    sampler = fresh_sampler(folder, ranks, probe_passages=3, probe_samples=2)
    probe = make_probe(Corpus([], PASSAGES, {}), sampler, sampler.config)
    first, again = (run_probe(probe, sampler, sampler.config, 0) for _ in range(2))
    with torch.no_grad():
        plain, scores = load_plain(sampler.config.model), []
        for passage in probe.passages:
            ids = torch.tensor(sampler.tokenizer(passage.text).input_ids)
            logprobs = plain(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            scores.append(logprobs.gather(-1, ids[1:, None])[:, 0])
    return {
        "masks": [mask.masked for mask in probe.masks], "probe": first, "again": first == again,
        "perplexity": torch.cat(scores).mean().neg().exp().item(), "perplexity_of_one": perplexity(sampler, TEXTS[:1]),
    }


# ---- benchmarks
ASKED = ["gsm8k.path=assets/tiny_questions.jsonl", "limit=10", "max_new_tokens=6", "dtype=float32", "chunk=8"]
ASKED += [r'question_prompt=" {passage}\nPredict:"', "tasks=gsm8k"]
"""A greedy evaluation of the tiny base on sums, two chunks; with samples=4 a sampled one, five chunks."""


def check_an_evaluation(folder, ranks):
    """Greedy and sampled: every file that it leaves. The ranks take chunks in turn here, not as they come."""
    claim, evaluation.claim = evaluation.claim, lambda path: int(path.stem.split("_")[1]) % ranks.world == ranks.rank
    try:
        for name, words in {"greedy": [], "sampled": ["samples=4"]}.items():
            evaluate(read_settings([str(TINY_BASE), *ASKED, *words, f"out={folder / name}"]), ranks)
    finally:
        evaluation.claim = claim
    dist.barrier()
    files = [path for name in ("greedy", "sampled") for path in sorted((folder / name / "gsm8k").iterdir())]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


# ---- whole runs
SMALL = """
    passages_per_step=4 masks_per_passage=3 predictions_per_mask=4 probe_passages=4 probe_samples=1 probe_every=0
    save_every=0 samples_per_step=1 max_mask_tokens=10 max_prediction_tokens=10 steps=1
""".split()
CONFIGS = {path.stem: [] for path in sorted((ROOT / "configs").glob("tiny*.yaml"))} | {
    "tiny": ["warmup_method=random_span", "warmup_method_steps=1", "steps=2", "eval_every=3", "eval_limit=5",
             "eval_tasks=gsm8k=assets/tiny_questions.jsonl"],
    "tiny-rlp": ["passages_per_step=4", "steps=2", "ema_decay=0.5", "save_every=1"],
}
"""Every tiny config of configs/, and what is changed beside SMALL."""


def run_config(name: str, folder: Path, ranks: Ranks, *words: str) -> dict:
    """The loop itself with this config: its rows, the endings of the prompts whose responses were trained on, and the
    shares that the moving average kept of itself."""
    config = read_config([f"configs/{name}.yaml", *SMALL, *CONFIGS[name], *words, f"run_dir={folder / name}"])
    rows, trained, kept = [], set(), []
    originals = step_line, update_, ema_update_ = train.step_line, train.update, train.ema_update

    def noted_line(row, steps):  # which every rank calls
        rows.append({key: value for key, value in row.items() if not key.startswith(("time/", "tokens_per", "peak_"))})
        return step_line(row, steps)

    def noted_update(policy, optimizer, samples, *rest):
        tokenizer = load_tokenizer(config)
        trained.update(tokenizer.decode(one.rollout.prompt_ids).split()[-1] for one in samples)
        return update_(policy, optimizer, samples, *rest)

    def noted_average(reference, policy, tau):
        kept.append(tau)
        ema_update_(reference, policy, tau)

    train.step_line, train.update, train.ema_update = noted_line, noted_update, noted_average
    try:
        train.train(config, ranks)
    finally:
        train.step_line, train.update, train.ema_update = originals
        gc.unfreeze()
    dist.barrier()
    before = read_rows(folder / name / "metrics.jsonl")[0]
    card = folder / name / "checkpoints" / "latest" / "hf" / "README.md"
    told = card.read_text() if card.exists() else ""
    return {"rows": rows, "trained": sorted(trained), "kept": kept, "before": sorted(before), "card": told}


def check_a_run_of_rlp_continues_with_its_moving_average(folder, ranks):
    """Rewound to its first checkpoint, the run makes its second step again."""
    latest = folder / "tiny-rlp" / "checkpoints" / "latest"
    dist.barrier()
    if ranks.rank == 0:
        latest.unlink()
        latest.symlink_to("step_000001")
    dist.barrier()
    return run_config("tiny-rlp", folder, ranks)["rows"]


def main() -> None:
    out = Path(sys.argv[1])
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    ranks = start_ranks()
    if ranks.rank == 0:
        for family in FAMILIES:
            save_model(family, out / family)
    dist.barrier()
    results = {}
    checks = {name: one for name, one in globals().items() if name.startswith("check_")}
    rewound = checks.pop("check_a_run_of_rlp_continues_with_its_moving_average")
    checks |= {name: partial(run_config, name) for name in CONFIGS} | {"rewound": rewound}
    for name, check in checks.items():
        faulthandler.dump_traceback_later(LIMIT, exit=True)  # from now
        try:
            results[name] = {"value": check(out, ranks)}
        except Exception:  # kept for the test that asks for this check
            results[name] = {"error": traceback.format_exc()}
        (out / f"rank{ranks.rank}.json").write_text(json.dumps(results))
        dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # as train.py leaves: library threads may abort a normal exit


if __name__ == "__main__":
    main()
