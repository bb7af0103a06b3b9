"""The charts of a report: one per metric with all runs in it. Metrics that are absent, or 0 throughout, are left out
and named. A metric without a line in SECTIONS stands under "More numbers". Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import fmean

from report.charts import COLOURS, Series, heat_chart, line_chart, number, point_chart, stacked_chart

SHARE = (0.0, 1.0)
NEEDS_RESPONSES = ("reward", "groups_kept", "length_mean", "truncated", "tokens_after_answer")
# key or key prefix ending in "*", title, explanation, fixed range of y, logarithmic y
SECTIONS = {
    "Held-out passages": [
        ("probe/accuracy", "Right answers", "sampled, with a thought; the same masks at every probe", SHARE),
        ("probe/accuracy_greedy", "Right answers, greedy", "the likeliest token each time", SHARE),
        ("probe/accuracy_*", "Right answers: ", "of this kind; no_thought: the answer is opened at once", SHARE),
        ("probe/valid_rate", "Responses with an answer", "share with a closed box", SHARE),
        ("probe/perplexity", "Perplexity of plain text", "rises: the model forgets text"),
    ],
    "Benchmarks": [("eval/*", "", "share right", SHARE)],
    "What is masked": [
        ("gen/valid_rate", "Valid masks", "share of the generator's responses", SHARE),
        ("gen/distinct", "Different masks per passage", "1: the generator always chooses the same"),
        ("gen/top_word_share", "Most frequent mask", "share of the valid masks that name the same words", SHARE),
        ("gen/span_words", "Words in a mask", "mean, valid masks"),
        ("gen/occurrences", "Occurrences of the words", "mean, in their passage"),
    ],
    "Rewards": [
        ("gen/reward", "Reward of masks", "1 - accuracy, 0 if none is right or the mask is invalid", SHARE),
        ("pred/accuracy", "Right predictions", "of the masks of the step; the generator moves it", SHARE),
        ("pred/accuracy_zero", "Masks that nobody solves", "they teach nothing", SHARE),
        ("pred/accuracy_one", "Masks that all solve", "they teach nothing", SHARE),
        ("gen/groups_kept", "Passages that teach the generator", "their masks earned unequally", SHARE),
        ("pred/groups_kept", "Masks that teach the predictor", "their answers earned unequally", SHARE),
        ("reward", "Mean reward", "all responses of both roles"),
    ],
    "Responses": [
        ("gen/length_mean", "Length, generator", "tokens, mean"),
        ("pred/length_mean", "Length, predictor", "tokens, mean"),
        ("gen/truncated", "Cut at the limit, generator", "share", SHARE),
        ("pred/truncated", "Cut at the limit, predictor", "share", SHARE),
        ("pred/valid_rate", "Predictions with an answer", "share with a closed box", SHARE),
        ("pred/tokens_after_answer", "Tokens after the answer", "rambling, mean"),
        ("entropy", "Entropy", "nats a token, of the tokens trained on; collapse to 0: lower the learning rate"),
        ("surprisal", "Surprisal", "nats a token, of all that was sampled"),
    ],
    "Training": [
        ("loss", "Loss", "says little in reinforcement learning"),
        ("grad_norm", "Norm of the gradient", "before clipping"),
        ("mismatch_abs", "Trainer against sampler", "mean difference of log-probs; must stay flat", None, True),
        ("mismatch_kl", "Trainer against sampler, KL", "nats a token; must stay flat", None, True),
        ("clip_fraction", "Clipped tokens", "share"), ("lr", "Learning rate", "of the step"),
        ("trained_tokens", "Tokens trained on", "per step"), ("time/step", "Seconds a step", "without the save"),
        ("time/*", "Seconds: ", "in this phase of the step"),
        ("tokens_per_second", "Tokens sampled a second", "over the whole step"),
        ("peak_memory_gb", "Largest memory of rank 0", "GB; on a GPU of the update"),
    ],
    "More numbers": [("*", "", "as logged")],  # what no line above names: a metric of your own
}  # fmt: skip
ELSEWHERE = "step method gen/share_ gen/invalid_ pred/accuracy_histogram pred/accuracy_caseless flops".split()
"""Keys, or their beginnings, that are no curve or are drawn in another form."""


@dataclass
class RunData:
    """One run directory. entries: evenly spaced passages of samples.jsonl, each with the rows of its masks. repeated:
    rows of one passage at several steps, of probes.jsonl, else of the passage that recurs most in samples.jsonl."""

    folder: Path
    config: dict
    rows: list[dict]
    entries: list[list[dict]] = field(default_factory=list)
    repeated: list[dict] = field(default_factory=list)

    def values(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of a metric; rewards and lengths only of steps at which the role has responses."""
        role, _, name = key.partition("/")
        rows = [row for row in self.rows if name not in NEEDS_RESPONSES or row.get(f"{role}/responses", 1)]
        return [(row["step"], float(row[key])) for row in rows if isinstance(row.get(key), int | float)]


