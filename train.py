"""PretrainZero: one language model chooses what to mask in raw text, recovers it, and learns from both by GRPO.

    torchrun --nproc_per_node=8 train.py configs/smollm3.yaml [key=value ...]
    python train.py configs/tiny.yaml                          one process, no torchrun

The loop is `train` below: propose, predict, reward, update, refresh, log. Everything it calls is one import away, in a
file named after its idea. Every rank runs the same lines: prompts are split over the ranks inside `rollout`, whose
gathered result is the same everywhere, so all later decisions are too; the update splits the packed batches again.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import torch.distributed as dist
from tqdm import tqdm

from checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from config import Config, ConfigError, parse_command_line
from data import DataError, Passage, build_index, load_corpus, step_passages
from evidence import (
    append_row,
    clock,
    describe,
    keep_rows,
    open_run,
    peak_memory_gb,
    read_rows,
    sample_rows,
    save_prompts,
)  # fmt: skip
from grpo import Group, make_optimizer, make_samples, update
from masking import Mask, make_mask
from metrics import step_line, step_metrics, summary_table
from model import Ranks, build_policy, load_replica, load_tokenizer, refresh, start_ranks
from probe import make_probe, run_probe
from prompts import BOXED_OPENING, MASK_OPENING, last_answer
from rewards import INVALID_MASK_REWARD, exact_match, generator_reward
from rollout import Rollout, Sampler, check_prompts, derive_seed, make_sampler, mask_prompt, predict_prompt, rollout


@dataclass
class Task:
    """One generator response, the mask that it names and, if the mask is valid, what the predictor made of it."""

    passage: Passage
    proposal: Rollout
    mask: Mask
    prompt_ids: list[int] = field(default_factory=list)
    """The prediction prompt; empty if the mask is invalid."""
    predictions: list[Rollout] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    """Of the predictions."""

    @property
    def accuracy(self) -> float:
        """Share of predictions that are right."""
        return fmean(self.rewards)

    @property
    def proposal_reward(self) -> float:
        """Of the generator: harder is better, impossible or invalid earns nothing."""
        return INVALID_MASK_REWARD if self.mask.invalid else generator_reward(self.accuracy)


def propose(passages: list[Passage], sampler: Sampler, config: Config, step: int) -> list[list[Task]]:
    """The generator reads each passage `masks_per_passage` times and names the words to mask: tasks per passage."""
    prompts = [mask_prompt(sampler, passage.text) for passage in passages]
    noise = (step, "propose")
    groups = rollout(sampler, prompts, config.masks_per_passage, config.max_mask_tokens, MASK_OPENING, noise)
    proposals = []
    for number, (passage, group) in enumerate(zip(passages, groups, strict=True)):
        rng = random.Random(derive_seed(config.seed, step, "mask", number))
        tasks = []
        for response in group:
            task = Task(passage, response, make_mask(last_answer(response.text, "mask"), passage, config, rng))
            if not task.mask.invalid:
                task.prompt_ids = predict_prompt(sampler, task.mask.masked)
                if len(task.prompt_ids) > config.max_prompt_tokens:
                    task.mask.invalid, task.prompt_ids = "prompt_too_long", []
            tasks.append(task)
        proposals.append(tasks)
    return proposals


def predict(tasks: list[Task], sampler: Sampler, config: Config, step: int) -> None:
    """The predictor answers each masked passage `predictions_per_mask` times, by chain of thought."""
    prompts, noise = [task.prompt_ids for task in tasks], (step, "predict")
    groups = rollout(
        sampler, prompts, config.predictions_per_mask, config.max_prediction_tokens, BOXED_OPENING, noise
    )
    for task, group in zip(tasks, groups, strict=True):
        task.predictions = group


def reward(proposals: list[list[Task]], config: Config, step: int) -> list[Group]:
    """Exact match for predictions, 1 - accuracy (0 at 0) for masks; one group per mask and one per passage."""
    groups = []
    for tasks in proposals:
        for task in tasks:
            if not task.mask.invalid:
                task.rewards = [
                    exact_match(last_answer(response.text, "boxed"), task.mask.target) for response in task.predictions
                ]
                groups.append(Group("pred", task.predictions, task.rewards))
        groups.append(Group("gen", [task.proposal for task in tasks], [task.proposal_reward for task in tasks]))
    if config.shuffle_rewards:  # control: same rewards, no connection to the responses
        rng = random.Random(derive_seed(config.seed, step, "shuffle"))
        for group in groups:
            group.rewards = rng.sample(group.rewards, len(group.rewards))
    return groups


def train(config: Config, ranks: Ranks) -> None:
    """The whole run. Raises what goes wrong; nothing is caught here."""
    begin = time.perf_counter()
    say = tqdm.write if ranks.rank == 0 else lambda *_: None
    run = Path(config.run_dir)

    # ------------------------------------------------------------------ set up: run directory, text, two copies, probe
    if ranks.rank == 0:
        open_run(config)
    dist.barrier()
    tokenizer = load_tokenizer(config)
    if ranks.rank == 0:
        build_index(config, tokenizer, run / "cache", log=say)
    dist.barrier()
    corpus = load_corpus(run / "cache", config)
    replica = load_replica(config, ranks)
    policy = build_policy(replica, config, ranks)
    optimizer = make_optimizer(policy, config)
    sampler = make_sampler(replica, tokenizer, config, ranks)
    check_prompts(sampler)
    probe = make_probe(corpus, sampler, config)
    say(describe(config, ranks, sampler, corpus, probe))

    first, checkpoint = 0, latest_checkpoint(config)
    if checkpoint:
        first = load_checkpoint(checkpoint, policy, optimizer, replica)
        say(f"resuming after step {first} from {checkpoint}")
        if first >= config.steps:
            say("this run is finished; resume=never starts it afresh, a larger steps= continues it")
    if ranks.rank == 0:
        for name in ("metrics.jsonl", "samples.jsonl"):
            keep_rows(run / name, first if checkpoint else -1)
        save_prompts(run / "prompts.txt", sampler, corpus)
    # Set-up leaves a million objects that never die; the sampler's own garbage collections would walk them every phase
    gc.collect()
    gc.freeze()

    if first == 0:
        row = {"step": 0, "method": config.method}
        with clock(row, "probe"):
            row |= run_probe(probe, sampler, config, 0)
        if ranks.rank == 0 and not checkpoint:
            append_row(run / "metrics.jsonl", row)
        say(f"step 0: probe accuracy {row['probe/accuracy']:.3f} sampled, {row['probe/accuracy_greedy']:.3f} greedy")
    if config.steps == 0:
        return dry_run(corpus, policy, optimizer, sampler, config, ranks, say)
    say(f"set up in {time.perf_counter() - begin:.0f} s")

    bar = tqdm(total=config.steps, initial=first, desc="steps", disable=None if ranks.rank == 0 else True)
    for step in range(first, config.steps):
        row, start = {"step": step + 1, "method": config.method}, time.perf_counter()
        passages = step_passages(corpus, config, step)

        # -------------------------------------------------- 1. propose: the generator chooses words to mask
        with clock(row, "propose"):
            proposals = propose(passages, sampler, config, step)
            tasks = [task for group in proposals for task in group if not task.mask.invalid]

        # -------------------------------------------------- 2. predict: the predictor recovers them by chain of thought
        with clock(row, "predict"):
            predict(tasks, sampler, config, step)

        # -------------------------------------------------- 3. reward: both roles
        with clock(row, "reward"):
            groups = reward(proposals, config, step)
            row |= step_metrics(proposals, groups, sampler, config)
            trained = [group for group in groups if group.role == "pred" or config.train_generator]
            samples = make_samples(trained, config)  # advantages inside groups, token weights

        # -------------------------------------------------- 4. update: GRPO on the policy
        with clock(row, "update"):
            row |= update(policy, optimizer, samples, config, ranks, step)

        # -------------------------------------------------- 5. refresh: the sampler gets the new weights
        with clock(row, "refresh"):
            refresh(policy, replica)

        # -------------------------------------------------- 6. probe, save, log
        done, last = step + 1, step + 1 == config.steps
        if config.probe_every and (last or done % config.probe_every == 0):
            with clock(row, "probe"):
                row |= run_probe(probe, sampler, config, done)
        row["time/step"] = time.perf_counter() - start
        row["tokens_per_second"] = row["response_tokens"] / row["time/step"]
        row["peak_memory_gb"] = peak_memory_gb()
        if ranks.rank == 0:
            append_row(run / "metrics.jsonl", row)
            append_row(run / "samples.jsonl", *sample_rows(proposals[: config.samples_per_step], done))
        say(step_line(row, config.steps))
        bar.update()
        if config.save_every and (last or done % config.save_every == 0):
            save_checkpoint(policy, optimizer, replica, tokenizer, config, ranks, done)
    bar.close()
    say(summary_table(read_rows(run / "metrics.jsonl")))
    say(f"{config.run_dir}: done in {time.perf_counter() - begin:.0f} s")


def dry_run(corpus, policy, optimizer, sampler: Sampler, config: Config, ranks: Ranks, say) -> None:
    """steps=0: one rollout of both roles on a few passages, before days are spent on all. Changes no weights.

    The update runs too, at learning rate 0, because it measures how far trainer and sampler disagree.
    """
    passages = step_passages(corpus, config, 0)[:4]
    proposals = propose(passages, sampler, config, 0)
    tasks = [task for group in proposals for task in group if not task.mask.invalid]
    predict(tasks, sampler, config, 0)
    groups = reward(proposals, config, 0)
    row = step_metrics(proposals, groups, sampler, config)
    row |= update(policy, optimizer, make_samples(groups, config), replace(config, learning_rate=0.0), ranks, 0)
    for key, value in sorted(row.items()):
        say(f"  {key:28} {value if isinstance(value, list) else format(value, '.4g')}")
    for task in tasks[:2]:
        say(f"\n--- {task.passage.title}\n{task.passage.text}\n--- generator: {task.proposal.text}")
        say(f"--- target: {task.mask.target!r}; rewards {task.rewards}\n--- predictor: {task.predictions[0].text}")
    if row["gen/valid_rate"] < 0.2 or row["pred/valid_rate"] < 0.2:
        say("fewer than a fifth of the masks or boxes are valid: add a worked example to mask_prompt or predict_prompt")
    say("dry run done; no weights were changed")


def main() -> None:
    config = parse_command_line(__doc__)
    ranks = start_ranks()
    try:
        train(config, ranks)
    except (ConfigError, DataError) as error:
        print(f"{'config' if isinstance(error, ConfigError) else 'data'} error: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # other ranks may wait in a barrier: leave without waiting for them, torchrun ends them
    finally:
        gc.unfreeze()  # else extension modules report leaks at exit
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
