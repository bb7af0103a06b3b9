"""Checkpoints: exact state to continue a run, and a Hugging Face folder with its model card to use the model.

    checkpoints/step_000100/state/            masters and optimizer, sharded, by torch.distributed.checkpoint
    checkpoints/step_000100/hf/               the replica and its model card: from_pretrained, lm-eval, vLLM load it
    checkpoints/step_000100/extra.safetensors  parameters that a method brings and the exported model does without
    checkpoints/step_000100/checkpoint.json   step, seed, world size, config, and all files with their sizes
    checkpoints/latest                        a link to the newest, for people; a disk without links has none

Data order, learning rate and noise are functions of (seed, step), so the step is all else that a run must remember.
On a CPU with as many ranks a resumed run equals an unbroken one bit for bit. On GPUs flash-attn's backward and the
sampler's scheduling are not repeatable, and another number of ranks draws other noise.

A killed run loses the steps after its newest whole checkpoint and makes them again; train.py drops their rows. After a
signal to stop the last finished step is saved first. Training waits only until everything is copied. Threads write the
copy to step_000100.part and rename it when it is whole. A save that fails is told at once, and the run goes on.
"""

import copy
import json
import os
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict, get_state_dict, set_model_state_dict, set_state_dict,
)  # fmt: skip

from config import Config, ConfigError
from data import fingerprint_of
from metrics import unwritten, write_whole
from model import refresh
from rollout import Sampler

MAY_DIFFER = "steps run_dir resume save_every keep_last probe_every samples_per_step rank_timeout wandb".split()
MAY_DIFFER += "eval_every eval_tasks eval_limit".split()
"""Keys that a resumed run may change: how long, where, how often. `steps` moves a cosine's end, and the run says so."""
ENGINE = (
    "tokens_per_micro_batch gradient_checkpointing offload attention liger use_cuda_graph cache_memory max_requests "
    "max_mismatch verify_seconds"
).split()
"""Keys that another machine may need. Weights, optimizer and passages stay; rounding and samples may not."""

STEPS = "step_" + 6 * "[0-9]"


@dataclass
class Saver:
    """What every save needs, and the one that is being written."""

    policy: nn.Module
    optimizer: object
    sampler: Sampler
    average: nn.Module | None
    """The moving average of `rlp`, the only other copy with a history."""
    group: dist.ProcessGroup
    """Of its own: the threads' collectives must not come between those of training."""
    stager: DefaultStager
    thread: ThreadPoolExecutor
    fingerprints: dict[str, str]
    """Of model and data, by which a resume knows them at another path."""
    done: int = 0
    """Updates that the policy has had; train.py counts them."""
    row: dict | None = None
    """The metrics of step `done` while they lack the probe's: a run that stops there finishes them when it resumes."""
    pending: Future | None = None
    step: int = 0
    """Of the last save that was begun."""
    saved: bool = True
    """Whether the last save that was finished succeeded."""


def make_saver(policy: nn.Module, optimizer, sampler: Sampler, average: nn.Module | None = None) -> Saver:
    """Every rank calls it. Removes what killed saves have left."""
    config = sampler.config
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.rank_timeout))
    stager = DefaultStager(StagingOptions(False, False, False, False))  # a refusal of pinned memory would end the run
    index, known = Path(config.run_dir) / "cache/index.json", {}
    if sampler.ranks.rank == 0:
        for part in _folder(config).glob("*.part"):
            part.unlink() if part.is_symlink() or part.is_file() else shutil.rmtree(part, ignore_errors=True)
        known = {"model": model_fingerprint(config.model)}
        with suppress(OSError, ValueError):  # of questions there is no index
            made = json.loads(index.read_text())
            known["data"] = made.get("data_fingerprint") or made["key"]
    return Saver(policy, optimizer, sampler, average, group, stager, ThreadPoolExecutor(1, "publish"), known)


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
    written = dcp.async_save(_state(saver, trained), **options)
    saver.step, saver.pending = saver.done, written
    if ranks.rank == 0:
        # The next refresh changes the replica in place. Its memo makes deepcopy put copies on the CPU, tied ones tied
        memo = {id(p): nn.Parameter(p.detach().to("cpu", copy=True), p.requires_grad) for p in replica.parameters()}
        facts = {"step": saver.done, "seed": config.seed, "world_size": ranks.world, "config": asdict(config)}
        facts |= {"optimizer": trained, "row": saver.row, "fingerprints": saver.fingerprints}
        rows_wait = unwritten()
        frozen = copy.deepcopy(replica, memo)
        saver.pending = saver.thread.submit(_publish, written, part, frozen, saver.sampler, facts, rows_wait)


