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
from dataclasses import replace
from pathlib import Path

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
    log_row,
    open_run,
    peak_memory_gb,
    read_rows,
    sample_rows,
    save_prompts,
)
from grpo import Group, make_optimizer, update
from masking import make_mask
from metrics import step_line, step_metrics, summary_table
from model import Ranks, build_policy, load_replica, load_tokenizer, refresh, start_ranks
from probe import make_probe, run_probe
from prompts import BOXED_OPENING, MASK_OPENING, last_answer
from reference_model import build_reference, ema_update, needs_reference
from report import write_report
from rewards import exact_match, prefix_match
from rlp import THINK_CLOSE
from rollout import Rollout, Sampler, check_prompts, derive_seed, make_sampler, mask_prompt, rollout
from tasks import (
    GIVEN,
    Task,
    draw_tasks,
    gains_without_thought,
    make_task,
    method_at,
    question_corpus,
    rlp_frame,
    thought_gains,
    training_samples,
    verify_predictions,
)


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
            mask = make_mask(last_answer(response.text, "mask"), passage, config, rng)
            tasks.append(make_task(passage, mask, sampler, response))
        proposals.append(tasks)
    return proposals


def predict(tasks: list[Task], sampler: Sampler, config: Config, step: int) -> None:
    """The predictor answers each masked passage `predictions_per_mask` times, by chain of thought."""
    prompts, noise = [task.prompt_ids for task in tasks], (step, "predict")
    ends = THINK_CLOSE if any(task.position for task in tasks) else BOXED_OPENING  # rlp: a thought, no answer
    groups = rollout(sampler, prompts, config.predictions_per_mask, config.max_prediction_tokens, ends, noise)
    for task, group in zip(tasks, groups, strict=True):
        task.predictions = group


def grade(task: Task, response: Rollout, config: Config) -> float:
    """The reward of one prediction. It sees the whole record: a reward of your own goes here."""
    answer = last_answer(response.text, "boxed")
    if config.reward == "prefix":
        return prefix_match(answer, task.mask.prefixes)
    return exact_match(answer, task.mask.target)


def reward(
    method: str, tasks: list[Task], proposals: list[list[Task]], policy, reference, sampler: Sampler, step: int
) -> list[Group]:
    """Exact match for predictions, 1 - accuracy (0 at 0) for masks; one group per mask and one per passage.

    tasks: the valid ones of proposals, answered. With given completions there is nothing to reward.
    """
    config, groups = sampler.config, []
    if method in GIVEN:
        return []
    if method == "rlvr":
        answers = [[last_answer(response.text, "boxed") for response in task.predictions] for task in tasks]
        verdicts = verify_predictions(answers, [task.mask.target for task in tasks], config, sampler.ranks)
    elif method == "rlp":
        verdicts = thought_gains(tasks, policy, reference, sampler)
    else:
        verdicts = [[grade(task, response, config) for response in task.predictions] for task in tasks]
    for task, rewards in zip(tasks, verdicts, strict=True):
        task.rewards = rewards
        groups.append(Group("pred", task.predictions, rewards))
    for passage_tasks in proposals if method == "active" else ():
        rewards = [task.proposal_reward(config.generator_reward) for task in passage_tasks]
        groups.append(Group("gen", [task.proposal for task in passage_tasks], rewards))
    if config.shuffle_rewards:  # control: same rewards, no connection to the responses
        rng = random.Random(derive_seed(config.seed, step, "shuffle"))
        for group in groups:
            group.rewards = rng.sample(group.rewards, len(group.rewards))
    return groups


