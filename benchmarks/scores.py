"""Scores of benchmarks: from judged responses to numbers, tables and a comparison with the paper's.

A record is a judged response, with at least id, how, score, finish and tokens. A score is the mean over items of the
mean over an item's samples, in per cent; its standard error counts items, since the samples of one item are not
independent. Rates are shares of responses. Needs no torch.
"""

import json
from collections.abc import Iterable
from itertools import groupby
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

from config import ConfigError

MATH = {"math500": 500, "olympiad": 674, "minerva": 272, "gsm8k": 1319, "amc23": 40, "aime24": 30}
SIZES = MATH | {"supergpqa": 26529, "bbeh": 4520, "mmlu_pro": 12032}
"""Items of the whole sets that enter the paper's means. OlympiadBench has 674 on the hub, 675 in its repository."""
COLUMNS = ("overall", "math", "supergpqa", "bbeh", "mmlu_pro")
PAPER = {
    "SmolLM3-3B-Base": (16.23, 32.31, 12.62, 3.32, 16.66),
    "SmolLM3-3B-Base, Random RLPT": (20.25, 35.95, 14.48, 7.85, 22.74),
    "SmolLM3-3B-Base, PretrainZero": (23.41, 38.03, 19.44, 3.78, 32.41),
    "Qwen3-4B-Base": (32.36, 42.53, 26.32, 8.67, 51.94),
    "Qwen3-4B-Base, continued pretraining": (15.89, 24.65, 9.67, 0.04, 29.21),
    "Qwen3-4B-Base, supervised FT": (24.27, 15.55, 26.38, 12.28, 42.88),
    "Qwen3-4B-Base, Random RLPT": (35.41, 47.87, 29.10, 9.45, 55.21),
    "Qwen3-4B-Base, PretrainZero": (39.61, 53.13, 32.28, 12.68, 60.37),
    "Qwen3-8B-Base": (37.07, 47.48, 31.12, 10.49, 59.19),
    "Qwen3-8B-Base, Random RLPT": (40.96, 55.08, 34.19, 12.96, 61.59),
    "Qwen3-8B-Base, PretrainZero": (42.78, 57.72, 34.46, 14.67, 64.28),
    "Qwen3-30B-A3B-Base": (38.88, 52.49, 33.73, 10.51, 58.79),
    "Qwen3-30B-A3B-Base, Random RLPT": (40.38, 52.62, 36.33, 12.99, 59.57),
    "Qwen3-30B-A3B-Base, PretrainZero": (43.55, 58.12, 36.58, 14.91, 64.59),
}
"""The paper's tables (arXiv 2512.03442) by COLUMNS, without standard errors; its AIME cells are mostly single runs."""


def summarise(records: Iterable[dict]) -> dict:
    """The numbers of one benchmark; records of one item stand together. Two items with two samples each, one right and
    both right: score 75.0, standard error stdev(50, 100) / sqrt(2) = 25.0."""
    scores, details = [], []
    for _, samples in groupby(records, key=lambda record: record["id"]):
        rows = [(one["score"], one["how"] == "box", one["finish"] == "length", one["tokens"]) for one in samples]
        scores.append(fmean(100.0 * score for score, *_ in rows))
        details += [row[1:] for row in rows]
    error = stdev(scores) / sqrt(len(scores)) if len(scores) > 1 else None
    parsed, cut, length = map(fmean, zip(*details, strict=True))
    return {
        "score": fmean(scores), "standard_error": error, "items": len(scores), "responses": len(details),
        "parse_rate": parsed, "truncation_rate": cut, "length_mean": length,
    }  # fmt: skip


def paper_means(results: dict[str, dict]) -> dict[str, float]:
    """`math`, the mean of six sets, and `overall`, of four columns; each only if all its parts are there and whole."""
    whole, means = _whole(results), {}
    if whole.keys() >= set(MATH):
        means["math"] = fmean(whole[name] for name in MATH)
        if whole.keys() >= set(COLUMNS[2:]):
            means["overall"] = fmean([means["math"], *(whole[name] for name in COLUMNS[2:])])
    return means


