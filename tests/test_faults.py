"""Nothing is lost: runs that are killed, stopped or starved of disk, and what the next start makes of them.

`Case` is the table: what goes wrong, where, what the run must say, how it must end. Each is a run of two ranks that
begins at a checkpoint of step 2, in which faulty.py makes something go wrong, and a second start without faults that
must come out equal, bit for bit, to a run in which nothing ever went wrong. The whole table: `make test-faults`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from reference import ROOT
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from metrics import read_rows

WORDS = """configs/tiny.yaml passages_per_step=4 probe_passages=6 probe_samples=1 samples_per_step=2 save_every=2
    probe_every=2 keep_last=3 tokens_per_micro_batch=512 share_prompts=false lr_schedule=cosine warmup_steps=1
    steps=4""".split()
END = 60
"""Seconds in which all processes must have ended after the fault."""


@dataclass
class Case:
    do: str
    at: str
    step: int = 3
    rank: int = 1
    says: str = ""
    """What must be printed, beside the step's and the phase's name."""
    saved: int = 2
    """The step that must be safe afterwards."""
    status: int = 1
    """Of torchrun: 0, or 1 for whatever went wrong."""
    finished: bool = False
    """Whether the run came to its end in spite of all."""
    words: tuple[str, ...] = ()
    once: tuple[str, ...] = ()
    """Words of the run with the fault alone."""
    more: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        place = ", masters on the host" if self.words == OFFLOAD else ""
        return f"{self.do} in {self.at}, step {self.step}, rank {self.rank if self.rank >= 0 else 'all'}{place}"


@dataclass
class Ended:
    status: int
    text: str
    seconds: float
    """From the fault to the end of the last process."""


def launch(words: list, run: Path, fault: dict | None, ranks: int = 2) -> tuple[subprocess.Popen, str, Path]:
    """(torchrun, a word in the environment of all its processes, the file with the time of the fault)."""
    mark, since = f"FAULTS_{uuid.uuid4().hex}", run.parent / "since"
    since.unlink(missing_ok=True)
    script = ["train.py"] if fault is None else ["tests/faulty.py", json.dumps(fault | {"since": str(since)})]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    process = subprocess.Popen(
        [sys.executable, *launcher, *script, *words, f"run_dir={run}"], cwd=ROOT, env=os.environ | {mark: "1"},
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return process, mark, since


def start(words: list, run: Path, fault: dict | None = None, ranks: int = 2, limit: float = 150) -> Ended:
    """One torchrun to its end. Fails if a process of it is left after that, whatever it is."""
    process, mark, since = launch(words, run, fault, ranks)
    try:
        text, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        text = "no end in sight"
    limit = time.time() + 20  # what torchrun has left behind; a verifying child needs a moment to see that it is alone
    while left := processes(mark):
        if time.time() > limit or process.returncode is None:
            for one in left:
                os.kill(one, signal.SIGKILL)
            raise AssertionError(f"{len(left)} processes are left\n{text}")
        time.sleep(0.1)
    return Ended(process.returncode, text, time.time() - float(since.read_text()) if since.exists() else 0.0)


def processes(mark: str) -> list[int]:
    """The ids of all processes that were started with `mark` in their environment, by whomever."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
        except OSError:  # it has ended meanwhile, or is none of ours
            pass
    return found


def rows(run: Path) -> list[dict]:
    clocks = ("tokens_per_second", "peak_memory_gb")
    found = read_rows(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith("time/") and k not in clocks} for row in found]


def state(run: Path, scratch: Path) -> dict:
    """Every tensor of the last checkpoint, by name, and the other values."""
    dcp_to_torch_save(run / "checkpoints/latest/state", scratch)
    found: dict = {}

    def walk(name, value):
        if isinstance(value, dict):
            for key, one in value.items():
                walk(f"{name}.{key}", one)
        elif isinstance(value, list):
            for number, one in enumerate(value):
                walk(f"{name}.{number}", one)
        else:
            found[name] = value

    walk("", torch.load(scratch, weights_only=False))
    return found