def set_up(config: Config, ranks: Ranks, say) -> tuple:
    """Everything that a run keeps: (corpus, policy, reference, optimizer, sampler, probe, steps done before)."""
    run = Path(config.run_dir)
    if ranks.rank == 0:
        open_run(config)
    dist.barrier()

    # ---- text
    tokenizer = load_tokenizer(config)
    if config.method == "rlvr":
        corpus = question_corpus(config, say)
    else:
        if ranks.rank == 0:
            build_index(config, tokenizer, run / "cache", log=say)
        dist.barrier()
        corpus = load_corpus(run / "cache", config)

    # ---- the model: a replica that samples, the sharded policy that learns, a second copy where the method needs one
    replica = load_replica(config, ranks)
    policy = build_policy(replica, config, ranks)
    reference = build_reference(replica, config, ranks) if needs_reference(config) else None
    optimizer = make_optimizer(policy, config)
    sampler = make_sampler(replica, tokenizer, config, ranks)
    check_prompts(sampler)
    if config.method == "rlp":
        rlp_frame(sampler)  # raises now if its prompt does not fit
    probe = make_probe(corpus, sampler, config)
    say(describe(config, ranks, sampler, corpus, probe))

    # ---- where an earlier run ended
    first, checkpoint = 0, latest_checkpoint(config)
    if checkpoint:
        average = reference if config.method == "rlp" else None
        first = load_checkpoint(checkpoint, policy, optimizer, replica, config, average)
        say(f"resuming after step {first} from {checkpoint}")
        if first >= config.steps:
            say("this run is finished; resume=never starts it afresh, a larger steps= continues it")
    if ranks.rank == 0:
        for name in ("metrics", "samples", "probes") if config.steps else ():  # a dry run deletes nothing
            keep_rows(run / f"{name}.jsonl", first if checkpoint else -1)
        if config.method not in ("rlvr", "rlp"):
            save_prompts(run / "prompts.txt", sampler, corpus)
    # Set-up leaves a million objects that never die; the sampler's own garbage collections would walk them every phase
    gc.collect()
    gc.freeze()
    return corpus, policy, reference, optimizer, sampler, probe, first


def train(config: Config, ranks: Ranks) -> None:
    """The whole run. Raises what goes wrong; nothing is caught here."""
    begin, run = time.perf_counter(), Path(config.run_dir)
    say = tqdm.write if ranks.rank == 0 else lambda *_: None
    corpus, policy, reference, optimizer, sampler, probe, first = set_up(config, ranks, say)

    if first == 0:
        row = {"step": 0, "method": config.method}
        with clock(row, "probe"):
            row |= run_probe(probe, sampler, config, 0)
        if config.method == "rlp":
            row |= gains_without_thought(step_passages(corpus, config, 0), policy, reference, sampler)
        if ranks.rank == 0 and config.steps:
            log_row(run, row, config)
            append_row(run / "probes.jsonl", *sample_rows([probe.shown], config, 0))
        say(f"step 0: probe accuracy {row['probe/accuracy']:.3f} sampled, {row['probe/accuracy_greedy']:.3f} greedy")
    if config.steps == 0:
        return dry_run(corpus, policy, optimizer, reference, sampler, config, ranks, say)
    say(f"set up in {time.perf_counter() - begin:.0f} s")

    saved: dict = {}
    bar = tqdm(total=config.steps, initial=first, desc="steps", disable=None if ranks.rank == 0 else True)
    for step in range(first, config.steps):
        method = method_at(config, step)
        row, start = {"step": step + 1, "method": method, **saved}, time.perf_counter()
        passages = step_passages(corpus, config, step)

        # -------------------------------------------------- 1. propose: the generator chooses words to mask
        with clock(row, "propose"):
            if method == "active":
                proposals = propose(passages, sampler, config, step)
            else:  # a rule draws them
                proposals = draw_tasks(method, passages, reference, sampler, step)
            tasks = [task for group in proposals for task in group if not task.mask.invalid]

        # -------------------------------------------------- 2. predict: the predictor recovers them by chain of thought
        with clock(row, "predict"):
            if method not in GIVEN:
                predict(tasks, sampler, config, step)

        # -------------------------------------------------- 3. reward: both roles; advantages and token weights
        with clock(row, "reward"):
            groups = reward(method, tasks, proposals, policy, reference, sampler, step)
            samples = training_samples(method, groups, tasks, passages, reference, sampler)
            row |= step_metrics(method, proposals, groups, samples, sampler)

        # -------------------------------------------------- 4. update: GRPO on the policy
        with clock(row, "update"):
            row |= update(policy, optimizer, samples, config, ranks, step)

        # -------------------------------------------------- 5. refresh: the sampler gets the new weights
        with clock(row, "refresh"):
            refresh(policy, sampler.replica)
            if method == "rlp":
                ema_update(reference, policy, config.ema_decay)

        # -------------------------------------------------- 6. probe, save, log
        done, last = step + 1, step + 1 == config.steps
        if config.probe_every and (last or done % config.probe_every == 0):
            with clock(row, "probe"):
                row |= run_probe(probe, sampler, config, done)
            if ranks.rank == 0:
                append_row(run / "probes.jsonl", *sample_rows([probe.shown], config, done))
        row["time/step"] = time.perf_counter() - start
        row["tokens_per_second"] = row["response_tokens"] / row["time/step"]
        row["peak_memory_gb"] = peak_memory_gb()
        if ranks.rank == 0:
            log_row(run, row, config)
            append_row(run / "samples.jsonl", *sample_rows(proposals[: config.samples_per_step], config, done))
        say(step_line(row, config.steps))
        bar.update()
        saved = {}  # seconds of a save stand in the next row: this one must be on disk before the checkpoint
        if config.save_every and (last or done % config.save_every == 0):
            with clock(saved, "save"):
                average = reference if config.method == "rlp" else None
                save_checkpoint(policy, optimizer, sampler.replica, sampler.tokenizer, config, ranks, done, average)
    bar.close()
    if ranks.rank == 0:
        say(summary_table(read_rows(run / "metrics.jsonl")))
        make_page(run, say)
    say(f"{config.run_dir}: done in {time.perf_counter() - begin:.0f} s")


