"""PretrainZero: one language model chooses what to mask in raw text, recovers it, and learns from both by GRPO.

    torchrun --nproc_per_node=8 train.py configs/smollm3.yaml [key=value ...]
    python train.py configs/tiny.yaml                          one process, no torchrun

The algorithm is `step` below: propose, predict, reward, update, refresh. What differs between methods stands in
METHODS (methods.py). Every rank runs the same lines: prompts are split over the ranks inside `rollout`, whose gathered
result is the same everywhere, so all later decisions are too; the update splits the packed batches again. If one rank
skips a collective call, the others wait for it until `rank_timeout`.
"""

import gc
import json
import os
import re
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from benchmarks.exams import load_exams, parse_tasks, run_exams
from checkpoint import (
    check_same_run, complete_row, finish_save, load_checkpoint, make_saver, newest_checkpoint, resume_notes,
    save_checkpoint,
)  # fmt: skip
from config import Config, ConfigError, parse_command_line
from engine.checks import try_sampler
from data import Passage, build_index, data_fingerprint, load_corpus, step_passages
from eval import make_probe, run_probe
from grpo import Group, Sample, make_optimizer, update
from methods import METHODS, Method, Run, Task, method_at, needs_reference, reward
from metrics import (
    agreement_warning, append_row, clock, close_log, describe, keep_rows, largest_memory, log_row, open_run, read_rows,
    sample_rows, save_prompts, step_line, step_metrics, summary_table, unwritten, write_whole,
)  # fmt: skip
from model import (
    add_extra, build_policy, build_reference, check_device, ema_update, load_replica, load_tokenizer, refresh,
)  # fmt: skip
from prompts import chat_frame, check_prompts
from ranks import Ranks, Stopped, begin_step, gather, leave_with, listen, report_error, start_ranks
from relatives.rlvr import question_corpus
from rollout import make_sampler


@dataclass
class Step:
    """What one step made, from its passages to the row of metrics.jsonl."""

    row: dict
    passages: list[Passage] = field(default_factory=list)
    proposals: list[list[Task]] = field(default_factory=list)
    """Of each passage: one task per mask, invalid ones among them."""
    tasks: list[Task] = field(default_factory=list)
    """The valid ones, answered and rewarded."""
    groups: list[Group] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)


def step(run: Run, number: int, method: Method | None = None) -> Step:
    """One step, number from 0, of the run's method or of another (bench gives its own). Every rank calls it."""
    passages, name = step_passages(run.corpus, run.config, number), method_at(run.config, number)
    method, row = method or METHODS[name], {"step": number + 1, "method": name}
    done = Step(row, passages)

    # ---------------------------------------------------- 1. propose: the generator, or a rule, chooses words to mask
    with clock(row, "propose"):
        done.proposals = method.propose(run, done.passages, number)
        done.tasks = [task for tasks in done.proposals for task in tasks if not task.mask.invalid]

    # ---------------------------------------------------- 2. predict: the predictor recovers them by chain of thought
    with clock(row, "predict"):
        if method.predict:
            method.predict(run, done.tasks, number)

    # ---------------------------------------------------- 3. reward: both roles; advantages and token weights
    with clock(row, "reward"):
        done.groups = reward(run, method, done.proposals, done.tasks, number)
        done.samples = method.samples(run, done.groups, done.tasks, done.passages)
        row |= step_metrics(done.proposals, done.groups, done.samples, run.sampler)

    # ---------------------------------------------------- 4. update: GRPO on the policy
    with clock(row, "update"), largest_memory(row):
        row |= (method.update or update)(run.policy, run.optimizer, done.samples, run.config, run.ranks, number)

    # ---------------------------------------------------- 5. refresh: the sampler gets the new weights
    with clock(row, "refresh"):
        row["replica_changed"] = refresh(run.policy, run.sampler.replica)
        if method.reference == "average":
            ema_update(run.reference, run.policy, run.config.ema_decay)
    return done


