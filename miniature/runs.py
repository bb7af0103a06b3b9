"""The paper in miniature: make the runs behind the claims, and show what came of them.

    python -m miniature run [CLAIM ...]      make the runs that miniature/runs.jsonl lacks, then print the tables
    python -m miniature again CLAIM          make a claim's first two seeds anew and compare with what is recorded;
                                             then test it on two seeds that were never used
    python -m miniature keep NAME=RUN        a line of miniature/real.jsonl for a finished run on real text
    python -m miniature figures              the marked blocks of the pages and assets/figures/, from the record alone
    python -m miniature base [wiki|base]     rebuild the mini-wiki and the tiny base (base.py)
    python -m miniature ladder               rebuild the base of the ladder (ladder.py)
    python -m miniature world several|questions FILE.jsonl     write another made-up world

    run ... seeds=20,21,22,23,24 out=runs/mine.jsonl      the same with fresh seeds, elsewhere

A run is one line of the record: its arm, probes, means over five steps, totals. `run` goes on where it was stopped. An
arm that starts from another (claims.STARTS_FROM) makes that run too and keeps its probes.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from metrics import append_row, environment, read_rows
from miniature.claims import ARMS, CLAIMS, CURVES, PROBES, SEEDS, STARTS_FROM, TOTALS, means_of_five
from miniature.real import keep_run
from miniature.tables import PROJECT, RECORD, load_results, make_tables, write_pages
from miniature.worlds import make_questions, make_several

FRESH_SEEDS = (20, 21)
RUNS = PROJECT / "runs" / "experiments"
WORLDS = {"several": make_several, "questions": make_questions}
COMMON_KEYS = ["share_prompts=true", "probe_every=20", "samples_per_step=0", "resume=never"]


def run_missing(names: list[str], seeds: list[int], record: Path) -> None:
    """Make the runs of these claims. Seeds outside, arms inside: whoever stops early has whole seeds."""
    for folder in (record.parent, RUNS):
        folder.mkdir(parents=True, exist_ok=True)
    for name, make_world in WORLDS.items():
        (RUNS / f"{name}.jsonl").write_text(make_world(0), encoding="utf-8")
    for seed in seeds:
        for arm in dict.fromkeys(arm for name in names for arm in CLAIMS[name].arms):
            done = {(row["arm"], row["seed"]): row["words"] for row in read_rows(record)}
            if done.get((arm, seed)) != ARMS[arm]:
                row = run_arm(arm, seed)
                append_row(record, row)
                last = ", ".join(f"{key} {value:.2f}" for key, value in row["probes"][-1].items() if key != "step")
                print(f"seed {seed}, {arm}: {last}; {row['seconds']:.0f} s", flush=True)


def run_arm(arm: str, seed: int, keep: bool = False) -> dict:
    """Run train.py on two ranks -> the record's line. Raises RuntimeError with the end of what it printed.

    keep: leave the run's folder, with its last checkpoint, to the arm that starts from it.
    """
    folders = {arm: RUNS / f"{re.sub('[^a-z0-9]+', '-', arm.lower())}-{seed}" for arm in ARMS}
    keys = [*ARMS[arm], *COMMON_KEYS, f"save_every={10**6 if keep else 0}", f"seed={seed}", f"run_dir={folders[arm]}"]
    first = run_arm(STARTS_FROM[arm], seed, keep=True) if arm in STARTS_FROM else None
    if first:
        keys.append(f"model={folders[first['arm']] / 'checkpoints' / 'latest' / 'hf'}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *keys]
    on_cpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # as the recorded runs
    ended = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False, env=on_cpu)
    if ended.returncode:
        raise RuntimeError(f"{arm}, seed {seed}: exit status {ended.returncode}\n{ended.stderr[-3000:]}")
    rows = read_rows(folders[arm] / "metrics.jsonl")
    steps = [row for row in rows if "reward" in row]
    probes = {"all": "probe/accuracy"} | {key: f"probe/accuracy_{key}" for key in PROBES}
    probes["thought_use"] = "probe/thought_use"
    result = {
        "arm": arm, "seed": seed, "words": ARMS[arm], "seconds": sum(row["time/step"] for row in steps),
        "probes": [
            {"step": row["step"]} | {key: round(row[name], 4) for key, name in probes.items() if name in row}
            for row in rows if "probe/accuracy" in row],
        "curves": means_of_five(steps, CURVES),
        "totals": {key: sum(row.get(key, 0) for row in steps) for key in TOTALS},
        "environment": [line for line in environment().split("\n") if line.startswith(("git:", "torch:", "trans"))],
    }  # fmt: skip
    if first:
        result["seconds"] += first["seconds"]
        result["first"] = {"arm": first["arm"], "probes": first["probes"]}
        shutil.rmtree(folders[first["arm"]])
    if not keep:
        shutil.rmtree(folders[arm])
    return result


def run_again(name: str) -> bool:
    """A claim's first two seeds anew, beside the record, and two fresh ones. Returns whether the claim holds on these.

    On the same kind of CPU and the same torch the first are equal to the last digit; elsewhere rounding differs. Only
    the probes that the record holds are compared: some were added to the code later.
    """
    path = RUNS / "again.jsonl"
    path.unlink(missing_ok=True)
    run_missing([name], [*SEEDS[:2], *FRESH_SEEDS], path)
    recorded = {(row["arm"], row["seed"]): row["probes"] for row in read_rows(RECORD)}
    pairs = [(recorded[row["arm"], row["seed"]], row["probes"]) for row in read_rows(path) if row["seed"] in SEEDS]
    equal = sum(all(old.items() <= new.items() for old, new in zip(*pair, strict=True)) for pair in pairs)
    print(f"{equal} of {len(pairs)} runs of seeds {SEEDS[:2]} equal the record to the last digit")
    results = load_results(path)
    holds = CLAIMS[name].holds({arm: [run for run in results[arm] if run["seed"] in FRESH_SEEDS] for arm in results})
    print(f"{name}: {CLAIMS[name].prediction}\nOn the fresh seeds {FRESH_SEEDS}: {'holds' if holds else 'FAILS'}")
    return holds


def main(words: list[str]) -> None:
    command, *rest = words or [""]
    options = dict(word.split("=", 1) for word in rest if "=" in word)
    names = [word for word in rest if "=" not in word]
    if command == "base":
        from miniature import base  # torch and transformers, which nothing else here needs

        base.main(rest)
    elif command == "ladder" and not rest:
        from miniature.ladder import make_base

        make_base()
    elif command == "world" and len(rest) == 2 and rest[0] in WORLDS:
        Path(rest[1]).parent.mkdir(parents=True, exist_ok=True)
        Path(rest[1]).write_text(WORLDS[rest[0]](0), encoding="utf-8")
        print(rest[1])
    elif command == "run" and set(names) <= set(CLAIMS):
        record = Path(options.get("out", RECORD))
        seeds = [int(seed) for seed in options.get("seeds", ",".join(map(str, SEEDS))).split(",")]
        run_missing(names or list(CLAIMS), seeds, record)
        print("\n" + "\n\n".join(make_tables(load_results(record)).values()))
    elif command == "again" and len(names) == 1 and names[0] in CLAIMS:
        raise SystemExit(0 if run_again(names[0]) else 1)
    elif (command == "figures" and not rest) or (command == "keep" and rest and not names):
        try:
            for name, folder in options.items():
                keep_run(name, Path(folder))
            print("\n".join(map(str, write_pages())))
        except ValueError as error:
            print(error, file=sys.stderr)
            raise SystemExit(2) from None
    else:
        print(f"{__doc__}\nclaims: {', '.join(CLAIMS)}", file=sys.stderr)
        raise SystemExit(2)