def make_page(run: Path, say) -> None:
    """report.html, for people who would rather look than read. Whatever goes wrong in it, the run is not lost."""
    try:
        say(f"to look at: {write_report([run])}")
    except Exception as error:
        say(f"warning: no report.html ({type(error).__name__}: {error}); python report.py {run} tries again")


def dry_run(corpus, policy, optimizer, reference, sampler: Sampler, config: Config, ranks: Ranks, say) -> None:
    """steps=0: one rollout of both roles on a few passages, before days are spent on all. Changes no weights.

    The update runs too, at learning rate 0, because it measures how far trainer and sampler disagree.
    """
    method, config = config.method, replace(config, learning_rate=0.0, passages_per_step=4)
    sampler = replace(sampler, config=config)
    passages = step_passages(corpus, config, 0)
    active = method == "active"
    proposals = propose(passages, sampler, config, 0) if active else draw_tasks(method, passages, reference, sampler, 0)
    tasks = [task for group in proposals for task in group if not task.mask.invalid]
    if method not in GIVEN:
        predict(tasks, sampler, config, 0)
    groups = reward(method, tasks, proposals, policy, reference, sampler, 0)
    samples = training_samples(method, groups, tasks, passages, reference, sampler)
    row = step_metrics(method, proposals, groups, samples, sampler)
    row |= update(policy, optimizer, samples, config, ranks, 0)
    for key, value in sorted(row.items()):
        say(f"  {key:28} {value if isinstance(value, list) else format(value, '.4g')}")
    for task in [task for task in tasks if task.predictions][:2]:
        say(f"\n--- {task.passage.title}\n{task.mask.masked}")
        if task.proposal:
            say(f"--- generator: {task.proposal.text}")
        say(f"--- target: {task.mask.target!r}; rewards {task.rewards}\n--- predictor: {task.predictions[0].text}")
    if groups and min(row["gen/valid_rate"], row["pred/valid_rate"]) < 0.2 and method != "rlp":
        say("fewer than a fifth of the masks or boxes are valid: add a worked example to mask_prompt or predict_prompt")
    say("dry run done; no weights were changed")


def main() -> None:
    config = parse_command_line(__doc__)
    ranks = start_ranks()
    try:
        train(config, ranks)
    except (ConfigError, DataError) as error:
        if ranks.rank == 0:
            kind = "config" if isinstance(error, ConfigError) else "data"
            print(f"{kind} error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(5)  # rank 0 says it, once
        os._exit(2)  # other ranks may wait in a barrier: leave without waiting for them, torchrun ends them
    finally:
        gc.unfreeze()  # else extension modules report leaks at exit
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
