"""The paper in miniature: make the runs behind the claims, and show what came of them.

    python -m miniature run [CLAIM ...]      make the runs that miniature/runs.jsonl lacks, then print the tables
    python -m miniature again CLAIM          make a claim's first two seeds anew and compare with what is recorded;
                                               then test it on two seeds that were never used
    python -m miniature figures              README.md's tables and assets/figures/ from the record alone, in seconds

    run ... seeds=20,21,22,23,24 out=results/mine.jsonl      the same with fresh seeds, elsewhere

A run is one line: what was run, its probes, means over five steps of what matters, totals. Killed, `run` goes on with
the first run that has no line. An arm that starts from another (claims.FIRST) makes that run too and keeps its probes.
Leaves out what is expected (claims.py), tables and plots (tables.py), and the worlds (wiki.py, worlds.py).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean

from metrics import append_row, environment, read_rows
from miniature.claims import ARMS, CLAIMS, CURVES, FIRST, PROBES, SEEDS, TOTALS
from miniature.tables import RECORD, ROOT, load_results, printed, write_readme
from miniature.worlds import make_questions, make_several

RANKS = 2
FRESH = (20, 21)
RUNS = ROOT / "runs" / "experiments"
ALWAYS = ["share_prompts=true", "probe_every=20", "samples_per_step=0", "resume=never"]


def run_missing(names: list[str], seeds: list[int], record: Path) -> None:
    """Seeds outside, arms inside: whoever stops early has whole seeds."""
    arms = list(dict.fromkeys(arm for name in names for arm in CLAIMS[name].arms))
    record.parent.mkdir(parents=True, exist_ok=True)
    RUNS.mkdir(parents=True, exist_ok=True)
    (RUNS / "several.jsonl").write_text(make_several(0), encoding="utf-8")
    (RUNS / "questions.jsonl").write_text(make_questions(0), encoding="utf-8")
    for seed in seeds:
        for arm in arms:
            done = {(row["arm"], row["seed"]): row["words"] for row in read_rows(record)}
            if done.get((arm, seed)) != ARMS[arm]:
                row = run_one(arm, seed)
                append_row(record, row)
                ends = ", ".join(f"{key} {value:.2f}" for key, value in row["probes"][-1].items() if key != "step")
                print(f"seed {seed}, {arm}: {ends}; {row['seconds']:.0f} s", flush=True)


def run_one(arm: str, seed: int, save: bool = False) -> dict:
    """One run of train.py as a command of its own -> its line. Raises RuntimeError with the end of what it printed.

    save: leave the run's folder, with its last checkpoint, to who starts from it.
    """
    folder = run_folder(arm, seed)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
    words = [*ARMS[arm], *ALWAYS, f"save_every={10**6 if save else 0}", f"seed={seed}", f"run_dir={folder}"]
    first = run_one(FIRST[arm], seed, save=True) if arm in FIRST else None
    if first:
        words.append(f"model={run_folder(FIRST[arm], seed) / 'checkpoints' / 'latest' / 'hf'}")
    command, on_cpu = [*launcher, "train.py", *words], os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # as those recorded
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=on_cpu)
    if ended.returncode:
        raise RuntimeError(f"{arm}, seed {seed}: exit status {ended.returncode}\n{ended.stderr[-3000:]}")
    rows = read_rows(folder / "metrics.jsonl")
    probed, steps = [row for row in rows if "probe/accuracy" in row], [row for row in rows if "reward" in row]
    result = {"arm": arm, "seed": seed, "words": ARMS[arm], "seconds": sum(row["time/step"] for row in steps)}
    names = {"all": "probe/accuracy"} | {key: f"probe/accuracy_{key}" for key in PROBES}
    result["probes"] = [
        {"step": row["step"]} | {key: round(row[name], 4) for key, name in names.items() if name in row}
        for row in probed
    ]
    result["curves"] = {
        key: [round(fmean(row.get(key, 0.0) for row in steps[n : n + 5]), 4) for n in range(0, len(steps), 5)]
        for key in CURVES
    }
    result["totals"] = {key: sum(row.get(key, 0) for row in steps) for key in TOTALS}
    result["environment"] = [line for line in environment().split("\n") if line.startswith(("git:", "torch:", "trans"))]
    if first:
        result["seconds"] += first["seconds"]
        result["first"] = {"arm": first["arm"], "probes": first["probes"]}
        shutil.rmtree(run_folder(FIRST[arm], seed))
    if not save:
        shutil.rmtree(folder)
    return result


def run_folder(arm: str, seed: int) -> Path:
    return RUNS / f"{re.sub('[^a-z0-9]+', '-', arm.lower())}-{seed}"


def again(name: str) -> bool:
    """A claim's first two seeds anew, beside the record, and two fresh ones. Returns whether the claim holds on these.

    On the same kind of CPU and the same torch the first are equal to the last digit; elsewhere rounding differs.
    """
    anew = RUNS / "again.jsonl"
    anew.unlink(missing_ok=True)
    run_missing([name], [*SEEDS[:2], *FRESH], anew)
    recorded = {(row["arm"], row["seed"]): row for row in read_rows(RECORD)}
    repeated = [row for row in read_rows(anew) if row["seed"] in SEEDS]
    same = sum(same_probes(row, recorded[row["arm"], row["seed"]]) for row in repeated)
    print(f"{same} of {len(repeated)} runs of seeds {SEEDS[:2]} equal the record to the last digit")
    results = load_results(anew)
    fresh = {arm: [run for run in runs if run["seed"] in FRESH] for arm, runs in results.items()}
    held = CLAIMS[name].test(fresh)
    print(f"{name}: {CLAIMS[name].prediction}\nOn the fresh seeds {FRESH}: {'holds' if held else 'FAILS'}")
    return held


def same_probes(row: dict, recorded: dict) -> bool:
    """Equal in every probe that the record holds: it was begun before some of them were."""
    pairs = list(zip(recorded["probes"], row["probes"], strict=True))
    return all(new[key] == value for old, new in pairs for key, value in old.items())


def main() -> None:
    words = sys.argv[1:]
    options = dict(word.split("=", 1) for word in words if "=" in word)
    command, *names = [word for word in words if "=" not in word] or [""]
    seeds = [int(seed) for seed in options.get("seeds", ",".join(map(str, SEEDS))).split(",")]
    record = Path(options.get("out", RECORD))
    unknown = [name for name in names if name not in CLAIMS]
    if command not in ("run", "again", "figures") or unknown or (command == "again" and len(names) != 1):
        print(f"{__doc__}\nclaims: {', '.join(CLAIMS)}", file=sys.stderr)
        raise SystemExit(2)
    if command == "run":
        run_missing(names or list(CLAIMS), seeds, record)
        print(f"\n{printed(load_results(record))}")
    elif command == "again":
        raise SystemExit(0 if again(names[0]) else 1)
    else:
        try:
            print("\n".join(map(str, write_readme())))
        except ValueError as error:
            print(error, file=sys.stderr)
            raise SystemExit(2) from None


if __name__ == "__main__":
    main()