def loop(run: Run, say) -> None:
    """The steps from run.saver.done to the last: step, log, probe, save. Raises Stopped on every rank after a signal;
    run.saver then knows what can be saved."""
    config, saver, rank = run.config, run.saver, run.ranks.rank
    saved: dict = {}
    bar = tqdm(total=config.steps, initial=saver.done, desc="steps", disable=None if rank == 0 else True)
    for number in range(saver.done, config.steps):
        begin_step(number + 1)
        start = time.perf_counter()
        done = step(run, number)
        row = done.row | saved  # seconds of a save stand in the next row: this row must be on disk before the save
        saver.done, saver.row = number + 1, row  # a stop from here on saves the new weights
        if rank == 0:
            rows = sample_rows(done.proposals[: config.samples_per_step], number + 1)
            append_row(Path(config.run_dir) / "samples.jsonl", *rows)
        log_step(run, row, start, say)
        saver.row = None
        bar.update()
        saved = {}
        if config.save_every and (number + 1 == config.steps or (number + 1) % config.save_every == 0):
            with clock(saved, "save"):
                save_checkpoint(saver)
    bar.close()


def log_step(run: Run, row: dict, start: float, say) -> None:
    """Probe and benchmarks if they are due, then the row goes to metrics.jsonl. start: time.perf_counter() at the
    step's begin."""
    measure(run, row)
    row["time/step"] = time.perf_counter() - start
    row["tokens_per_second"] = row["response_tokens"] / row["time/step"]
    if run.ranks.rank == 0:
        log_row(Path(run.config.run_dir), row, run.config)
    say(step_line(row, run.config.steps))
    if "probe/accuracy" in row and run.ranks.rank == 0:
        if warning := agreement_warning(read_rows(Path(run.config.run_dir) / "metrics.jsonl")):
            say(warning)


def measure(run: Run, row: dict) -> None:
    """Adds the probe and the benchmarks to the row of a step where they are due: at step 0, at the last, in between."""
    config, probe, number = run.config, run.probe, row["step"]
    if number == 0 or config.probe_every and (number == config.steps or number % config.probe_every == 0):
        with clock(row, "probe"):
            row |= run_probe(probe, run.sampler, config, number)
        if run.ranks.rank == 0 and config.steps:
            append_row(Path(config.run_dir) / "probes.jsonl", *sample_rows([probe.shown], number))
    if probe.exams and (number in (0, config.steps) or number % config.eval_every == 0):
        with clock(row, "eval"):
            row |= run_exams(probe.exams, run.sampler)


def first_row(run: Run, say) -> dict:
    """Row 0: before training."""
    begin_step(0)
    row = {"step": 0, "method": run.config.method}
    measure(run, row)
    if at_start := METHODS[run.config.method].at_start:
        row |= at_start(run, step_passages(run.corpus, run.config, 0))
    parts = [f"probe accuracy {row['probe/accuracy']:.3f} sampled, {row['probe/accuracy_greedy']:.3f} greedy"]
    say("step 0: " + ", ".join([*parts, *(f"{exam.name} {row[f'eval/{exam.name}']:.2f}" for exam in run.probe.exams)]))
    return row


def dry_run(run: Run, say) -> int:
    """steps=0: one step on four passages at learning rate 0, before days are spent. Shows what both roles wrote, and
    how far trainer and sampler disagree. Of a run with a warm-up it is a step of the method that comes after."""
    config = replace(run.config, learning_rate=0.0, passages_per_step=4, warmup_method="")
    run = replace(run, config=config, sampler=replace(run.sampler, config=config))
    done = step(run, 0)
    row = done.row
    if done.groups and not done.samples:  # nothing to learn from so few, but the trainer is to be tried
        say("no group with contrast: every other response earns 1 in the update below")
        for group in done.groups:
            group.rewards[:] = [n % 2.0 for n in range(len(group.rewards))]  # in place: a task holds the same list
        every = replace(run, config=replace(config, train_generator=True, mask_truncated=False))
        samples = METHODS[config.method].samples(every, done.groups, done.tasks, done.passages)
        row |= update(run.policy, run.optimizer, samples, config, run.ranks, 0)
    for key, value in sorted(row.items()):
        if key not in ("step", "method") and not key.startswith("time/"):
            say(f"  {key:28} {value if isinstance(value, list) else format(value, '.4g')}")
    if done.proposals and done.proposals[0] and not done.tasks:
        for task in [task for task in done.proposals[0] if task.proposal][:2]:
            say(f"\n--- {task.passage.title}, no valid mask: {task.proposal.text}")
    for task in [task for task in done.tasks if task.predictions][:2]:
        say(f"\n--- {task.passage.title}\n{task.mask.masked}")
        if task.proposal:
            say(f"--- generator: {task.proposal.text}")
        say(f"--- target: {task.mask.target!r}; rewards {task.rewards}\n--- predictor: {task.predictions[0].text}")
    graded = any(task.correct for task in done.tasks)
    if any(done.proposals) and row["gen/valid_rate"] < 0.2 or (graded and row["pred/valid_rate"] < 0.2):
        say("under a fifth of the masks or boxes is valid: another worked example in mask_prompt, predict_prompt?")
    say("dry run done; no weights were changed")
    return 0


