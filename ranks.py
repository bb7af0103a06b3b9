"""The processes of a run: start, gather, stop together, and errors that name rank, step and phase.

SIGTERM, SIGINT and SIGHUP are requests to stop. One may reach one rank alone, while another waits inside a collective
or samples for minutes. So a thread of each rank notes the signal, tells the others through the rendezvous store and
looks there once a second. All ranks act on it where they meet: `agree` between phases and micro-batches, `gather` at
the end of a rollout. There `Stopped` is raised on every rank or on none; an optimizer step is never interrupted.
Before the first step (`begin_step`) there is nothing to save, and a signal ends the process at once; so does a second
signal, a second or more after the first. If the store is gone, the launcher was killed: that is a request to stop, too.

Each rank also writes its step and phase to the store, so that an error can say where an unresponsive rank last was.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TOGETHER_SECONDS = 1.0
"""Signals that close after the first are the same one: a scheduler and torchrun may both send it."""


class Stopped(Exception):
    """All ranks have agreed to stop; raised on each of them."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number

    @property
    def status(self) -> int:
        """The exit status that a shell gives a process ended by this signal: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + self.number


@dataclass
class _Here:
    """This process: there is one of it, and its signals are its own."""

    rank: int = 0
    world: int = 1
    store: dist.Store | None = None
    step: int | None = None
    phase: str = "set-up"
    signal: int = 0
    ending: bool = False


_here = _Here()


def join(store: dist.Store, rank: int, world: int) -> None:
    """Called once by model.start_ranks, with a store that nothing else uses."""
    _here.rank, _here.world, _here.store = rank, world, store
    _tell()


def begin_step(step: int) -> None:
    """The ranks begin `step` (from 1; 0 is what comes before it) together, or raise Stopped together."""
    _here.step = step
    agree()


def enter(phase: str) -> None:
    """Note where this rank is, for messages."""
    _here.phase = phase
    _tell()


def place() -> str:
    """`rank 1, step 3, predict`."""
    return f"rank {_here.rank}, {_where()}"


def stop_requested() -> int:
    """The number of the signal that this rank knows of, or 0. Other ranks may not know it yet: see `agree`."""
    return _here.signal


def agree() -> None:
    """Every rank calls it, at points where stopping loses nothing. Raises Stopped on all if one knows of a signal."""
    number = torch.tensor(_here.signal)  # on the CPU, over gloo: the GPU's queue does not wait
    dist.all_reduce(number, dist.ReduceOp.MAX)
    stop_if(int(number))


def stop_if(number: int) -> None:
    """Raises Stopped for a signal's number, which the caller has from all ranks."""
    if number:
        _here.signal = number
        raise Stopped(number)


def listen() -> None:
    """From now on, and until the process ends, signals are noted; to be called from the main thread."""
    wake, woken = socket.socketpair()
    woken.setblocking(False)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    # Python's handlers wait while the main thread sits in a collective. This writes the number at once.
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(wake, woken), name="signals", daemon=True).start()


def _watch(wake: socket.socket, woken: socket.socket) -> None:
    """woken: only to keep it open."""
    first = 0.0
    while True:
        ready, _, _ = select.select([wake], [], [], 1.0)
        number = wake.recv(1)[0] if ready else 0
        if number in SIGNALS:
            if (not _here.step and not _here.ending) or (first and time.monotonic() > first + TOGETHER_SECONDS):
                os._exit(128 + number)
            first = first or time.monotonic()
            _note(number)
        try:
            if number in SIGNALS:
                _here.store.set("stop", str(_here.signal))
            elif not _here.signal and _here.store.check(["stop"]):
                _note(int(_here.store.get("stop")))
        except dist.DistError:
            if not _here.signal and not _here.ending:
                print(f"{place()}: the launcher is gone", file=sys.stderr, flush=True)
                _note(signal.SIGTERM)


def _note(number: int) -> None:
    if not _here.signal and not _here.ending:
        _here.signal = number
        if _here.rank == 0:
            name = signal.Signals(number).name
            print(f"{name}: stopping where all ranks meet next; a second signal ends at once", file=sys.stderr)


def _where() -> str:
    return _here.phase if _here.step is None else f"step {_here.step}, {_here.phase}"


def _tell() -> None:
    if _here.store is not None:
        try:
            _here.store.set(f"place {_here.rank}", _where())
        except dist.DistError:
            pass  # the launcher is gone: _watch says so


def all_said() -> None:
    """A rank has said in one line what is wrong, and leaves: `report` is to add nothing on the others."""
    _here.ending = True
    _here.store.set("all said", "1")


def report(error: BaseException) -> None:
    """Say on stderr which rank failed in which step and phase. Called by the rank that is about to leave with it.

    An error of its own comes with the traceback. Where the error is that another rank does not answer, the first rank
    to report waits a second for the reports of the others, and names those that have sent none with the place where
    they were last seen.
    """
    _here.ending = True
    text = " ".join(str(error).split())
    lost = isinstance(error, dist.DistError) or "/gloo/" in text
    if lost:  # without the line of C++ and the advice
        text = text.split("cc:")[-1].split("] ", 1)[-1].split(". ")[0]
    try:
        if _here.store.check(["all said"]):
            return
        _here.store.set(f"failed {_here.rank}", "1")
        if lost and _here.store.add("failures", 1) == 1:
            time.sleep(1.0)
            silent = [rank for rank in range(_here.world) if not _here.store.check([f"failed {rank}"])]
            last = [f"rank {rank} ({_here.store.get(f'place {rank}').decode()})" for rank in silent]
            text += f"; no word from {', '.join(last)}" if last else ""
    except dist.DistError:
        text += "; the launcher is gone, too"
    if not lost:
        traceback.print_exception(error)
    print(f"{place()}: {'lost contact' if lost else type(error).__name__}: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Ranks:
    """Where this process stands: its rank, how many there are, its device."""

    rank: int
    world: int
    device: torch.device
    per_node: int = 0
    """Ranks on each node; 0: all of them on one."""


def start_ranks(timeout: float = 7200.0) -> Ranks:
    """Join the process group that torchrun describes, or be alone without it. Python objects travel over gloo on the
    CPU, tensors over NCCL on GPUs. timeout: the longest wait for another rank, seconds (config.rank_timeout)."""
    cuda, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    if cuda and local >= torch.cuda.device_count():
        if local == torch.cuda.device_count():  # once, not once per rank
            print(f"nproc_per_node: no GPU for rank {local}, {local} visible; CUDA_VISIBLE_DEVICES= runs on the CPU",
                  file=sys.stderr)  # fmt: skip
        raise SystemExit(2)
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)  # the ranks share the cores; more threads each only get in each other's way
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "WORLD_SIZE" in os.environ:
        store, rank, world = next(dist.rendezvous("env://"))
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    else:
        store, rank, world, per_node = dist.HashStore(), 0, 1, 1
    limit = timedelta(seconds=timeout)
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=world, timeout=limit)
    join(dist.PrefixStore("stopping", store.clone()), rank, world)
    return Ranks(rank, world, device, per_node)


def gather(items: list) -> list:
    """The ranks' lists joined in rank order: the same list on every rank. Also a barrier.

    Raises Stopped on every rank if one of them knows of a signal to stop.
    """
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (stop_requested(), items))
    stop_if(max(number for number, _ in parts))
    return [item for _, part in parts for item in part]
