"""Checkpoints: exact state to continue a run, and a Hugging Face folder to use the model.

    checkpoints/step_000100/state/            masters and optimizer, sharded, by torch.distributed.checkpoint
    checkpoints/step_000100/hf/               the replica and its model card: from_pretrained, lm-eval, vLLM load it
    checkpoints/step_000100/checkpoint.json   step, seed, world size, config, and all files with their sizes
    checkpoints/latest                        a link to the newest complete one

Data order, learning rate and noise are functions of (seed, step), so the step is all else that a run must remember.
On a CPU with as many ranks a resumed run equals an unbroken one bit for bit; on GPUs flash-attn's backward and the
sampler's scheduling are not repeatable, and with another number of ranks the noise is other noise.

A run that is killed loses the steps after its newest complete checkpoint (one that was being written does not count)
and makes them again; their rows in metrics.jsonl and samples.jsonl are dropped at the resume (start.py). After a signal
to stop the last finished step is saved first.

Training waits only until everything is copied; threads write the copy, beside its place, and rename it when it is
whole; `latest` moves last. A save that fails is told at once, and the run goes on: the next may succeed. Leaves out
when to save, and what to do about a signal (train.py).
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)  # fmt: skip

from card import write_card
from config import Config, ConfigError
from evidence import unwritten, write_whole
from offload import Lender, at_hand, make_lender, to_sampler
from sampler import Sampler

MAY_DIFFER = "steps run_dir resume save_every keep_last probe_every samples_per_step rank_timeout".split()
"""Keys that a resumed run may change: how long, where, how often. `steps` moves a cosine's end, and the run says so."""
ENGINE = (
    "tokens_per_micro_batch gradient_checkpointing offload attention liger use_cuda_graph cache_memory max_requests"
).split()
"""Keys that another machine may need. Weights, optimizer and passages stay; rounding and samples may not."""


@dataclass
class Saver:
    """What every save needs, and the one that is being written."""

    policy: nn.Module
    optimizer: object
    sampler: Sampler
    average: nn.Module | None
    """The moving average of `rlp`, the only other copy with a history."""
    lender: Lender
    """Brings masters and moments to the GPU, should they be elsewhere."""
    group: dist.ProcessGroup
    """Of its own: the threads' collectives must not come between those of training."""
    stager: DefaultStager
    thread: ThreadPoolExecutor
    done: int = 0
    """Updates that the policy has had; train.py counts them."""
    row: dict | None = None
    """The metrics of step `done` while they lack the probe's: a run that stops there finishes them when it resumes."""
    pending: Future | None = None
    step: int = 0
    """Of the last save that was begun."""
    saved: bool = True
    """Whether the last save that was finished succeeded."""


def make_saver(
    policy: nn.Module, optimizer, sampler: Sampler, average: nn.Module | None = None, lender: Lender | None = None
) -> Saver:  # fmt: skip
    """Every rank calls it. Removes what killed saves have left."""
    lender = lender or make_lender(policy, optimizer, sampler.replica, sampler.config)
    config, cuda = sampler.config, sampler.ranks.device.type == "cuda"
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.rank_timeout))
    stager = DefaultStager(StagingOptions(cuda, False, False, cuda))  # pinned memory and its faster copies on a GPU
    for part in _folder(config).glob("*.part") if sampler.ranks.rank == 0 else ():
        part.unlink() if part.is_symlink() else shutil.rmtree(part)
    return Saver(policy, optimizer, sampler, average, lender, group, stager, ThreadPoolExecutor(1, "publish"))


