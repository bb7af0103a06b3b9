"""Runs of a real model on real text: their record, miniature/real.jsonl, and its table.

    python -m miniature keep "active=runs/smollm2-135m" ...     NAME=RUN: a line for each finished run, then the pages

The runs take hours, so no command makes them anew; configs/smollm2-135m.yaml and the keys in the record say how.
"""

from pathlib import Path

import yaml

from masking import WORD_KINDS
from metrics import append_row, read_rows
from miniature.claims import TOTALS, means_of_five

REAL_RECORD = Path(__file__).resolve().parent / "real.jsonl"
KEYS = "method seed steps dtype train_generator mask_content learning_rate passages_per_step masks_per_passage".split()
KEYS += ["predictions_per_mask"]
REAL_PROBES = {"all": "probe/accuracy", "greedy": "probe/accuracy_greedy", "perplexity": "probe/perplexity"}
REAL_PROBES |= {kind: f"probe/accuracy_{kind}" for kind in WORD_KINDS}
REAL_PROBES |= {f"greedy_{kind}": f"probe/accuracy_greedy_{kind}" for kind in WORD_KINDS}
REAL_CURVES = ["pred/accuracy", "gen/valid_rate", "gen/top_word_share", "gen/distinct", "gen/reward", "entropy"]
REAL_CURVES += [f"gen/share_{kind}" for kind in WORD_KINDS]


def keep_run(name: str, folder: Path, record: Path = REAL_RECORD) -> dict:
    """Append what the table needs of a run directory. Raises ValueError for a run that has not ended with a probe."""
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    rows = read_rows(folder / "metrics.jsonl")
    if not rows or rows[-1]["step"] != config["steps"] or "probe/accuracy" not in rows[-1]:
        raise ValueError(f"{folder}: its {config['steps']} steps have not ended with a probe")
    steps = [row for row in rows if "reward" in row]
    probed = [row for row in rows if "probe/accuracy" in row]
    facts = (folder / "environment.txt").read_text(encoding="utf-8").split("\n")
    result = {"arm": name, "seed": config["seed"], "keys": {key: config[key] for key in KEYS}}
    result |= {"seconds": round(sum(row["time/step"] for row in steps)), "peak_memory_gb": steps[-1]["peak_memory_gb"]}
    result["probes"] = [
        {"step": row["step"]} | {key: round(row[long], 4) for key, long in REAL_PROBES.items() if long in row}
        for row in probed
    ]
    result["curves"] = means_of_five(steps, REAL_CURVES)
    result["totals"] = {key: sum(row.get(key, 0) for row in steps) for key in TOTALS}
    result["environment"] = [line for line in facts if line.startswith(("git:", "torch:", "transformers:"))]
    append_row(record, result)
    return result


def load_real(record: Path = REAL_RECORD) -> dict[str, list[dict]]:
    """Runs by name, in the order of the record; of two lines for one name and seed the later."""
    rows = {(row["arm"], row["seed"]): row for row in read_rows(record)}
    return {arm: [row for row in rows.values() if row["arm"] == arm] for arm, _ in rows}


def real_table(results: dict[str, list[dict]]) -> list[list[str]]:
    """One row a run: start and end of the probe, means of the first and of the last five steps of training."""
    table = [["run", "seed", "responses", "top word", "own masks", "held out", "greedy", "function", "perplexity"]]
    for arm, runs in results.items():
        for run in runs:
            first, last = run["probes"][0], run["probes"][-1]
            asked = run["keys"]["method"] != "sft"  # nothing is sampled, and masks are by rule
            curves = [run["curves"][key] for key in ("gen/top_word_share", "pred/accuracy")]
            cells = [f"{curve[0]:.2f}→{curve[-1]:.2f}" if asked else "" for curve in curves]
            for key in ("all", "greedy", "greedy_function", "perplexity"):  # the other kinds are in the record
                digits = 1 if key == "perplexity" else 2
                known = key in first and key in last
                cells.append(f"{first[key]:.{digits}f}→{last[key]:.{digits}f}" if known else "")
            table.append([arm, str(run["seed"]), f"{run['totals']['responses']:,}", *cells])
    return table