def assert_equal_runs(run: Path, other: Path) -> None:
    assert rows(run) == rows(other)
    for name in ("samples.jsonl", "probes.jsonl"):
        assert read_rows(run / name) == read_rows(other / name), name
    first, second = (folder / "checkpoints/latest" for folder in (run, other))
    assert first.resolve().name == second.resolve().name
    assert (first / "hf/model.safetensors").read_bytes() == (second / "hf/model.safetensors").read_bytes()
    states = state(run, run.parent / "one.pt"), state(other, run.parent / "two.pt")
    assert states[0].keys() == states[1].keys() and len(states[0]) > 30  # masters; moments, if there was an update
    for name, value in states[0].items():
        same = torch.equal(value, states[1][name]) if isinstance(value, torch.Tensor) else value == states[1][name]
        assert same, name


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict[tuple, tuple[Path, Path]]:
    """config words -> (a run of four steps, the same as it was after two); made when first asked for."""
    return {}


def make_unbroken(unbroken: dict, words: tuple[str, ...], tmp_path_factory) -> tuple[Path, Path]:
    if words not in unbroken:
        base = tmp_path_factory.mktemp("unbroken")
        ended = start([*WORDS, *words], base / "run")
        assert ended.status == 0, ended.text
        half = base / "half"
        shutil.copytree(base / "run", half, symlinks=True)
        shutil.rmtree(half / "checkpoints/step_000004")
        (half / "checkpoints/latest").unlink()
        (half / "checkpoints/latest").symlink_to("step_000002")
        unbroken[words] = base / "run", half
    return unbroken[words]


@pytest.fixture
def half_run(unbroken, tmp_path, tmp_path_factory) -> Path:
    """A copy of the run as it was after two steps."""
    return shutil.copytree(make_unbroken(unbroken, (), tmp_path_factory)[1], tmp_path / "run", symlinks=True)


def saved_step(run: Path) -> int:
    return int((run / "checkpoints/latest").resolve().name.removeprefix("step_"))


def check(case: Case, unbroken: dict, tmp_path: Path, factory) -> None:
    whole, half = make_unbroken(unbroken, case.words, factory)
    run, words = tmp_path / "run", [*WORDS, *case.words]
    shutil.copytree(half, run, symlinks=True)
    fault = {"do": case.do, "at": case.at, "step": case.step, "rank": case.rank, **case.more}
    ended = start([*words, *case.once], run, fault)
    assert "resuming after step 2" in ended.text, ended.text
    assert ended.seconds > 0, f"it did not happen\n{ended.text}"
    assert ended.status == case.status and ended.seconds < END, ended.text
    assert case.says in ended.text, ended.text
    assert saved_step(run) == case.saved, ended.text
    again = start(words, run)
    assert again.status == 0, again.text
    assert ("this run is finished" if case.finished else f"resuming after step {case.saved} ") in again.text, again.text
    assert not list((run / "checkpoints").glob("*.part"))
    assert_equal_runs(run, whole)


# ---- the table
def lost(at: str, step: int = 3, rank: int = 1, **more) -> Case:
    """A rank is killed: another says who is silent and where it was. In threads, the phase is whatever it is."""
    says = f"step {step}, " if "save, " in at else f"step {step}, {at.partition(',')[0]}"
    return Case("kill", at, step, rank, says if rank < 0 else f"no word from rank {rank} ({says}", **more)


def stopped(do: str, at: str, step: int, rank: int, saved: int, **more) -> Case:
    return Case(do, at, step, rank, f"run: saved after step {saved}", saved, **more)


# masked articles, which the base answers by a word in a box, against golds that only the child process can compare
RLVR = ("method=rlvr", "data=tests/algebra.jsonl", "data_config=", "passages_per_step=16", "heldout=0.2",
        r'question_prompt=" {passage}\nPredict:"')  # fmt: skip