@dataclass
class Family:
    """Runs that differ only in their seed."""

    name: str
    runs: list[RunData]

    @property
    def rows(self) -> list[dict]:
        return [row for run in self.runs for row in run.rows]

    def series(self, key: str) -> Series:
        """The mean over the runs at each step; with several runs also the lowest and the highest value."""
        pairs = [pair for run in self.runs for pair in run.values(key)]
        groups = groupby(sorted(pairs, key=itemgetter(0)), itemgetter(0))
        steps = {step: [y for _, y in some if math.isfinite(y)] or [math.nan] for step, some in groups}
        band = [(step, min(values), max(values)) for step, values in steps.items() if len(self.runs) > 1]
        return Series(self.name, [(step, fmean(values)) for step, values in steps.items()], band)


def figure(title: str, about: str, svg: str, legend: list[tuple[int, str]] = (), warning: str = "") -> str:
    """legend: (colour, text). Text may come from a run, so that each has its own direction of writing."""
    keys = "".join(f'<span class="key" dir="auto"><i class="c{c % COLOURS}"></i>{escape(t)}</span>' for c, t in legend)
    warning = f'<span class="warn">{escape(warning)}</span>' if warning else ""
    caption = f'<b dir="auto">{escape(title)}</b><span dir="auto">{escape(about)}</span><div>{keys}{warning}</div>'
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"


def curves(families: list[Family]) -> tuple[dict[str, list[str]], list[str]]:
    """The charts of each section, and the keys that are left out."""
    figures, left_out = {section: [] for section in SECTIONS}, []
    present = sorted({key for family in families for row in family.rows for key in row})
    lines = [(section, *line) for section, lines in SECTIONS.items() for line in lines]
    drawn = {key for _, key, *_ in lines}
    for section, pattern, title, about, *options in lines:
        prefix, keys = pattern.removesuffix("*"), [pattern]
        if "*" in pattern:
            keys = [key for key in present if key.startswith(prefix) and key not in drawn]
            keys = [key for key in keys if not key.startswith(tuple(ELSEWHERE))]
            drawn.update(keys)
        for key in keys:
            name, series = title + key.removeprefix(prefix), [family.series(key) for family in families]
            values = [y for family in families for run in family.runs for _, y in run.values(key)]
            if not any(values):
                left_out.append(key)
                continue
            bad = sum(not math.isfinite(y) for y in values)
            lasts = [[y for _, y in line.points if math.isfinite(y)][-1:] for line in series]
            legend = [(colour, number(last[0])) for colour, last in enumerate(lasts) if last]
            svg = line_chart(series, f"{name}: {about}", *options)
            figures[section].append(figure(name, about, svg, legend, f"{bad} not finite, left out" if bad else ""))
    return figures, left_out


def stacks(families: list[Family], prefix: str, title: str, about: str) -> list[str]:
    """One chart of stacked shares per family, of all metrics with this prefix."""
    figures = []
    for family in families[:COLOURS]:
        keys = sorted({key for row in family.rows for key in row if key.startswith(prefix)})
        steps = sorted({row["step"] for row in family.rows if "gen/valid_rate" in row})
        if steps and any(row.get(key) for row in family.rows for key in keys):
            lines = {key.removeprefix(prefix): dict(family.series(key).points) for key in keys}
            shares = [Series(name, [(step, line.get(step, 0.0)) for step in steps]) for name, line in lines.items()]
            which = f": {family.name}" if len(families) > 1 else ""
            figures.append(figure(title, about + which, stacked_chart(shares, title), list(enumerate(lines))))
    return figures


def histograms(families: list[Family]) -> list[str]:
    """How many predictions of a mask were right, over the steps; one chart per family."""
    figures = []
    for colour, family in enumerate(families[:COLOURS]):
        columns: dict[int, list] = {}
        for row in family.rows:
            if any(row.get("pred/accuracy_histogram") or []):
                columns.setdefault(row["step"], []).append(row["pred/accuracy_histogram"])
        if columns:
            merged = [(step, [sum(cells) for cells in zip(*columns[step], strict=True)]) for step in sorted(columns)]
            about = "right answers to a mask; the stronger, the more masks"
            about += f": {family.name}" if len(families) > 1 else ""
            figures.append(figure("How hard the masks are", about, heat_chart(merged, about, colour)))
    return figures


def reward_chart(families: list[Family]) -> list[str]:
    """The mean reward of a step's valid masks against their accuracy, and its expectation at equal difficulty."""
    series, expected, grid = [], {}, [n / 60 for n in range(61)]
    for family in families:
        points = []
        for run in family.runs:
            rows = [row for row in run.rows if row.get("gen/valid_rate") and row.get("gen/responses")]
            points += [(row["pred/accuracy"], row["gen/reward"] / row["gen/valid_rate"]) for row in rows]
            g = run.config.get("predictions_per_mask", 8)
            if rows and run.config.get("generator_reward") == "variance":
                expected[f"p (1-p) (1-1/G), G = {g}"] = [(p, p * (1 - p) * (1 - 1 / g)) for p in grid]
            elif rows:
                expected[f"(1-p) - (1-p)^G, G = {g}"] = [(p, (1 - p) - (1 - p) ** g) for p in grid]
        series.append(Series(family.name, points))
    if not expected:
        return []
    about = f"mean of a step's valid masks, later steps stronger. Dashed: {', '.join(expected)}, "
    about += "if all masks were equally hard; otherwise less"
    svg = point_chart(series, [Series(*item) for item in expected.items()], about, "accuracy")
    legend = [(colour, line.name) for colour, line in enumerate(series) if line.points and len(series) > 1]
    return [figure("What masks earn", about, svg, legend)]
