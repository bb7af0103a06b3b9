"""The paper in miniature: make the runs behind the claims, and show what came of them.

    python -m miniature run [CLAIM ...]     make the runs that miniature/runs.jsonl lacks, and say which claims hold
    python -m miniature again CLAIM         make a claim's first two seeds anew and compare with what is recorded;
                                            then test it on two seeds that were never used
    python -m miniature keep NAME=RUN ...   a line of miniature/real.jsonl for a finished run on real text (real.py)
    python -m miniature figures             the marked blocks of docs/ and assets/figures/, from the record alone
    python -m miniature base                rebuild the mini-wiki and the tiny base (base.py), 5 to 7 minutes
    python -m miniature ladder              rebuild the ladder's articles and base (ladder.py), minutes

A run is made by train.py on two ranks without a GPU. It is one line of the record: its arm, probes, means over five
steps, totals. `run` goes on where it was stopped.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

import yaml

from metrics import append_row, read_rows
from miniature.base import make_tiny
from miniature.claims import ARMS, CLAIMS, CURVES, KEYS, SEEDS, STARTS_FROM, TOTALS, Results
from miniature.ladder import make_ladder_base
from miniature.real import REAL_RECORD
from miniature.tables import PROJECT, RECORD, load_results, write_pages
from miniature.worlds import make_questions, make_several

FRESH_SEEDS = (20, 21)
RUNS = PROJECT / "runs" / "experiments"
COMMON_KEYS = ["share_prompts=true", "probe_every=20", "samples_per_step=0", "resume=never"]


def run_missing(names: list[str], seeds: Iterable[int], record: Path) -> None:
    """Make the runs of these claims. Seeds outside, arms inside: whoever stops early has whole seeds."""
    RUNS.mkdir(parents=True, exist_ok=True)
    (RUNS / "several.jsonl").write_text(make_several(), encoding="utf-8")
    (RUNS / "questions.jsonl").write_text(make_questions(), encoding="utf-8")
    done = {(row["arm"], row["seed"]) for row in read_rows(record) if row["words"] == ARMS.get(row["arm"])}
    for seed in seeds:
        for arm in dict.fromkeys(arm for name in names for arm in CLAIMS[name].arms):
            if (arm, seed) not in done:
                row = run_arm(arm, seed)
                append_row(record, row)
                first, last = row["probes"][0]["all"], row["probes"][-1]["all"]
                print(f"seed {seed}, {arm}: accuracy {first:.2f} to {last:.2f}; {row['seconds']:.0f} s", flush=True)


def train(arm: str, seed: int, folder: Path, *keys: str) -> None:
    """Run train.py into `folder`. Raises RuntimeError with the end of what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    command += [*ARMS[arm], *COMMON_KEYS, f"seed={seed}", f"run_dir={folder}", *keys]
    on_cpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # as the recorded runs
    ended = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False, env=on_cpu)
    if ended.returncode:
        raise RuntimeError(f"{arm}, seed {seed}: exit status {ended.returncode}\n{ended.stderr[-3000:]}")


def run_arm(arm: str, seed: int) -> dict:
    """Make a run, after the one that it starts from -> the record's line. Raises RuntimeError where train.py fails."""
    with tempfile.TemporaryDirectory(dir=RUNS) as name:
        first, last, start = Path(name) / "first", Path(name) / "last", []
        if arm in STARTS_FROM:
            train(STARTS_FROM[arm], seed, first, f"save_every={10**6}")  # at the end alone
            start = [f"model={first}/checkpoints/latest/hf"]
        train(arm, seed, last, "save_every=0", *start)
        return record_run(arm, last) | {"words": ARMS[arm]}


