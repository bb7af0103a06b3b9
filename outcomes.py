"""Tables (stub)."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean, stdev

from claims import ARMS, CLAIMS, Results, final, late, over
from evidence import read_rows

ROOT = Path(__file__).resolve().parent
RECORD = ROOT / "results" / "runs.jsonl"


def load_results(record: Path) -> Results:
    results: Results = {arm: [] for arm in ARMS}
    for row in sorted(read_rows(record), key=lambda row: row["seed"]):
        results[row["arm"]].append(row)
    return {arm: runs for arm, runs in results.items() if runs}


def interval(values: list[float]) -> str:
    """Mean and 95 % interval by Student's t over seeds."""
    t = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
    mean = fmean(values)
    if len(values) not in t:
        return f"{mean:.2f}"
    half = t[len(values)] * stdev(values) / math.sqrt(len(values))
    return f"{mean:.2f} ± {half:.2f}"


def results_table(results: Results) -> str:
    heads = ["facts, sampled", "facts, greedy", "template", "copies, sampled", "copies, greedy", "masks on a fact"]
    heads += ["predictions", "tokens trained", "FLOPs"]
    lines = ["| method | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    start = [run["probes"][0] for runs in results.values() for run in runs]
    keys = ("fact", "greedy_fact", "template", "copy", "greedy_copy")
    cells = [f"{fmean(one[key] for one in start):.2f}" for key in keys]
    lines.append("| start | " + " | ".join(cells) + " | | | | |")
    for arm, runs in results.items():
        cells = [interval([final(run, key) for run in runs]) for key in keys]
        shares = [late(run, "gen/share_fact") for run in runs]
        cells.append(f"{fmean(shares):.2f}" if any(shares) else "")
        spent = [fmean(run["totals"][key] for run in runs) for key in ("pred/responses", "trained_tokens", "flops")]
        cells += [f"{spent[0] / 1000:.1f}k" if spent[0] else "none", f"{spent[1] / 1000:.1f}k", f"{spent[2]:.1e}"]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def claims_table(results: Results) -> str:
    lines = ["| claim | predicted before the runs | held? |", "|---|---|---|"]
    for name, claim in CLAIMS.items():
        if all(arm in results for arm in claim.arms):
            verdict = "yes" if claim.test(results) else "**no**"
            lines.append(f"| {name} | {claim.prediction} | {verdict} |")
    return "\n".join(lines)


def differences_table(results: Results) -> str:
    """Seed by seed, facts sampled: the pairs that the claims speak of."""
    lines = ["| facts, sampled | mean difference, 95 % interval | lowest, highest seed |", "|---|---|---|"]
    for other in ("random_span", "frozen generator", "sft", "active, 1 of 4 masks random"):
        if other in results and "active" in results:
            values = over(results, "active", other, "fact")
            lines.append(f"| active - {other} | {interval(values)} | {min(values):.2f}, {max(values):.2f} |")
    return "\n".join(lines)


def printed(results): return results_table(results)
def write_readme(): ...