OFFLOAD = ("offload=true",)
PROPOSE, PREDICT, PROBE = "propose, sampling", "predict, sampling", "probe, sampling"
SECOND, BEFORE, INSIDE = "update, second micro-batch", "update, before the optimizer", "update, in the optimizer"
KILLED = [
    *(lost(at) for at in ("propose", PROPOSE, "predict", PREDICT, "reward", "update", SECOND, BEFORE, INSIDE)),
    *(lost(at, rank=0) for at in (PREDICT, "reward", INSIDE, "refresh")),
    lost("refresh"),
    *(lost(at, 4) for at in ("probe", PROBE, "save", "save, copying", "save, shards")),
    *(lost(at, 4, 0) for at in (PROBE, "log", "save", "save, shards", "save, export", "save, card", "save, manifest",
                                "save, rename", "save, latest")),
    # all at once: nobody is left to say anything
    *(Case("kill", at, 3, -1) for at in ("propose", PREDICT, "reward", SECOND, INSIDE, "refresh")),
    *(Case("kill", at, 4, -1) for at in (PROBE, "save, shards")),
    lost("reward, verifying", words=RLVR),
    *(lost(at, words=OFFLOAD) for at in (INSIDE, "refresh")),
]  # fmt: skip
STOPPED = [
    # the step that was going on is given up, and the one before is saved ...
    *(stopped("term", at, 4, 1, 3) for at in ("propose", PROPOSE, "predict", PREDICT, "reward", "update", SECOND)),
    stopped("int", PREDICT, 4, 0, 3),
    stopped("term", PREDICT, 4, -1, 3),
    stopped("term", "propose", 3, 1, 2),
    stopped("term", "reward, verifying", 3, 1, 2, words=RLVR),
    # ... unless the weights have begun to change
    *(stopped("term", at, 3, 1, 3) for at in (BEFORE, INSIDE, "refresh")),
    stopped("int", INSIDE, 3, 0, 3),
    # with the masters on the host
    *(stopped("term", at, step, 1, 3, words=OFFLOAD) for at, step in ((SECOND, 4), (INSIDE, 3), ("refresh", 3))),
    # with the last row still without its probe, which the next start adds
    *(stopped("term", at, 4, rank, 4) for at, rank in (("probe", 1), (PROBE, 1), (PROBE, 0))),
    # too late to be obeyed
    Case("term", "save", 4, 1, "done in", 4, 0, finished=True),
    Case("term", "save, shards", 4, 0, "done in", 4, 0, finished=True),
]
FAILED = [
    *(Case("fail", at, step, 1, f"rank 1, step {step}, {at}: ValueError: out of luck")
      for at, step in (("propose", 3), ("predict", 3), ("reward", 3), ("update", 3), ("refresh", 3), ("probe", 4),
                       ("save", 4))),
    *(Case("fail", f"{phase}, sampling", step, 1, f"rank 1, step {step}, {phase}: RuntimeError: rank 1: a generation "
           "request failed: out of luck") for phase, step in (("propose", 3), ("predict", 3), ("probe", 4))),
    Case("fail", "save, shards", 4, 1, "THE CHECKPOINT OF STEP 4 WAS NOT SAVED (rank 1: ValueError: out of luck)"),
    Case("fail", "save, manifest", 4, 0, "THE CHECKPOINT OF STEP 4 WAS NOT SAVED (ValueError: out of luck)"),
    Case("fail", "save, card", 4, 0, "no model card in the checkpoint of step 4 (ValueError: out of luck)", 4, 0, True),
    Case("nan", "update", 3, 1, "step 3, update 1: gradient not finite on rank [1], though every loss is"),
    *(Case("slow", at, 3, 1, f"no word from rank 1 (step 3, {at.partition(',')[0]})", once=("rank_timeout=5",))
      for at in ("predict", SECOND, "refresh")),
    # a disk that is full for one step: all is written in the end; to the end: the run says so, and nothing is lost
    # (1 MB: the shards fit, hf/ does not)
    Case("full", "update", 3, 0, "metrics.jsonl CANNOT BE WRITTEN", 4, 0, True, more={"bytes": 1000, "for": 1}),
    Case("full", "update", 3, 0, "THE CHECKPOINT OF STEP 4 WAS NOT SAVED (rank 0: ", more={"bytes": 1000, "for": 9}),
    Case("full", "update", 3, 0, "NOT ALL IS SAVED", more={"bytes": 1_000_000, "for": 9}),
    Case("full", "update", 3, 1, "THE CHECKPOINT OF STEP 4 WAS NOT SAVED (rank 1: ", more={"bytes": 1000, "for": 9}),
]  # fmt: skip
QUICK = [KILLED[8]]
"""In every `make test`."""
REST = [case for case in FAILED + STOPPED + KILLED if case not in QUICK]


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_nothing_is_lost(case, unbroken, tmp_path, tmp_path_factory):
    check(case, unbroken, tmp_path, tmp_path_factory)


@pytest.mark.faults
@pytest.mark.parametrize("case", REST, ids=lambda case: case.name)
def test_nothing_is_lost_whatever_happens(case, unbroken, tmp_path, tmp_path_factory):
    check(case, unbroken, tmp_path, tmp_path_factory)


