"""train.py with something going wrong in it: started by test_faults.py, under torchrun.

    torchrun --standalone --nproc_per_node=2 tests/faulty.py '{"do": "kill", "at": "update", "step": 3, "rank": 1}' \
        configs/tiny.yaml [key=value ...]

do: what happens; at: in which function (POINTS); step; rank: on which one, -1 is all. Nothing of this is known to the
product: functions of its modules are wrapped from here. `since` names a file that gets the time when it happened.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter
from transformers.generation.continuous_batching.requests import RequestState

import checkpoint
import grpo
import methods
import model
import ranks as stopping
import train
import train as start
from benchmarks import verify
from report import card

POINTS = {
    # name: (where the function is looked up, its name, the phase that ranks.py must name there, n-th call in it)
    "set-up, tokenizer": (model.AutoTokenizer, "from_pretrained", "set-up", 1),
    "propose": (methods, "rollout", "propose", 1),
    "propose, sampling": (RequestState, "update_and_check_completion", "propose", 20),
    "predict": (methods, "rollout", "predict", 1),
    "predict, sampling": (RequestState, "update_and_check_completion", "predict", 200),
    "reward": (train, "reward", "reward", 1),
    "reward, verifying": (verify, "_read", "reward", 2),
    "update": (train, "update", "update", 1),
    "update, second micro-batch": (grpo, "clipped_loss", "update", 2),
    "update, before the optimizer": (grpo, "_require_finite", "update", 1),
    "update, in the optimizer": (torch.optim.AdamW, "step", "update", 1),
    "refresh": (train, "refresh", "refresh", 1),
    "probe": (train, "run_probe", "probe", 1),
    "probe, sampling": (RequestState, "update_and_check_completion", "probe", 40),
    "log": (train, "append_row", "log", 2),
    "save": (train, "save_checkpoint", "save", 1),
    "save, copying": (checkpoint, "_state", "save", 1),
    # in threads, while the main thread goes on
    "save, shards": (FileSystemWriter, "write_data", "", 1),
    "save, export": (nn.Module, "state_dict", "", 1),
    "save, card": (card, "model_card", "", 1),
    "save, manifest": (checkpoint, "write_whole", "", 1),
    "save, rename": (Path, "rename", "", 1),
    "save, latest": (os, "replace", "", 2),  # after that of the manifest
}


def main() -> None:
    fault = json.loads(sys.argv.pop(1))
    here = fault["rank"] in (-1, int(os.environ.get("RANK", 0)))
    owner, name, phase, call = POINTS[fault["at"]]
    original, calls = getattr(owner, name), 0

    def struck(*words, **keys):
        nonlocal calls
        if here and stopping._here.step == fault["step"] and stopping._here.phase == (phase or stopping._here.phase):
            calls += 1
            if calls == call:
                Path(fault["since"]).write_text(str(time.time()))
                STRIKES[fault["do"]](fault)
        return original(*words, **keys)

    def publish(*words):  # from here on, what rank 0's thread does is the save of this step
        wrap()
        return publish_(*words)

    def wrap():
        setattr(owner, name, struck)

    if fault["at"] in ("save, export", "save, card", "save, manifest", "save, rename", "save, latest"):
        publish_, checkpoint._publish = checkpoint._publish, publish
    else:
        wrap()
    train.main()


def kill(fault):
    os.kill(os.getpid(), signal.SIGKILL)


def signalled(number):
    def strike(fault):
        os.kill(os.getpid(), number)
        time.sleep(0.05)  # the listening thread notes it

    return strike


def fail(fault):
    raise ValueError("out of luck")


def unreadable(fault):
    raise OSError("stale file handle")


def slow(fault):
    time.sleep(600)


def pause(fault):
    time.sleep(5)


def nan_gradient(fault):
    """From the next backward of a layer on. The losses stay finite."""

    def spoil(module, inputs, output):
        (output[0] if isinstance(output, tuple) else output).register_hook(lambda gradient: gradient * float("nan"))

    next(m for m in MODELS[-1].modules() if type(m).__name__.endswith("DecoderLayer")).register_forward_hook(spoil)


def full_disk(fault):
    """No file of this process may grow beyond `bytes` until `for` steps later. The kernel cuts writes short."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], resource.RLIM_INFINITY))
    begin = train.begin_step

    def begin_step(step):
        if step == fault["step"] + fault["for"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        begin(step)

    train.begin_step = begin_step


STRIKES = {
    "kill": kill, "term": signalled(signal.SIGTERM), "int": signalled(signal.SIGINT), "fail": fail, "slow": slow,
    "pause": pause, "unreadable": unreadable, "nan": nan_gradient, "full": full_disk,
}  # fmt: skip
MODELS: list = []

if __name__ == "__main__":
    build = start.build_policy

    def build_policy(*words):
        MODELS.append(build(*words))
        return MODELS[-1]

    start.build_policy = build_policy
    main()