def save_checkpoint(saver: Saver) -> None:
    """Copy the state after saver.done updates and begin to write it; every rank calls it. Waits for the save before."""
    finish_save(saver)
    config, ranks, replica = saver.sampler.config, saver.sampler.ranks, saver.sampler.replica
    part = _folder(config) / f"step_{saver.done:06d}.part"
    saver.optimizer.zero_grad(set_to_none=True)  # a step that was abandoned may have left some
    trained = bool(saver.optimizer.state)
    # What is staged is on the CPU. By default DCP would copy ahead on a GPU: on GPU 0, from a thread of every rank
    writer = dcp.FileSystemWriter(part / "state", per_thread_copy_ahead=0)
    options = {"storage_writer": writer, "process_group": saver.group, "async_stager": saver.stager}
    with at_hand(saver.lender):  # afterwards the replica is whole, too
        written = dcp.async_save(_state(saver, trained), **options)
    saver.step, saver.pending = saver.done, written
    if ranks.rank == 0:
        # The next refresh changes the replica in place. Its memo makes deepcopy put copies on the CPU, tied ones tied
        memo = {id(p): nn.Parameter(p.detach().to("cpu", copy=True), p.requires_grad) for p in replica.parameters()}
        facts = {"step": saver.done, "seed": config.seed, "world_size": ranks.world, "config": asdict(config)}
        facts |= {"optimizer": trained, "row": saver.row}
        rows_wait = unwritten()
        frozen = copy.deepcopy(replica, memo)
        saver.pending = saver.thread.submit(_publish, written, part, frozen, saver.sampler, facts, rows_wait)


def _publish(written: Future, part: Path, frozen, sampler: Sampler, facts: dict, rows_wait: list[Path]) -> None:
    """In a thread of rank 0: wait for the shards of all ranks, add the rest, and give the folder its name."""
    folder, final = part.parent, part.with_suffix("")
    try:
        written.result()
        if rows_wait:  # a run that resumes here would miss them
            raise OSError(f"{rows_wait[0]} could not be written")
        frozen.save_pretrained(part / "hf")
        sampler.tokenizer.save_pretrained(part / "hf")
        _describe(part / "hf", sampler, facts["step"])
        files = sorted(path for path in part.rglob("*") if path.is_file())
        facts["files"] = {str(path.relative_to(part)): path.stat().st_size for path in files}
        write_whole(part / "checkpoint.json", json.dumps(facts))
        rows = [folder.parent / name for name in ("metrics.jsonl", "samples.jsonl")]
        for path in (*files, part / "checkpoint.json", *filter(Path.exists, rows)):
            with path.open("rb") as file:  # on the disk, should the machine itself go down
                os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        link = folder / "latest.part"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        os.replace(link, folder / "latest")
        if sampler.config.keep_last:
            # not those of a later step, which a rewound `latest` may have left: the one just saved must stay
            done = sorted(path for path in folder.glob("step_??????") if path.name <= final.name)
            for old in done[: -sampler.config.keep_last]:
                shutil.rmtree(old)
    except (Exception, CheckpointException) as error:
        what = f"WARNING: THE CHECKPOINT OF STEP {facts['step']} WAS NOT SAVED ({_cause(error)})"
        print(f"{what}; the next save tries again", file=sys.stderr, flush=True)
        raise


def _describe(folder: Path, sampler: Sampler, step: int) -> None:
    """Add the model card. Whatever goes wrong in it, the checkpoint is not lost for it."""
    try:
        write_card(folder, sampler, step)
    except Exception as error:
        print(f"WARNING: no model card in the checkpoint of step {step} ({_cause(error)})", file=sys.stderr, flush=True)
        for half in folder.glob("*.part"):
            half.unlink()


def finish_save(saver: Saver) -> bool:
    """Wait for the save that is being written; every rank calls it. Whether the last save succeeded, on all ranks."""
    if saver.pending is not None:
        failed = False
        try:
            saver.pending.result()
        except (Exception, CheckpointException):  # rank 0 has said which
            failed = True
        parts = [None] * saver.sampler.ranks.world
        dist.all_gather_object(parts, failed)  # not model.gather: it may be a signal to stop that wants this save
        saver.pending, saver.saved = None, not any(parts)
        if not saver.saved and saver.sampler.ranks.rank == 0:
            shutil.rmtree(_folder(saver.sampler.config) / f"step_{saver.step:06d}.part", ignore_errors=True)
    return saver.saved


def _cause(error: BaseException) -> str:
    """The failures of all ranks in one line."""
    if not isinstance(error, CheckpointException):
        return " ".join(f"{type(error).__name__}: {error}".split())
    return "; ".join(f"rank {rank}: {_cause(one)}" for rank, (one, _) in sorted(error.failures.items()))


def _folder(config: Config) -> Path:
    return Path(config.run_dir) / "checkpoints"