# ------------------------------------------------------------------------------------------------------------- the run


def train(config: Config, ranks: Ranks) -> int:
    """The whole run: set-up, the loop, the last save. Raises what goes wrong. Returns the exit status:

    0; after a signal 128 + its number; 1 if the last checkpoint, or a row, could not be written.
    """
    begin, folder = time.perf_counter(), Path(config.run_dir)
    say = tqdm.write if ranks.rank == 0 else lambda *_: None
    check_device(config, ranks)  # before a folder is touched
    try:
        (found,) = gather([open_or_resume(config, ranks.world, say)] if ranks.rank == 0 else [])
    except OSError as error:
        raise ConfigError(f"run_dir={config.run_dir!r}: cannot be written ({error})") from None
    path, saved = found or (None, None)
    if saved and saved["step"] >= config.steps and not saved["row"]:
        say(f"{folder}: this run is finished: step {saved['step']}. steps= continues it, resume=never starts afresh")
        return 0
    run = set_up(config, ranks, saved, say)
    if config.steps == 0:
        first_row(run, say)
        return dry_run(run, say)

    average = run.reference if METHODS[config.method].reference == "average" else None
    saver = run.saver = make_saver(run.policy, run.optimizer, run.sampler, average)
    if found:
        load_checkpoint(saver, path, saved)
        say(f"resuming after step {saver.done} from {path}")
    say(f"set up in {time.perf_counter() - begin:.0f} s")
    try:
        if not found:
            row = first_row(run, say)
            if ranks.rank == 0:
                log_row(folder, row, config)
        elif saver.row:  # the run was stopped in this step's probe
            begin_step(saver.done)
            spent = sum(seconds for key, seconds in saver.row.items() if key.startswith("time/"))
            log_step(run, saver.row, time.perf_counter() - spent, say)
            if ranks.rank == 0:
                complete_row(path, saved)
            saver.row = None
        loop(run, say)
    except Stopped as stop:  # an unfinished step is abandoned: the weights are still those of the last finished one
        say(str(stop))
        if saver.done and config.save_every and not (finish_save(saver) and saver.step == saver.done):
            save_checkpoint(saver)
        whole = finish_save(saver)
        what = f"saved after step {saver.step}" if saver.step else f"nothing to save, save_every={config.save_every}"
        say(f"{folder}: {what if whole else f'STEP {saver.step} IS NOT SAVED'}")
        return stop.status if whole else 1
    if not finish_save(saver) or (ranks.rank == 0 and unwritten()):
        say(f"{folder}: NOT ALL IS SAVED, see the warnings above")
        return 1
    if ranks.rank == 0:
        say(summary_table(read_rows(folder / "metrics.jsonl")))
        make_page(folder, say)
    say(f"{folder}: done in {time.perf_counter() - begin:.0f} s")
    return 0


def open_or_resume(config: Config, world: int, say) -> tuple[Path, dict] | None:
    """The checkpoint to continue from, if any, and the run directory. For rank 0, before anything is loaded.

    Raises ConfigError before a file is touched if the run there has another config.
    """
    goes_on = config.steps and config.resume == "auto"  # a dry run looks at the start
    found = newest_checkpoint(Path(config.run_dir), say) if goes_on else None
    if found:
        check_same_run(found[1], config, data_fingerprint(config))
        if found[1]["step"] >= config.steps and not found[1]["row"]:
            return found
        for line in resume_notes(found[1], config, world):
            say(line)
    open_run(config, not found, say)
    return found