def _publish(written: Future, part: Path, frozen, sampler: Sampler, facts: dict, rows_wait: list[Path]) -> None:
    """In a thread of rank 0: wait for the shards of all ranks, add the rest, and give the folder its name."""
    from report.card import write_card  # a tool: only a saved model needs it

    folder, final = part.parent, part.with_suffix("")
    try:
        written.result()
        if rows_wait:  # a run that resumes here would miss them
            raise OSError(f"{rows_wait[0]} could not be written")
        if hasattr(frozen, "extra"):  # a method's own parameters: the exported model does without
            save_file(frozen.extra.state_dict(), part / "extra.safetensors")
            del frozen.extra
        frozen.save_pretrained(part / "hf")
        sampler.tokenizer.save_pretrained(part / "hf")
        write_card(part / "hf", sampler, facts["step"])
        files = sorted(path for path in part.rglob("*") if path.is_file())
        facts["files"] = {str(path.relative_to(part)): path.stat().st_size for path in files}
        write_whole(part / "checkpoint.json", json.dumps(facts))
        rows = [folder.parent / name for name in ("metrics.jsonl", "samples.jsonl")]
        for path in (*files, part / "checkpoint.json", *filter(Path.exists, rows)):
            with path.open("rb") as file:  # on the disk, should the machine itself go down
                os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        _point_latest(final)
        if sampler.config.keep_last:
            # not those of a later step, which a rewound `latest` may have left: the one just saved must stay
            done = sorted(path for path in folder.glob(STEPS) if path.name <= final.name)
            for old in done[: -sampler.config.keep_last]:
                shutil.rmtree(old)
    except (Exception, CheckpointException) as error:
        what = f"WARNING: THE CHECKPOINT OF STEP {facts['step']} WAS NOT SAVED ({_cause(error)})"
        print(f"{what}; the next save tries again", file=sys.stderr, flush=True)
        raise


def _point_latest(final: Path) -> None:
    """Move the link `latest`. A disk that refuses costs the link and a warning: the checkpoint is whole without it."""
    link, beside = final.parent / "latest", final.parent / "latest.part"
    try:
        beside.unlink(missing_ok=True)
        beside.symlink_to(final.name)
        os.replace(beside, link)
    except OSError as error:
        for old in (beside, link):
            if old.is_symlink():  # rather none than one that points to an older step
                with suppress(OSError):
                    old.unlink()
        what = f"WARNING: {link} could not be pointed to {final.name} ({_cause(error)})"
        print(f"{what}; the checkpoint itself is saved", file=sys.stderr, flush=True)


def finish_save(saver: Saver) -> bool:
    """Wait for the save that is being written; every rank calls it. Whether the last save succeeded, on all ranks."""
    if saver.pending is not None:
        failed = False
        try:
            saver.pending.result()
        except (Exception, CheckpointException):  # rank 0 has said which
            failed = True
        parts = [None] * saver.sampler.ranks.world
        dist.all_gather_object(parts, failed)  # not ranks.gather: it may be a signal to stop that wants this save
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


