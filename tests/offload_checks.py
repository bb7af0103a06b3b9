"""Steps with the memory lent in turns, and without, on two ranks: what worker.py asks for, test_distributed.py judges.

Each run makes rollouts, updates, a save, a stop inside an update with the save that follows it, and goes on from what
was saved in fresh objects. Beside what is computed it notes how many bytes replica, masters and moments hold, when.
"""

from __future__ import annotations

import gc
from pathlib import Path

from reference import same_bits, tiny_config, weights

import grpo
from checkpoint import find_checkpoint, finish_save, load_checkpoint, make_saver, save_checkpoint
from grpo import Group, make_optimizer, make_samples, update
from model import _local, build_policy, load_replica, load_tokenizer, make_lender, to_sampler, to_trainer
from prompts import BOXED_OPENING
from ranks import Ranks, Stopped
from rollout import make_sampler, rollout

PROMPTS = [[9, 8, 7], list(range(30)), [77] * 12]


def held(lender) -> list[int]:
    """Bytes of this rank: replica, masters, moments."""
    states = lender.optimizer.state.values()
    moments = [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")]
    kinds = (lender.replica.parameters(), lender.policy.parameters(), moments)
    return [sum(_local(tensor).untyped_storage().nbytes() for tensor in kind) for kind in kinds]


def fresh(config, ranks: Ranks):
    """(saver, notes): a run before its first step, and what it notes."""
    replica = load_replica(config, ranks)
    policy = build_policy(replica, config, ranks)
    optimizer = make_optimizer(policy, config)
    lender = make_lender(policy, optimizer, replica, config)
    saver = make_saver(policy, optimizer, make_sampler(replica, load_tokenizer(config), config, ranks), lender=lender)
    notes = {"rollouts": [], "forward": [], "optimizer": []}
    policy.get_input_embeddings().register_forward_hook(lambda *_: notes["forward"].append(held(lender)))
    optimizer.register_step_pre_hook(lambda *_: notes["optimizer"].append(held(lender)))
    return saver, notes


def sampled(saver, step: int) -> list[Group]:
    sampler = saver.sampler
    groups = rollout(sampler, PROMPTS, 3, 6, BOXED_OPENING, (step, "predict"))
    return [Group("pred", group, [1.0, 0.0, 0.5]) for group in groups]


def one_step(saver, notes, step: int) -> dict:
    """As train.py makes it: rollouts, update, refresh. Returns the update's metrics."""
    config, lender = saver.sampler.config, saver.lender
    notes["rollouts"].append(held(lender))
    samples = make_samples(sampled(saver, step), config)
    to_trainer(lender)
    row = update(saver.policy, saver.optimizer, samples, config, saver.sampler.ranks, step)
    to_sampler(lender)
    saver.done = step + 1
    return row


def stop_inside(saver, step: int) -> None:
    """A signal after the first micro-batch of this step's update, and the save that train.py makes then."""
    calls, agree = [], grpo.agree

    def agree_to_stop():
        calls.append(1)
        if len(calls) == 2:
            raise Stopped(15)

    samples = make_samples(sampled(saver, step), saver.sampler.config)
    grpo.agree = agree_to_stop
    try:
        to_trainer(saver.lender)
        update(saver.policy, saver.optimizer, samples, saver.sampler.config, saver.sampler.ranks, step)
    except Stopped:
        save_checkpoint(saver)
    finally:
        grpo.agree = agree
    assert len(calls) == 2, "the update had one micro-batch"


def run(folder: Path, ranks: Ranks, family: str, offload: bool) -> dict:
    """Three steps; saved after the first, and when the third is stopped before it is made again."""
    changes = {"run_dir": str(folder / f"lent_{family}_{offload}"), "offload": offload, "tokens_per_micro_batch": 40}
    changes["updates_per_batch"] = 2 if family == "smollm3" else 1  # no moments in the second's passes either
    config = tiny_config(folder / family, learning_rate=1e-2, lr_schedule="constant", keep_last=0, **changes)
    saver, notes = fresh(config, ranks)
    rows = [one_step(saver, notes, 0)]
    save_checkpoint(saver)
    rows.append(one_step(saver, notes, 1))
    assert finish_save(saver)
    stop_inside(saver, 2)
    exported, after_stop = weights(saver.sampler.replica), held(saver.lender)
    assert finish_save(saver)

    other, more_notes = fresh(config, ranks)
    load_checkpoint(other, *find_checkpoint(config))
    loaded = same_bits(weights(other.sampler.replica), exported)
    rows += [one_step(other, more_notes, 2), one_step(saver, notes, 2)]
    for one in (saver, other):
        to_trainer(one.lender)
    masters = weights(saver.policy)
    return {
        "rows": rows,
        "masters": masters,
        "goes on": same_bits(weights(other.policy), masters) and loaded,
        "sizes": [sum(p.nbytes for p in saver.sampler.replica.parameters()), after_stop],
        "notes": notes,
        "more notes": more_notes,
    }


def offload_checks(folder: Path, ranks: Ranks) -> dict:
    """Of a mixture of experts and of a tied model: metrics of steps with and without, and what held memory when."""
    results = {}
    gc.freeze()  # as train.py does: the sampler collects garbage in every phase
    for family in ("qwen3_moe", "smollm3"):
        plain, lent = (run(folder, ranks, family, on) for on in (False, True))
        results[family] = {
            "plain": plain["rows"],
            "lent": lent["rows"],
            "masters": same_bits(plain.pop("masters"), lent.pop("masters")),
            "goes on": [plain["goes on"], lent["goes on"]],
            "sizes": [plain["sizes"], lent["sizes"]],
            "plain notes": plain["notes"],
            "notes": [lent["notes"], lent["more notes"]],
        }
    gc.unfreeze()
    return results
