"""The processes of a run: start, gather, stop together, and errors that name rank, step and phase.

A signal sets a flag. `stop_if_signalled` between phases and micro-batches and `gather` after a rollout take the maximum
of all ranks' flags, and raise `Stopped` on every rank or on none. torchrun hands signals on to its ranks. The rest is
for what these three cannot do. A thread reads signals, because Python's handlers wait while a collective blocks, and a
second signal, or one before step 1, must end a rank at once. A second of grace: a scheduler and torchrun may both send
the first signal. It polls the parent process: a killed launcher sends no signal, and its ranks would run forever. Each
rank stores its step and phase, because a dead or hung rank cannot report where it was.
"""

import os
import select
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from config import ConfigError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(Exception):
    """All ranks have agreed to stop; raised on each of them."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number
        """What a shell gives a process that this signal ended: 143 for SIGTERM, 130 for SIGINT."""


@dataclass
class _Here:  # this process
    rank: int = 0
    world: int = 1
    store: dist.Store | None = None
    step: int | None = None
    phase: str = "set-up"
    signal: int = 0
    ending: bool = False

    def __str__(self) -> str:
        return self.phase if self.step is None else f"step {self.step}, {self.phase}"


_here = _Here()


def begin_step(step: int) -> None:
    """The ranks begin `step` (from 1; 0 is what comes before it) together, or raise Stopped together."""
    _here.step = step
    stop_if_signalled()


def enter(phase: str) -> None:
    """Note where this rank is, for messages."""
    _here.phase = phase
    try:
        if _here.store is not None:
            _here.store.set(f"place {_here.rank}", str(_here))
    except dist.DistError:
        pass  # the launcher is gone: _listen says so


def stop_requested() -> int:
    """The number of the signal that this rank knows of, or 0. Others may not know it yet: see `stop_if_signalled`."""
    return _here.signal


def stop_if_signalled() -> None:
    """Every rank calls it, at points where stopping loses nothing. Raises Stopped on all if one knows of a signal."""
    number = torch.tensor(_here.signal)  # on the CPU, over gloo: the GPU's queue does not wait
    dist.all_reduce(number, dist.ReduceOp.MAX)
    if number:
        raise Stopped(int(number))


def listen() -> None:
    """From now on, and until the process ends, signals are noted; to be called from the main thread."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)  # C code writes the number there at once
    threading.Thread(target=_listen, args=(read,), name="signals", daemon=True).start()


def _listen(read: int) -> None:
    launcher, first = os.getppid() if "WORLD_SIZE" in os.environ else 0, 0.0
    while True:
        ready, _, _ = select.select([read], [], [], 1.0)
        number = os.read(read, 1)[0] if ready else 0
        if number in SIGNALS:
            if (not _here.step and not _here.ending) or (first and time.monotonic() > first + 1.0):
                os._exit(128 + number)
            first = first or time.monotonic()
        elif launcher and os.getppid() != launcher and not _here.signal and not _here.ending:
            print(f"rank {_here.rank}, {_here}: the launcher is gone", file=sys.stderr, flush=True)
            number = signal.SIGTERM
        if number in SIGNALS and not _here.signal and not _here.ending:
            _here.signal = int(number)
            if _here.rank == 0:
                name = signal.Signals(number).name
                print(f"{name}: stopping where all ranks meet next; a second signal ends at once", file=sys.stderr)


def leave_with(error: ConfigError) -> None:
    """Ends this rank with status 2 after one line on stderr: `report_error` is to add nothing on the others, which may
    wait in a collective. torchrun ends them."""
    _here.ending = True
    if _here.rank:
        time.sleep(5)  # rank 0 says it, once; but it may be this rank's alone
    rank = f" (rank {_here.rank})" if _here.rank else ""
    print(f"{error.kind} error: {error}{rank}", file=sys.stderr, flush=True)
    _here.store.set("all said", "1")
    os._exit(2)


def report_error(error: BaseException) -> None:
    """Say on stderr which rank failed in which step and phase. Called by the rank that is about to leave with it.

    An error of its own comes with the traceback. Where another rank does not answer, the first rank to report waits a
    second for the others' reports, and names the silent ranks with the place where they were last seen.
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
    kind = "lost contact" if lost else type(error).__name__
    print(f"rank {_here.rank}, {_here}: {kind}: {text}", file=sys.stderr, flush=True)


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
    if cuda and local >= (visible := torch.cuda.device_count()):
        if local == visible:  # once, not once per rank
            what = f"nproc_per_node: no GPU for rank {local}, {visible} visible"
            print(f"{what}; CUDA_VISIBLE_DEVICES= runs on the CPU", file=sys.stderr)
        raise SystemExit(2)
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))  # the ranks share the cores
    backend, per_node = "cpu:gloo,cuda:nccl" if cuda else "gloo", int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    store, rank, world = dist.HashStore(), 0, 1
    if "WORLD_SIZE" in os.environ:
        store, rank, world = next(dist.rendezvous("env://"))
    limit = timedelta(seconds=timeout)
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=world, timeout=limit)
    _here.rank, _here.world, _here.store = rank, world, dist.PrefixStore("stopping", store.clone())
    enter("set-up")
    return Ranks(rank, world, device, per_node)


def gather(items: list) -> list:
    """The ranks' lists in rank order, the same on every rank. Also a barrier; raises as `stop_if_signalled` does."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (_here.signal, items))
    if number := max(number for number, _ in parts):
        raise Stopped(number)
    return [item for _, part in parts for item in part]
