"""Checkpoints: exact state to continue a run, and a Hugging Face folder to use the model.

    checkpoints/step_000100/state/   masters and optimizer, sharded, by torch.distributed.checkpoint
    checkpoints/step_000100/hf/      the replica: from_pretrained, lm-eval and vLLM load it as it is
    checkpoints/latest               a link to the newest complete one

Data order, learning rate and noise are functions of (seed, step), so the step is all else that a run must remember.
On a CPU with as many ranks a resumed run equals an unbroken one bit for bit; on GPUs flash-attn's backward and the
sampler's scheduling are not repeatable, and with another number of ranks the noise is other noise.
A checkpoint is written beside and renamed when whole; `latest` moves last.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)  # fmt: skip

from config import Config, ConfigError
from evidence import write_whole
from model import Ranks, refresh


def save_checkpoint(
    policy: nn.Module, optimizer, replica, tokenizer, config: Config, ranks: Ranks, step: int, average=None
) -> Path:
    """Save after `step` updates; every rank calls it. Older checkpoints beyond keep_last are deleted afterwards.

    average: the moving average of `rlp`, the only other copy with a history.
    """
    folder = Path(config.run_dir) / "checkpoints"
    final, part = folder / f"step_{step:06d}", folder / f"step_{step:06d}.part"
    if ranks.rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier()
    dcp.save(_state(policy, optimizer, average), checkpoint_id=str(part / "state"))
    if ranks.rank == 0:
        replica.save_pretrained(part / "hf")
        tokenizer.save_pretrained(part / "hf")
        facts = {"step": step, "world_size": ranks.world, "seed": config.seed}
        write_whole(part / "checkpoint.json", json.dumps(facts))
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        link = folder / "latest.part"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        os.replace(link, folder / "latest")
        if config.keep_last:
            # not those of a later step, which a rewound `latest` may have left: the one just saved must stay
            done = sorted(path for path in folder.glob("step_??????") if path.name <= final.name)
            for old in done[: -config.keep_last]:
                shutil.rmtree(old)
    dist.barrier()
    return final


def latest_checkpoint(config: Config) -> Path | None:
    """The newest complete checkpoint of the run, or None."""
    link = Path(config.run_dir) / "checkpoints" / "latest"
    return link.resolve() if (link / "checkpoint.json").exists() else None


def _state(policy: nn.Module, optimizer, average) -> dict:
    model_state, optimizer_state = get_state_dict(policy, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    return state if average is None else state | {"average": get_model_state_dict(average)}


def load_checkpoint(path: Path, policy: nn.Module, optimizer, replica, config: Config, average=None) -> int:
    """Restore masters, optimizer, replica and average; every rank calls it. Returns the number of updates so far.

    Raises ConfigError if the seed is another than that of the run: its data order would be, too.
    """
    facts = json.loads((path / "checkpoint.json").read_text())
    if facts["seed"] != config.seed:
        raise ConfigError(f"seed={config.seed}: {path} was made with seed {facts['seed']}; resume=never starts afresh")
    state = _state(policy, optimizer, average)
    dcp.load(state, checkpoint_id=str(path / "state"))
    set_state_dict(policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    if average is not None:
        set_model_state_dict(average, state["average"])
    refresh(policy, replica)
    return facts["step"]
