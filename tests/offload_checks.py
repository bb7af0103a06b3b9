"""Steps with masters, gradients and Adam on the host, and without, on two ranks: worker.py asks, test_distributed.py
judges.

Each run makes rollouts, updates, a save, a stop inside an update with the save that follows it, and goes on from what
was saved in fresh objects.
"""

from __future__ import annotations

import gc
from pathlib import Path

from reference import fresh_saver, same_bits, tiny_config, weights
from torch.distributed.fsdp import CPUOffloadPolicy

import grpo
from checkpoint import finish_save, load_checkpoint, newest_checkpoint, save_checkpoint
from grpo import Group, make_samples, update
from model import refresh
from prompts import BOXED_OPENING
from ranks import Ranks, Stopped
from rollout import rollout

PROMPTS = [[9, 8, 7], list(range(30)), [77] * 12]


def step_samples(saver, step: int) -> list:
    groups = rollout(saver.sampler, PROMPTS, 3, 6, BOXED_OPENING, (step, "predict"))
    return make_samples([Group("pred", group, [1.0, 0.0, 0.5]) for group in groups], saver.sampler.config)


def one_step(saver, step: int) -> dict:
    """As train.py makes it: rollouts, update, refresh. Returns the update's metrics."""
    samples = step_samples(saver, step)
    row = update(saver.policy, saver.optimizer, samples, saver.sampler.config, saver.sampler.ranks, step)
    refresh(saver.policy, saver.sampler.replica)
    saver.done = step + 1
    return row


def stop_inside(saver, step: int) -> None:
    """A signal after the first micro-batch of this step's update, and the save that train.py makes then."""
    calls, agree = [], grpo.stop_if_signalled

    def agree_to_stop():
        calls.append(1)
        if len(calls) == 2:
            raise Stopped(15)

    samples = step_samples(saver, step)
    grpo.stop_if_signalled = agree_to_stop
    try:
        update(saver.policy, saver.optimizer, samples, saver.sampler.config, saver.sampler.ranks, step)
    except Stopped:
        save_checkpoint(saver)
    finally:
        grpo.stop_if_signalled = agree
    assert len(calls) == 2, "the update had one micro-batch"


def run(folder: Path, ranks: Ranks, family: str, offload: bool) -> dict:
    """Three steps; saved after the first, and when the third is stopped before it is made again."""
    changes = {"run_dir": str(folder / f"offload_{family}_{offload}"), "offload": offload, "tokens_per_micro_batch": 40}
    changes["updates_per_batch"] = 2 if family == "smollm3" else 1
    config = tiny_config(folder / family, learning_rate=1e-2, lr_schedule="constant", keep_last=0, **changes)
    saver = fresh_saver(config, ranks)
    rows = [one_step(saver, 0)]
    save_checkpoint(saver)
    rows.append(one_step(saver, 1))
    assert finish_save(saver)
    stop_inside(saver, 2)
    exported = weights(saver.sampler.replica)
    assert finish_save(saver)

    other = fresh_saver(config, ranks)
    load_checkpoint(other, *newest_checkpoint(Path(config.run_dir)))
    loaded = same_bits(weights(other.sampler.replica), exported)
    rows += [one_step(other, 2), one_step(saver, 2)]
    masters = weights(saver.policy)
    options = saver.policy._get_fsdp_state()._fsdp_param_group.offload_policy
    return {
        "rows": rows, "masters": masters, "goes on": same_bits(weights(other.policy), masters) and loaded,
        "policy": isinstance(options, CPUOffloadPolicy),
    }


def offload_checks(folder: Path, ranks: Ranks) -> dict:
    """Of a mixture of experts and of a tied model: metrics of steps with and without."""
    results = {}
    gc.freeze()  # as train.py does: the sampler collects garbage in every phase
    for family in ("qwen3_moe", "smollm3"):
        plain, hosted = (run(folder, ranks, family, on) for on in (False, True))
        results[family] = {
            "plain": plain["rows"], "hosted": hosted["rows"], "masters": same_bits(plain["masters"], hosted["masters"]),
            "goes on": [plain["goes on"], hosted["goes on"]], "policy": [plain["policy"], hosted["policy"]],
        }
    gc.unfreeze()
    return results