def record_run(arm: str, folder: Path) -> dict:
    """A line of a record: what claims, tables and plots need of a run directory; of curves the means over five steps.
    Raises ValueError for a run that has not ended with a probe."""
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    rows = read_rows(folder / "metrics.jsonl")
    if not rows or rows[-1]["step"] != config["steps"] or "probe/accuracy" not in rows[-1]:
        raise ValueError(f"{folder}: its {config['steps']} steps have not ended with a probe")
    steps = [row for row in rows if "reward" in row]
    fives = [steps[n : n + 5] for n in range(0, len(steps), 5)]
    facts = (folder / "environment.txt").read_text(encoding="utf-8").split("\n")
    return {
        "arm": arm, "seed": config["seed"], "keys": {key: config[key] for key in KEYS},
        "seconds": sum(row["time/step"] for row in steps), "peak_memory_gb": steps[-1]["peak_memory_gb"],
        "probes": [{"step": row["step"]} | probes(row) for row in rows if "probe/accuracy" in row],
        "curves": {key: [round(fmean(row.get(key, 0.0) for row in five), 4) for five in fives] for key in CURVES},
        "totals": {key: sum(row.get(key, 0) for row in steps) for key in TOTALS},
        "environment": [line for line in facts if line.startswith(("git:", "torch:", "transformers:"))],
    }  # fmt: skip


def probes(row: dict) -> dict[str, float]:
    """The probe's values by short name: probe/accuracy_fact as `fact`, probe/accuracy as `all`."""
    values = {key.removeprefix("probe/"): round(value, 4) for key, value in row.items() if key.startswith("probe/")}
    return {"all": values.pop("accuracy")} | {key.removeprefix("accuracy_"): values[key] for key in values}


def print_verdict(name: str, results: Results) -> bool:
    """Say whether a claim holds in these runs, and return it."""
    holds = CLAIMS[name].holds(results)
    print(f"{name}: {CLAIMS[name].prediction}\n{'holds' if holds else 'FAILS'}")
    return holds


def run_again(name: str) -> bool:
    """A claim's first two seeds anew, beside the record, and two fresh ones. Returns whether the claim holds on these.

    On the same kind of CPU and the same torch the first are equal to the last digit; elsewhere rounding differs. Only
    the probes that the record holds are compared: some were added to the code later.
    """
    again, fresh = RUNS / "again.jsonl", RUNS / "fresh.jsonl"
    again.unlink(missing_ok=True)
    fresh.unlink(missing_ok=True)
    run_missing([name], SEEDS[:2], again)
    recorded = {(row["arm"], row["seed"]): row["probes"] for row in read_rows(RECORD)}
    pairs = [(recorded[row["arm"], row["seed"]], row["probes"]) for row in read_rows(again)]
    equal = sum(all(old.items() <= new.items() for old, new in zip(*pair, strict=True)) for pair in pairs)
    print(f"{equal} of {len(pairs)} runs of seeds {SEEDS[:2]} equal the record to the last digit")
    run_missing([name], FRESH_SEEDS, fresh)
    print(f"On the fresh seeds {FRESH_SEEDS}:")
    return print_verdict(name, load_results(fresh, ARMS))


def main(words: list[str]) -> None:
    command, *rest = words or [""]
    if command == "run" and set(rest) <= set(CLAIMS):
        run_missing(rest or list(CLAIMS), SEEDS, RECORD)
        for name in rest or CLAIMS:
            print_verdict(name, load_results(RECORD, ARMS))
    elif command == "again" and len(rest) == 1 and rest[0] in CLAIMS:
        raise SystemExit(0 if run_again(rest[0]) else 1)
    elif words == ["figures"] or (command == "keep" and rest and all("=" in word for word in rest)):
        for name, folder in (word.split("=", 1) for word in rest):
            append_row(REAL_RECORD, record_run(name, Path(folder)))
        print(*write_pages(), sep="\n")
    elif words == ["base"]:
        make_tiny()
    elif words == ["ladder"]:
        make_ladder_base()
    else:
        print(f"{__doc__}\nclaims: {', '.join(CLAIMS)}", file=sys.stderr)
        raise SystemExit(2)
