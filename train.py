"""PretrainZero: one language model chooses what to mask in raw text, recovers it, and learns from both by GRPO.

    torchrun --nproc_per_node=8 train.py configs/smollm3.yaml [key=value ...]
    python train.py configs/tiny.yaml                          one process, no torchrun

The loop is `loop` below: propose, predict, reward, update, refresh, log. Everything it calls is one import away, in a
file named after its idea. Every rank runs the same lines: prompts are split over the ranks inside `rollout`, whose
gathered result is the same everywhere, so all later decisions are too; the update splits the packed batches again. If
one rank left a call out, the others would wait for it in theirs until `rank_timeout`.
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

from checkpoint import (
    Saver,
    check_same_run,
    find_checkpoint,
    finish_save,
    load_checkpoint,
    make_saver,
    resume_notes,
    save_checkpoint,
    settle,
)
from config import Config, ConfigError, parse_command_line
from data import DataError, Passage, build_index, load_corpus, step_passages
from eval import Probe, exams_of, make_probe, run_exams, run_probe
from grpo import Group, make_optimizer, update
from masking import make_mask, random_span
from methods import (
    GIVEN,
    THINK_CLOSE,
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
from metrics import (
    append_row,
    clock,
    close_log,
    describe,
    keep_rows,
    largest_memory,
    log_row,
    open_run,
    read_rows,
    sample_rows,
    save_prompts,
    step_line,
    step_metrics,
    summary_table,
    unwritten,
)
from model import (
    build_policy,
    build_reference,
    check_device,
    decide_checkpointing,
    ema_update,
    load_replica,
    load_tokenizer,
    memory_warnings,
    needs_reference,
    refresh,
)
from prompts import BOXED_OPENING, MASK_OPENING, last_answer
from ranks import Ranks, Stopped, all_said, begin_step, gather, listen, report, start_ranks
from report.page import write_report
from rewards import exact_match, prefix_match
from rollout import Rollout, Sampler, check_prompts, derive_seed, make_sampler, mask_prompt, rollout


def open_or_resume(config: Config, world: int, say) -> tuple[Path, dict] | None:
    """The checkpoint to continue from, if any, and the run directory. For rank 0, before anything is loaded.

    Raises ConfigError before a file is touched if the run there has another config.
    """
    found = find_checkpoint(config, say) if config.steps else None  # a dry run looks at the start
    if found:
        check_same_run(found[1], config)
        if found[1]["step"] >= config.steps and not found[1]["row"]:
            return found
        for line in resume_notes(found[1], config, world):
            say(line)
    open_run(config)
    return found


def set_up(config: Config, ranks: Ranks, facts: dict | None, say) -> tuple:
    """Everything that a run keeps: (corpus, policy, reference, optimizer, sampler, probe)."""
    run = Path(config.run_dir)

    # ---- text
    exams = exams_of(config, say)
    try:
        tokenizer = load_tokenizer(config)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"model={config.model!r}: no usable tokenizer ({reason})") from None
    if config.method == "rlvr":
        corpus = question_corpus(config, say)
    else:
        if ranks.rank == 0:
            build_index(config, tokenizer, run / "cache", say, sorted(run.parent.glob("*/cache")))
        dist.barrier()
        corpus = load_corpus(run / "cache", config)

    # ---- the model: a replica that samples, the sharded policy that learns, a second copy where the method needs one
    if not Path(config.model).expanduser().exists():
        say(f"loading {config.model}; the first time from the hub")
    replica = load_replica(config, ranks)
    trained = decide_checkpointing(replica.config, config, ranks)
    for line in memory_warnings(replica.config, trained, ranks):
        say(line)
    policy = build_policy(replica, trained, ranks)
    reference = build_reference(replica, config, ranks) if needs_reference(config) else None
    optimizer = make_optimizer(policy, config)
    sampler = make_sampler(replica, tokenizer, config, ranks)
    check_prompts(sampler)
    if config.method == "rlp":
        rlp_frame(sampler)  # raises now if its prompt does not fit
    probe = make_probe(corpus, sampler, config)
    probe.exams = exams
    say(describe(trained, ranks, sampler, corpus, probe))

    if ranks.rank == 0:
        last = facts["step"] if facts else -1
        waiting = bool(facts and facts["row"])  # its row, and its probe, come again
        if config.steps:  # a dry run deletes nothing
            keep_rows(run / "samples.jsonl", last)
            keep_rows(run / "metrics.jsonl", last - waiting)
            keep_rows(run / "probes.jsonl", last - waiting)
        if config.method not in ("rlvr", "rlp"):
            save_prompts(run / "prompts.txt", sampler, corpus)
    # Set-up leaves a million objects that never die; the sampler's own garbage collections would walk them every phase
    gc.collect()
    gc.freeze()
    return corpus, policy, reference, optimizer, sampler, probe


def propose(passages: list[Passage], sampler: Sampler, config: Config, step: int) -> list[list[Task]]:
    """The generator reads each passage `masks_per_passage` times and names the words to mask: tasks per passage.

    `random_masks` spans, drawn by rule, stand after them."""
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
        spans = [random_span(passage, config, rng) for _ in range(config.random_masks)]
        proposals.append(tasks + [make_task(passage, span, sampler) for span in spans])
    return proposals


def predict(tasks: list[Task], sampler: Sampler, config: Config, step: int) -> None:
    """The predictor answers each masked passage `predictions_per_mask` times, by chain of thought."""
    prompts, noise = [task.prompt_ids for task in tasks], (step, "predict")
    ends = THINK_CLOSE if any(task.position for task in tasks) else BOXED_OPENING  # rlp: a thought, no answer
    groups = rollout(sampler, prompts, config.predictions_per_mask, config.max_prediction_tokens, ends, noise)
    for task, group in zip(tasks, groups, strict=True):
        task.predictions = group


def grade(task: Task, response: Rollout, config: Config) -> float:
    """The reward of one prediction, from 0 to 1 (the generator's is 1 minus their mean). It sees the whole record: a
    reward of your own goes here, for all methods with masks; `rlvr` and `rlp` have judges of their own."""
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
        proposed = [task for task in passage_tasks if task.proposal]  # random_masks have no author to reward
        rewards = [task.proposal_reward(config.generator_reward) for task in proposed]
        groups.append(Group("gen", [task.proposal for task in proposed], rewards))
    if config.shuffle_rewards:  # control: same rewards, no connection to the responses
        rng = random.Random(derive_seed(config.seed, step, "shuffle"))
        for group in groups:
            group.rewards = rng.sample(group.rewards, len(group.rewards))
    return groups


def train(config: Config, ranks: Ranks) -> int:
    """The whole run: set-up, the loop, the last save. Raises what goes wrong. Returns the exit status:

    0; after a signal 128 + its number; 1 if the last checkpoint, or a row, could not be written.
    """
    begin, run = time.perf_counter(), Path(config.run_dir)
    say = tqdm.write if ranks.rank == 0 else lambda *_: None
    check_device(config, ranks)  # before a folder is touched
    (found,) = gather([open_or_resume(config, ranks.world, say)] if ranks.rank == 0 else [])
    path, facts = found or (None, None)
    if facts and facts["step"] >= config.steps and not facts["row"]:
        say(f"{run}: this run is finished: step {facts['step']}. steps= continues it, resume=never starts it afresh")
        return 0
    corpus, policy, reference, optimizer, sampler, probe = set_up(config, ranks, facts, say)
    if config.steps == 0:
        first_row(corpus, policy, reference, sampler, probe, say)
        return dry_run(corpus, policy, reference, optimizer, sampler, say)

    saver = make_saver(policy, optimizer, sampler, reference if config.method == "rlp" else None)
    if found:
        load_checkpoint(saver, path, facts)
        say(f"resuming after step {saver.done} from {path}")
    say(f"set up in {time.perf_counter() - begin:.0f} s")
    try:
        if not found:
            row = first_row(corpus, policy, reference, sampler, probe, say)
            if ranks.rank == 0:
                log_row(run, row, config)
        elif saver.row:  # the run was stopped in this step's probe
            begin_step(saver.done)
            log_step(saver.row, time.perf_counter(), probe, sampler, say)
            if ranks.rank == 0:
                settle(path, facts)
            saver.row = None
        loop(corpus, policy, reference, optimizer, sampler, probe, saver, say)
    except Stopped as stop:  # an unfinished step is abandoned: the weights are still those of the last finished one
        say(str(stop))
        if saver.done and config.save_every and not (finish_save(saver) and saver.step == saver.done):
            save_checkpoint(saver)
        saved = finish_save(saver)
        what = f"saved after step {saver.step}" if saver.step else f"nothing to save, save_every={config.save_every}"
        say(f"{run}: {what if saved else f'STEP {saver.step} IS NOT SAVED'}")
        return stop.status if saved else 1
    if not finish_save(saver) or (ranks.rank == 0 and unwritten()):
        say(f"{config.run_dir}: NOT ALL IS SAVED, see the warnings above")
        return 1
    if ranks.rank == 0:
        say(summary_table(read_rows(run / "metrics.jsonl")))
        make_page(run, say)
    say(f"{config.run_dir}: done in {time.perf_counter() - begin:.0f} s")
    return 0


def first_row(corpus, policy, reference, sampler: Sampler, probe: Probe, say) -> dict:
    """Row 0: before training."""
    begin_step(0)
    config = sampler.config
    row = {"step": 0, "method": config.method}
    measure(row, probe, sampler)
    if config.method == "rlp":
        row |= gains_without_thought(step_passages(corpus, config, 0), policy, reference, sampler)
    told = [f"probe accuracy {row['probe/accuracy']:.3f} sampled, {row['probe/accuracy_greedy']:.3f} greedy"]
    say("step 0: " + ", ".join([*told, *(f"{exam.name} {row[f'eval/{exam.name}']:.2f}" for exam in probe.exams)]))
    return row


def loop(corpus, policy, reference, optimizer, sampler: Sampler, probe: Probe, saver: Saver, say) -> None:
    """The steps from saver.done to the last. Raises Stopped on every rank after a signal; saver then knows what for."""
    config, ranks, run = sampler.config, sampler.ranks, Path(sampler.config.run_dir)
    saved: dict = {}
    bar = tqdm(total=config.steps, initial=saver.done, desc="steps", disable=None if ranks.rank == 0 else True)
    for step in range(saver.done, config.steps):
        begin_step(step + 1)
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
        with clock(row, "update"), largest_memory(row):
            row |= update(policy, optimizer, samples, config, ranks, step)

        # -------------------------------------------------- 5. refresh: the sampler gets the new weights
        with clock(row, "refresh"):
            refresh(policy, sampler.replica)
            if method == "rlp":
                ema_update(reference, policy, config.ema_decay)

        # -------------------------------------------------- 6. log, probe, save
        saver.done, saver.row = step + 1, row  # a stop from here on saves the new weights
        if ranks.rank == 0:
            append_row(run / "samples.jsonl", *sample_rows(proposals[: config.samples_per_step], config, step + 1))
        log_step(row, start, probe, sampler, say)
        saver.row = None
        bar.update()
        saved = {}  # seconds of a save stand in the next row: this one must be on disk before the checkpoint
        if config.save_every and (step + 1 == config.steps or (step + 1) % config.save_every == 0):
            with clock(saved, "save"):
                save_checkpoint(saver)
    bar.close()


def log_step(row: dict, start: float, probe: Probe, sampler: Sampler, say) -> None:
    """Measure if it is time, then the row of this step goes to metrics.jsonl. start: time.perf_counter() at its
    begin."""
    config = sampler.config
    measure(row, probe, sampler)
    row["time/step"] = time.perf_counter() - start
    row["tokens_per_second"] = row["response_tokens"] / row["time/step"]
    if sampler.ranks.rank == 0:
        log_row(Path(config.run_dir), row, config)
    say(step_line(row, config.steps))


def measure(row: dict, probe: Probe, sampler: Sampler) -> None:
    """Adds the probe and the benchmarks to the row of a step where they are due: at step 0, at the last, in between."""
    config, step = sampler.config, row["step"]
    if step == 0 or config.probe_every and (step == config.steps or step % config.probe_every == 0):
        with clock(row, "probe"):
            row |= run_probe(probe, sampler, config, step)
        if sampler.ranks.rank == 0 and config.steps:
            append_row(Path(config.run_dir) / "probes.jsonl", *sample_rows([probe.shown], config, step))
    if probe.exams and (step in (0, config.steps) or step % config.eval_every == 0):
        with clock(row, "eval"):
            row |= run_exams(probe.exams, sampler)


def make_page(run: Path, say) -> None:
    """report.html, for people who would rather look than read. Whatever goes wrong in it, the run is not lost."""
    try:
        say(f"to look at: {write_report([run])}")
    except Exception as error:
        say(f"warning: no report.html ({type(error).__name__}: {error}); python -m report {run} tries again")


def dry_run(corpus, policy, reference, optimizer, sampler: Sampler, say) -> int:
    """steps=0: one rollout of both roles on a few passages, before days are spent on all. Changes no weights.

    The update runs too, at learning rate 0, because it measures how far trainer and sampler disagree.
    """
    config = replace(sampler.config, learning_rate=0.0, passages_per_step=4)
    method, sampler = config.method, replace(sampler, config=config)
    passages = step_passages(corpus, config, 0)
    active = method == "active"
    proposals = propose(passages, sampler, config, 0) if active else draw_tasks(method, passages, reference, sampler, 0)
    tasks = [task for group in proposals for task in group if not task.mask.invalid]
    if method not in GIVEN:
        predict(tasks, sampler, config, 0)
    groups = reward(method, tasks, proposals, policy, reference, sampler, 0)
    samples = training_samples(method, groups, tasks, passages, reference, sampler)
    row = step_metrics(method, proposals, groups, samples, sampler)
    if groups and not samples:  # nothing to learn from so few, but the trainer is to be tried
        say("no group with contrast: every other response counts as right in the update below")
        groups = [replace(group, rewards=[n % 2.0 for n in range(len(group.rewards))]) for group in groups]
        whole = replace(sampler, config=replace(config, train_generator=True, mask_truncated=False))
        samples = training_samples(method, groups, tasks, passages, reference, whole)
    with largest_memory(row):
        row |= update(policy, optimizer, samples, config, sampler.ranks, 0)
    for key, value in sorted(row.items()):
        say(f"  {key:28} {value if isinstance(value, list) else format(value, '.4g')}")
    if active and not tasks:
        for task in proposals[0][:2]:
            say(f"\n--- {task.passage.title}, no valid mask: {task.proposal.text}")
    for task in [task for task in tasks if task.predictions][:2]:
        say(f"\n--- {task.passage.title}\n{task.mask.masked}")
        if task.proposal:
            say(f"--- generator: {task.proposal.text}")
        say(f"--- target: {task.mask.target!r}; rewards {task.rewards}\n--- predictor: {task.predictions[0].text}")
    if groups and min(row["gen/valid_rate"], row["pred/valid_rate"]) < 0.2 and method != "rlp":
        say("under a fifth of the masks or boxes is valid: another worked example in mask_prompt, predict_prompt?")
    say("dry run done; no weights were changed")
    return 0


def main() -> None:
    config = parse_command_line(__doc__)
    ranks = start_ranks(config.rank_timeout)
    listen()
    try:
        status = train(config, ranks)
    except (ConfigError, DataError) as error:
        if ranks.rank:
            time.sleep(5)  # rank 0 says it, once, and torchrun ends the others; but it may be this rank's alone
        kind = "config" if isinstance(error, ConfigError) else "data"
        print(f"{kind} error: {error}" + (f" (rank {ranks.rank})" if ranks.rank else ""), file=sys.stderr, flush=True)
        all_said()
        os._exit(2)  # other ranks may wait in a barrier: leave without waiting for them, torchrun ends them
    except Exception as error:
        report(error)
        os._exit(1)  # at once, as above: sampling or saving threads may wait, too
    close_log()
    dist.destroy_process_group()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # All is said and written. Threads of the libraries may still be ending, for which the interpreter's own way out has
    # aborted a finished run (SIGABRT, once in forty)
    os._exit(status)


if __name__ == "__main__":
    main()