def _whole(results: dict[str, dict]) -> dict[str, float]:
    """Scores of the sets of which no item is missing."""
    return {name: one["score"] for name, one in results.items() if name in SIZES and one["items"] >= SIZES[name]}


def table(results: dict[str, dict], means: dict[str, float]) -> str:
    """A line for each benchmark, then both means, or what is missing for them."""
    lines = ["benchmark     score    +-  items responses  boxed cut off  tokens  seconds"]
    for name, one in results.items():
        error = "" if one["standard_error"] is None else f"{one['standard_error']:.2f}"
        lines.append(
            f"{name:12} {one['score']:6.2f} {error:>5} {one['items']:6} {one['responses']:9} "
            f"{one['parse_rate']:6.3f} {one['truncation_rate']:7.3f} {one['length_mean']:7.1f} {one['seconds']:8.1f}"
        )
    for name, title, parts in (("math", "MATH mean", MATH), ("overall", "Overall", SIZES)):
        missing = [
            f"{part} has {results[part]['items']:,} of {SIZES[part]:,} items" if part in results else f"no {part}"
            for part in parts if part not in _whole(results)
        ]  # fmt: skip
        lines.append(f"{title:12} " + (f"{means[name]:6.2f}" if name in means else f"none: {', '.join(missing)}"))
    return "\n".join(lines)


def compare_evaluations(folders: list[str]) -> str:
    """Evaluations side by side, the settings in which they differ, and whole sets above the paper's figures. Raises
    ConfigError for a folder without a finished evaluation."""
    found = {folder: Path(folder) / "eval.json" for folder in folders}
    for folder, file in found.items():
        if not file.is_file():
            raise ConfigError(f"{folder}: no eval.json in it, so no finished evaluation")
        found[folder] = json.loads(file.read_text(encoding="utf-8"))
    wide = max(map(len, [*found, "12.34 +- 12.34"])) + 2
    lines = [f"{'score +- standard error':24}" + "".join(f"{folder:>{wide}}" for folder in found)]
    for name in dict.fromkeys(name for one in found.values() for name in one["tasks"]):
        tasks = [one["tasks"].get(name, {}) for one in found.values()]
        pairs = [(task.get("score"), task.get("standard_error")) for task in tasks]
        cells = [" +- ".join(f"{value:.2f}" for value in pair if value is not None) or "-" for pair in pairs]
        lines.append(f"{name:24}" + "".join(f"{cell:>{wide}}" for cell in cells))
    lines.append("")
    values: dict[str, list[str]] = {}  # of each setting and data set
    for one in found.values():
        facts = {key: value for key, value in one["settings"].items() if key not in ("out", "checkpoint", "weights")}
        for name, task in one["tasks"].items():
            facts |= {f"{name}.{key}": task[key] for key in ("data", "samples", "prompt")}
        for key, value in facts.items():
            values.setdefault(key, []).append(repr(value))
    for key, row in values.items():
        text = ", ".join(dict.fromkeys(row))
        if len(set(row)) > 1:
            lines.append(f"not the same: {key}" + (f" ({text})" if len(text) < 80 else ""))
    rows = {folder: _whole(one["tasks"]) | one["means"] for folder, one in found.items()}
    rows |= {f"paper: {name}": dict(zip(COLUMNS, numbers, strict=True)) for name, numbers in PAPER.items()}
    wide = max(map(len, rows))
    lines += ["", f"{'':{wide}}" + "".join(f"{name:>10}" for name in COLUMNS)]
    for name, row in rows.items():
        lines.append(f"{name:{wide}}" + "".join(f"{row[key]:10.2f}" if key in row else f"{'-':>10}" for key in COLUMNS))
    return "\n".join(lines)