def newest_checkpoint(run: Path, say=print) -> tuple[Path, dict] | None:
    """(folder, its checkpoint.json) of a run's newest whole checkpoint, or None if there is none at all. For one rank.

    A damaged one is told, and passed over for the one before. A link `latest` that a user, or a kill before it moved,
    has left at an older step is obeyed, and told. Raises ConfigError if all are damaged: the run would begin again and
    forget its rows.
    """
    folder = run / "checkpoints"
    steps, link = sorted(folder.glob(STEPS), reverse=True), folder / "latest"
    if link.is_symlink() and link.is_dir():
        newer = [path.name for path in steps if path.name > link.resolve().name]
        if newer:
            what = f"{link} points to {link.resolve().name}: {', '.join(newer)} passed over"
            say(f"{what}; remove the link to use the newest")
        steps = steps[len(newer) :]
    elif link.is_dir():
        say(f"WARNING: {link} is a copied folder, not a link; it is not read, and may be removed")
    for path in steps:
        problem = missing_parts(path)
        if not problem:
            return path, json.loads((path / "checkpoint.json").read_text())
        say(f"WARNING: {path} is damaged ({problem}); going back to the one before")
    if steps:
        raise ConfigError(f"every checkpoint in {folder} is damaged; resume=never starts afresh")
    return None


def exported_model(folder: Path) -> Path | None:
    """The Hugging Face folder of a model folder, a checkpoint or a run (its newest whole checkpoint), or None.

    Raises ConfigError for a `latest` that is a copied folder: nothing says of which step it is a copy.
    """
    for part in (folder, folder.parent):
        if part.name == "latest" and part.parent.name == "checkpoints" and part.is_dir() and not part.is_symlink():
            raise ConfigError(f"{part} is a copied folder, not a link, and may be old: name step_NNNNNN, or the run")
    if (folder / "checkpoints").is_dir():
        newest = newest_checkpoint(folder)
        return newest[0] / "hf" if newest else None
    return next((place for place in (folder, folder / "hf") if (place / "config.json").is_file()), None)


def missing_parts(path: Path) -> str:
    """What of a checkpoint is missing or cut short, by the sizes in its checkpoint.json; empty: nothing."""
    try:
        files = json.loads((path / "checkpoint.json").read_text())["files"].items()
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"checkpoint.json: {type(error).__name__}"
    for name, size in files:
        found = (path / name).stat().st_size if (path / name).is_file() else 0
        if found != size:
            return f"{name} has {found} bytes of {size}"
    return ""


def model_fingerprint(model: str) -> str:
    """What a model is, wherever it lies: a folder by its json files and 64 MiB spread over each safetensors file (all
    of a small one), a hub name by itself."""
    folder = Path(model).expanduser()
    files = sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")])
    return fingerprint_of(files, 64) if files else model


def check_same_run(facts: dict, config: Config, data_key: str = "") -> None:
    """Raises ConfigError, one line, if a key differs that makes it another run: MAY_DIFFER and ENGINE may.

    Model and data are the same, wherever they lie, if their fingerprints are. data_key: that of config.data, if known.
    """
    now, known = asdict(config), facts.get("fingerprints", {})
    whole = asdict(Config()) | facts["config"]  # a key that the code has got since had its default
    kept = {key: value for key, value in whole.items() if key not in (*MAY_DIFFER, *ENGINE)}
    other = {key: old for key, old in kept.items() if key in now and now[key] != old}
    for key, print_ in (("model", model_fingerprint(config.model)), ("data", data_key)):
        if print_ and known.get(key) == print_:
            other.pop(key, None)
        elif print_ and key in known:
            other[key] = f"{whole[key]}, with other content"
    if other:
        told = ", ".join(f"{key}={now[key]!r} (saved: {old!r})" for key, old in other.items())
        raise ConfigError(
            f"{told}: the run in {config.run_dir} cannot be continued with another value; "
            "resume=never starts afresh and moves it aside"
        )


def resume_notes(facts: dict, config: Config, world: int) -> list[str]:
    """Differences from an uninterrupted run, a line each."""
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
    """Masters, and the optimizer after its first update: before, reading its state would run a dummy step."""
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
    refresh(saver.policy, saver.sampler.replica)
    saver.done = saver.step = facts["step"]
    saver.row = facts["row"]


def complete_row(path: Path, facts: dict) -> None:
    """The row that the checkpoint had waiting is complete and on disk. For rank 0."""
    write_whole(path / "checkpoint.json", json.dumps(facts | {"row": None}))