# ---- the launcher
@pytest.mark.faults
def test_what_one_rank_alone_refuses_is_said_by_that_rank(tmp_path):
    """Usually all ranks refuse the same, and rank 0 says it for all. Rank 0 waits for this one in a barrier."""
    fault = {"do": "unreadable", "at": "set-up, tokenizer", "step": None, "rank": 1}
    ended = start(WORDS, tmp_path / "run", fault)
    assert ended.status == 1 and ended.seconds < END
    said = "config error: model='assets/tiny_base': no usable tokenizer (OSError: stale file handle) (rank 1)"
    assert said in ended.text and "Traceback" not in ended.text.split("config error")[0], ended.text


def interrupted(run: Path, words: list, fault: dict, act) -> Ended:
    """A run of which `act(launcher, ids of its ranks)` is done half a second after the fault has struck."""
    launcher, mark, since = launch(words, run, fault)
    limit = time.time() + 150
    while not since.exists():
        assert launcher.poll() is None and time.time() < limit
        time.sleep(0.1)
    time.sleep(0.5)
    begin = time.time()
    act(launcher, [one for one in processes(mark) if one != launcher.pid])
    while processes(mark):  # the launcher is one of them until it is waited for
        if launcher.poll() is not None and time.time() > begin + END:
            break
        time.sleep(0.1)
    seconds, left = time.time() - begin, processes(mark)
    for one in left:
        os.kill(one, signal.SIGKILL)
    text, _ = launcher.communicate(timeout=20)
    assert not left, text
    return Ended(launcher.returncode, text, seconds)


@pytest.mark.faults
@pytest.mark.parametrize(("number", "says"), [
    (signal.SIGTERM, "stopped by SIGTERM"), (signal.SIGINT, "stopped by SIGINT"),
    (signal.SIGKILL, "the launcher is gone"),
])  # fmt: skip
def test_a_signal_to_torchrun_saves_the_last_finished_step(number, says, half_run, unbroken):
    """A pause keeps the step from ending before the signal comes."""
    fault = {"do": "pause", "at": "predict", "step": 4, "rank": -1}
    ended = interrupted(half_run, WORDS, fault, lambda launcher, _: launcher.send_signal(number))
    assert says in ended.text and saved_step(half_run) == 3 and ended.seconds < END, ended.text
    assert start(WORDS, half_run).status == 0
    assert_equal_runs(half_run, unbroken[()][0])


@pytest.mark.faults
def test_a_second_signal_ends_at_once(half_run):
    """Both ranks sleep and would never meet again."""
    run = half_run

    def twice(launcher, ranks):
        for pause in (1.5, 0):
            for one in ranks:
                os.kill(one, signal.SIGTERM)
            time.sleep(pause)

    ended = interrupted(run, WORDS, {"do": "slow", "at": "predict", "step": 4, "rank": -1}, twice)
    assert "exitcode  : 143" in ended.text and saved_step(run) == 2 and ended.seconds < 10, ended.text


# ---- other ranks, other steps
@pytest.mark.faults
def test_another_number_of_ranks_continues_with_the_same_state_and_passages(half_run, unbroken):
    run, whole = half_run, unbroken[()][0]
    ended = start([*WORDS, "save_every=1"], run, ranks=1)
    assert ended.status == 0 and "saved by 2 ranks, resumed by 1: the same weights" in ended.text, ended.text
    assert [row["step"] for row in rows(run)] == [0, 1, 2, 3, 4] and rows(run)[:3] == rows(whole)[:3]
    passages = [[(one["step"], one["passage"]["id"]) for one in read_rows(folder / "samples.jsonl")]
                for folder in (run, whole)]  # fmt: skip
    assert passages[0] == passages[1]


@pytest.mark.faults
def test_a_finished_run_says_so_and_a_longer_one_goes_on(unbroken, tmp_path, tmp_path_factory):
    whole, _ = make_unbroken(unbroken, (), tmp_path_factory)
    run = tmp_path / "run"
    shutil.copytree(whole, run, symlinks=True)
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    ended = start(WORDS, run)
    assert ended.status == 0 and "this run is finished" in ended.text, ended.text
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    ended = start([*WORDS, "steps=5"], run)
    assert ended.status == 0 and "steps=5 (was 4): from here on the cosine" in ended.text, ended.text
    assert [row["step"] for row in rows(run)] == [0, 1, 2, 3, 4, 5]
