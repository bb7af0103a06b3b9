"""Replica and training state take turns on the GPU, for models of which both do not fit there together.

    rollouts   the replica is on the GPU; float32 masters and Adam's moments wait in host memory
    update     masters are on the GPU, Adam's moments only inside `optimizer.step`; the replica is empty
    refresh    the replica is filled from the masters, parameter by parameter, and each master leaves as it is copied

The largest moments of a GPU are then replica + cache in rollouts, masters + gradients + activations in a backward pass,
masters + gradients + moments in an optimizer step; `python bench.py plan` prints them. Tensors stay the same objects
throughout: only the storage under them is emptied and filled again, so neither FSDP nor the optimizer notices, and
every bit comes back. A step moves 12 bytes a parameter to the host and back, divided by the number of ranks.

Host memory, all ranks of a node together: 12 bytes a parameter; 12 more from the first checkpoint on, which is written
from a copy, and 2 on rank 0 for its export. Qwen3-30B-A3B: 366, 733 and 794 GB. While the model is loaded, every rank
holds it once: 2 bytes a parameter and rank, 489 GB for eight.

With `offload: false` all of this is `refresh` and nothing else. Leaves out the second copy of rlp, entropy_token and a
KL penalty (config.check refuses them), and gradients, which exist only inside the update.
"""

from __future__ import annotations

import mmap
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from config import Config
from model import copy_master, refresh


@dataclass
class Lender:
    """Who shares the GPU, whose turn it is, and where the absent one waits."""

    policy: nn.Module
    optimizer: torch.optim.Optimizer
    replica: nn.Module
    on: bool
    """config.offload. Without it the two functions below only refresh."""
    training: bool = False
    """Whose turn it is: the trainer's, or the sampler's."""
    saving: bool = False
    """Inside `at_hand`: the moments stay where they are."""
    host: dict[str, Tensor] = field(default_factory=dict)
    """Copies of whole storages as bytes, by name; taken once, because pinning gigabytes takes seconds."""


def make_lender(policy: nn.Module, optimizer: torch.optim.Optimizer, replica: nn.Module, config: Config) -> Lender:
    """After set-up, when both are whole; the sampler has the first turn."""
    lender = Lender(policy, optimizer, replica, config.offload)
    if not lender.on:
        return lender
    for parameter in replica.parameters():
        storage = parameter.untyped_storage()
        if not storage.resizable() or storage.nbytes() != parameter.nbytes:  # on a CPU: mapped from a file
            parameter.data = parameter.data.clone()
    optimizer.register_step_pre_hook(lambda *_: _fetch(_moments(lender), lender.host))
    optimizer.register_step_post_hook(lambda *_: None if lender.saving else _park(_moments(lender), lender.host))
    _park(_masters(lender), lender.host)
    return lender


def to_trainer(lender: Lender) -> None:
    """Before the update: the replica's memory goes, and its values with it; the masters come."""
    if not lender.on or lender.training:
        return
    for parameter in lender.replica.parameters():
        parameter.untyped_storage().resize_(0)
    _give_back()
    _fetch(_masters(lender), lender.host)
    lender.training = True


@torch.no_grad()
def to_sampler(lender: Lender) -> None:
    """After the update: the replica equals the masters again. Every rank calls it: all-gathers, as in `refresh`."""
    if not lender.on:
        refresh(lender.policy, lender.replica)
    elif lender.training:
        _park(_moments(lender), lender.host)
        _give_back()
        copies = dict(lender.replica.named_parameters())
        for name, master in lender.policy.named_parameters():
            copy = copies[name]
            copy.untyped_storage().resize_(copy.nbytes)
            copy_master(master, copy)
            _park({f"master {name}": _local(master)}, lender.host)
        _give_back()
        lender.training = False


@contextmanager
def at_hand(lender: Lender):
    """Inside, a checkpoint can read and write masters and moments; afterwards the sampler has its turn.

    Whose turn it was does not matter: a stop inside the update, before its first optimizer step, saves from here too.
    """
    if not lender.on:
        yield
        return
    to_trainer(lender)
    _fetch(_moments(lender), lender.host)
    lender.saving = True  # a checkpoint that is loaded makes an optimizer step up, to learn the form of the moments
    yield
    lender.saving = False
    to_sampler(lender)


def _masters(lender: Lender) -> dict[str, Tensor]:
    return {f"master {name}": _local(parameter) for name, parameter in lender.policy.named_parameters()}


def _moments(lender: Lender) -> dict[str, Tensor]:
    """Adam's, which exist from the first step on; its step counters are single numbers and stay."""
    states = {name: lender.optimizer.state.get(parameter, {}) for name, parameter in lender.policy.named_parameters()}
    return {
        f"{key} {name}": _local(value)
        for name, state in states.items()
        for key, value in state.items()
        if key.startswith("exp_avg")
    }


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard."""
    return tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor.detach()


def _park(tensors: dict[str, Tensor], host: dict[str, Tensor]) -> None:
    """Copy each storage to the host and empty it. One that is empty already waits there."""
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if size := storage.nbytes():
            if name not in host:
                host[name] = _host_bytes(size, tensor.is_cuda)
            host[name].copy_(_bytes(tensor))
            storage.resize_(0)


def _fetch(tensors: dict[str, Tensor], host: dict[str, Tensor]) -> None:
    """The way back. What is not empty is there already."""
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if name in host and not storage.nbytes():
            storage.resize_(host[name].nbytes)
            _bytes(tensor).copy_(host[name])


def _bytes(tensor: Tensor) -> Tensor:
    """The whole storage of a tensor, padding included, as bytes."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _host_bytes(size: int, pinned: bool) -> Tensor:
    """Host memory, for a GPU page-locked in place: torch's own pinned memory comes in powers of two. In pages of its
    own, since a page must not be locked twice."""
    buffer = torch.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=torch.uint8)[:size]
    if pinned:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0))
    return buffer


def _give_back() -> None:
    """To the driver: what comes next has other sizes, and the sampler's cache counts what is free there."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