def find_checkpoint(config: Config, say=print) -> tuple[Path, dict] | None:
    """(folder, what its checkpoint.json says) of the newest whole checkpoint up to `latest`, or None. For one rank.

    A damaged one is told, and passed over for the one before. Raises ConfigError if there are only damaged ones: the
    run would begin again and forget its rows.
    """
    folder, found = _folder(config), []
    if config.resume == "auto":
        found = sorted(folder.glob("step_??????"), reverse=True)
    if (folder / "latest").is_symlink():  # where a user, or a kill before it could move, has left it
        found = [path for path in found if path.name <= os.readlink(folder / "latest")]
    for path in found:
        problem = damage(path)
        if not problem:
            return path, json.loads((path / "checkpoint.json").read_text())
        say(f"WARNING: {path} is damaged ({problem}); going back to the one before")
    if found:
        raise ConfigError(f"resume='auto': every checkpoint in {folder} is damaged; resume=never starts afresh")
    return None


def damage(path: Path) -> str:
    """What of a checkpoint is missing or cut short, by the sizes in its checkpoint.json; empty: nothing."""
    try:
        files = json.loads((path / "checkpoint.json").read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"checkpoint.json: {type(error).__name__}"
    for name, size in files.items():
        found = (path / name).stat().st_size if (path / name).is_file() else 0
        if found != size:
            return f"{name} has {found} bytes of {size}"
    return ""


def check_same_run(facts: dict, config: Config) -> None:
    """Raises ConfigError, one line, if a key differs that makes it another run: MAY_DIFFER and ENGINE may."""
    now = asdict(config)
    kept = {key: value for key, value in facts["config"].items() if key not in (*MAY_DIFFER, *ENGINE)}
    other = [f"{key}={now[key]!r} (saved: {old!r})" for key, old in kept.items() if key in now and now[key] != old]
    if other:
        raise ConfigError(
            f"{', '.join(other)}: the run in {config.run_dir} cannot be continued with another value; "
            "resume=never starts afresh and moves it aside"
        )


def resume_notes(facts: dict, config: Config, world: int) -> list[str]:
    """What an unbroken run would have had otherwise, a line each."""
    saved, notes = facts["config"], []
    if facts["world_size"] != world:
        notes.append(
            f"saved by {facts['world_size']} ranks, resumed by {world}: the same weights, optimizer and passages, "
            "other samples, since noise is drawn per rank"
        )
    changed = [f"{key}={getattr(config, key)!r} (was {saved[key]!r})" for key in ENGINE
               if key in saved and saved[key] != getattr(config, key)]  # fmt: skip
    if changed:
        notes.append(f"{', '.join(changed)}: the same run up to rounding and what that changes in the samples")
    if saved["steps"] != config.steps and config.lr_schedule == "cosine":
        notes.append(
            f"steps={config.steps} (was {saved['steps']}): from here on the cosine ends at the new last step, "
            "so the learning rate is not that of either run from its start"
        )
    return notes


def _state(saver: Saver, trained: bool) -> dict:
    """Masters, and the optimizer unless no update was made yet: asked for its state, it would make a step up."""
    if trained:
        model, optimizer = get_state_dict(saver.policy, saver.optimizer)
        state = {"model": model, "optimizer": optimizer}
    else:
        state = {"model": get_model_state_dict(saver.policy)}
    return state if saver.average is None else state | {"average": get_model_state_dict(saver.average)}


def load_checkpoint(saver: Saver, path: Path, facts: dict) -> None:
    """Restore masters, optimizer, average and replica; every rank calls it. There may be more or fewer than saved it.

    Raises RuntimeError if a file has the right size and the wrong content.
    """
    with at_hand(saver.lender):
        state = _state(saver, facts["optimizer"])
        try:
            dcp.load(state, checkpoint_id=str(path / "state"), process_group=saver.group)
        except CheckpointException as error:  # no Exception, and a traceback per rank
            raise RuntimeError(f"{path} cannot be loaded: {_cause(error)}") from None
        set_model_state_dict(saver.policy, state["model"])
        if facts["optimizer"]:
            set_state_dict(
                saver.policy, saver.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
            )
        if saver.average is not None:
            set_model_state_dict(saver.average, state["average"])
    to_sampler(saver.lender)
    saver.done = saver.step = facts["step"]
    saver.row = facts["row"]


def settle(path: Path, facts: dict) -> None:
    """The row that the checkpoint had waiting is complete and on disk. For rank 0."""
    write_whole(path / "checkpoint.json", json.dumps(facts | {"row": None}))