def set_up(config: Config, ranks: Ranks, saved: dict | None, say) -> Run:
    """Text, models, optimizer, sampler, probe. saved: what the checkpoint says that the run continues from."""
    folder = Path(config.run_dir)
    tasks = parse_tasks(config.eval_tasks, key="eval_tasks") if config.eval_every else {}
    exams = load_exams(tasks, config.eval_limit, 1, config, say)  # every rank reads them, before a model is loaded
    tokenizer = load_tokenizer(config)
    if METHODS[config.method].questions:
        corpus = question_corpus(config, say)
    else:
        if ranks.rank == 0:
            build_index(config, tokenizer, folder / "cache", say, sorted(folder.parent.glob("*/cache")))
        dist.barrier()
        corpus = load_corpus(folder / "cache", config)

    if not Path(config.model).expanduser().exists():
        say(f"loading {config.model}; the first time from the hub")
    replica = load_replica(config, ranks)
    if extra := METHODS[config.method].extra:
        add_extra(replica, extra(replica, tokenizer, config))
    from bench.memory import decide_checkpointing, memory_warnings  # arithmetic of a tool, once

    trained = decide_checkpointing(replica.config, config, ranks)
    for line in memory_warnings(replica.config, trained, ranks):
        say(line)
    policy = build_policy(replica, trained, ranks)
    reference = build_reference(replica, config, ranks) if needs_reference(config) else None
    optimizer = make_optimizer(policy, config)
    (frame,) = gather([open_frame(folder / "chat_template.json", tokenizer, say)] if ranks.rank == 0 else [])
    sampler = make_sampler(replica, tokenizer, config, ranks, frame)
    check_prompts(sampler)
    try_sampler(sampler, corpus.train)
    probe = make_probe(corpus, sampler, config)
    probe.exams = exams
    run = Run(config, ranks, corpus, sampler, policy, reference, optimizer, probe)
    say(describe(trained, ranks, sampler, corpus, probe))

    if ranks.rank == 0:
        last = saved["step"] if saved else -1
        waiting = bool(saved and saved["row"])  # its row, and its probe, come again
        if config.steps:  # a dry run deletes nothing
            keep_rows(folder / "samples.jsonl", last)
            keep_rows(folder / "metrics.jsonl", last - waiting)
            keep_rows(folder / "probes.jsonl", last - waiting)
        if not METHODS[config.method].one_task:
            save_prompts(folder / "prompts.txt", sampler, corpus)
    # Set-up leaves a million permanent objects; unless frozen, the sampler's garbage collections scan them every phase
    gc.collect()
    gc.freeze()
    return run


def open_frame(path: Path, tokenizer, say) -> tuple[str, str] | None:
    """The rendered chat template of this run: what an earlier part of it wrote to `path`, else rendered now."""
    template = tokenizer.chat_template
    if not template:
        return None
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if kept.get("template") != template:
        kept = {"template": template, "frame": chat_frame(tokenizer)}
        write_whole(path, json.dumps(kept))
    if re.search("now|date|random", str(template)):
        say(f"warning: chat_template seems to write the date or noise; this run keeps what it wrote first, in {path}")
    return tuple(kept["frame"])


def make_page(folder: Path, say) -> None:
    """Writes report.html. If that fails, it prints a warning and the run still succeeds."""
    try:
        from report.page import write_report  # a tool: only the end of a run needs it

        say(f"to look at: {write_report([folder])}")
    except Exception as error:
        say(f"warning: no report.html ({type(error).__name__}: {error}); python -m report {folder} tries again")


def main() -> None:
    config = parse_command_line(__doc__)
    ranks = start_ranks(config.rank_timeout)
    listen()
    try:
        status = train(config, ranks)
    except ConfigError as error:
        leave_with(error)
    except Exception as error:
        report_error(error)
        os._exit(1)  # at once, as above: sampling or saving threads may wait, too
    close_log()
    dist.destroy_process_group()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # All output is written. Library threads may still run; a normal interpreter exit then aborted 1 of 40 finished runs
    # (SIGABRT)
    os._exit(status)


if __name__ == "__main__":
    main()
