"""Runs of a real model on real text: their record, miniature/real.jsonl, and its table.

    python -m miniature keep "active=runs/smollm2-135m" ...     NAME=RUN: a line for each finished run, then the pages

The runs take hours, so no command makes them anew; configs/smollm2-135m.yaml and the keys in the record say how.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from metrics import read_rows
from miniature.claims import Claim, gains

REAL_RECORD = Path(__file__).resolve().parent / "real.jsonl"
TRANSFERS, SETS = REAL_RECORD.with_name("transfer.jsonl"), ("last_word", "heldout", "other")


def rises(runs: list[dict], curve: str) -> list[float]:
    """The mean of each run's last five steps (a point holds up to five) minus that of its first five."""
    return [fmean(run["curves"][curve][-1:]) - run["curves"][curve][0] for run in runs]


REAL_CLAIMS = {
    "own masks": Claim(
        "Accuracy on the step's own masks rises by at least 0.15 with `active` in every seed.",
        ("active",),
        lambda active: min(rises(active, "pred/accuracy")) >= 0.15),
    "function words": Claim(
        "The share of function words among valid masks rises by at least 0.15 with `active` in every seed, with the "
        "frozen generator in none.",
        ("active", "frozen generator"),
        lambda active, frozen: (
            min(rises(active, "gen/share_function")) >= 0.15 > max(rises(frozen, "gen/share_function")))),
    "random masks teach more": Claim(
        "Held out, sampled, mean over seeds: `random_span` gains at least 0.03 more than `active`.",
        ("active", "random_span"),
        lambda active, random: fmean(gains(random, "all")) - fmean(gains(active, "all")) >= 0.03),
    "frozen teaches more": Claim(
        "Held out, sampled, mean over seeds: the frozen generator gains at least as much as `active`.",
        ("active", "frozen generator"),
        lambda active, frozen: fmean(gains(frozen, "all")) >= fmean(gains(active, "all"))),
    "greedy": Claim(
        "Greedy held-out accuracy rises by at least 0.03 with `random_span` (mean over seeds), by less with `active`.",
        ("active", "random_span"),
        lambda active, random: fmean(gains(random, "greedy")) >= 0.03 > fmean(gains(active, "greedy"))),
}  # fmt: skip
"""Of float32, seeds REAL_SEEDS, written before all of these runs but one (active, seed 10)."""
REAL_SEEDS = (10, 11, 12)


def of_seeds(runs: list[dict]) -> list[dict]:
    """The float32 runs of REAL_SEEDS, or if there is none all in float32; docs/differences.md has bfloat16."""
    runs = [run for run in runs if run["keys"].get("dtype", "float32") == "float32"]
    return [run for run in runs if run["seed"] in REAL_SEEDS] or runs


def real_tables(results: dict[str, list[dict]], interval: Callable[[list[float]], str]) -> list[list[list[str]]]:
    """Two tables with a row an arm, means over its seeds: start and end of the probe; the first five and the last four
    or five steps of training. The first has the arms of the comparison, with the interval of the probe's gains where
    there are three seeds; the second what was tried against the agreement, the arms named `active, ...`."""
    heads = ["own masks", "function words", "top word", "held out"]
    tables = [[["run", "seeds", *heads, "greedy"]], [["`active` with", "seeds", *heads]]]
    for arm, runs in results.items():
        if not (runs := of_seeds(runs)):
            continue
        tried, asked = arm.startswith("active, "), runs[0]["keys"]["method"] != "sft"  # which masks by rule
        cells = [arm.removeprefix("active, "), " ".join(str(run["seed"]) for run in runs)]
        for curve in ("pred/accuracy", "gen/share_function", "gen/top_word_share"):
            first, last = (fmean(run["curves"][curve][n] for run in runs) for n in (0, -1))
            cells.append(f"{first:.2f}→{last:.2f}" if asked else "")
        for key in ("all",) if tried else ("all", "greedy"):
            first, last = (fmean(run["probes"][n][key] for run in runs) for n in (0, -1))
            cells.append(f"{first:.2f}→{last:.2f}" + (f" ({interval(gains(runs, key))})" if len(runs) > 2 else ""))
        tables[tried].append(cells)
    return tables


def real_claims(results: dict[str, list[dict]]) -> dict[str, bool]:
    """Whether each prediction holds whose runs are all there."""
    chosen = {arm: [run for run in runs if run["seed"] in REAL_SEEDS] for arm, runs in results.items()}
    done = {arm for arm, runs in chosen.items() if len(runs) == len(REAL_SEEDS)}
    return {name: claim.holds(chosen) for name, claim in REAL_CLAIMS.items() if done.issuperset(claim.arms)}


def transfer_table(interval: Callable[[list[float]], str], record: Path = TRANSFERS) -> list[list[str]]:
    """One row an arm, of models named `ARM SEED`: shares that are right in the sets of miniature/transfer.py."""
    rows, table = read_rows(record), [["model", "seeds", "last words", "held-out masks", "masks in other text"]]
    arms = dict.fromkeys(row["model"].rstrip(" 0123456789") for row in rows)
    for arm in arms:
        runs = [row for row in rows if row["model"].rstrip(" 0123456789") == arm]
        seeds = " ".join(row["model"].removeprefix(arm).strip() for row in runs)
        table.append([arm, seeds, *(interval([row[part][0] for row in runs]) for part in SETS)])
    return table
