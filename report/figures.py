"""What a report shows: from the rows of runs to titled charts.

A chart per metric, all runs in it, each with a few words on how to read it. A metric that the runs do not have, or that
is 0 throughout, is left out and named. Another metric is one more line of SECTIONS. Leaves out reading and the page
(report/), and drawing (report/charts.py). Needs no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import fmean, median

from report.charts import COLOURS, Series, bar_chart, heat_chart, line_chart, number, point_chart, stacked_chart

SHARE = (0.0, 1.0)
LABELS = ("fact", "template", "copy", "noise")
PHASES = "propose predict reward update refresh probe save".split()
OF_RESPONSES = ("reward", "groups_kept", "length_mean", "truncated", "tokens_after_answer")
# key, title, what it says, fixed range, logarithmic. Keys that a run lacks, or that are 0 throughout, are left out.
SECTIONS = {
    "Held-out passages": [
        ("probe/accuracy", "Right answers", "sampled, with a thought; the same masks at every probe", SHARE),
        ("probe/accuracy_greedy", "Right answers, greedy", "the likeliest token each time", SHARE),
        ("probe/accuracy_no_thought", "Right answers, no thought", "sampled; the answer is opened at once", SHARE),
        ("probe/accuracy_greedy_no_thought", "Right, greedy, no thought", "does the thought help at all?", SHARE),
        *((f"probe/accuracy_{kind}", f"Right answers: {kind}", f"masks on {kind} words", SHARE) for kind in LABELS),
        *((f"probe/accuracy_greedy_{kind}", f"Right, greedy: {kind}", f"on {kind} words", SHARE) for kind in LABELS),
        ("probe/valid_rate", "Responses with an answer", "share with a closed box", SHARE),
        ("probe/perplexity", "Perplexity of plain text", "rises: the model forgets text"),
    ],
    "Benchmarks": [],  # whatever eval/... there is
    "What is masked": [
        ("gen/valid_rate", "Valid masks", "share of its responses", SHARE),
        ("gen/distinct", "Different masks per passage", "1: it always chooses the same"),
        ("gen/span_words", "Words in a mask", "mean, valid masks"),
        ("gen/occurrences", "Occurrences of the words", "mean, in their passage"),
    ],
    "Rewards": [
        ("gen/reward", "Reward of masks", "1 - accuracy, 0 if none is right or the mask is invalid", SHARE),
        ("pred/accuracy", "Right predictions", "of the masks of the step; the generator moves it", SHARE),
        ("pred/accuracy_zero", "Masks that nobody solves", "they teach nothing", SHARE),
        ("pred/accuracy_one", "Masks that all solve", "they teach nothing", SHARE),
        ("gen/groups_kept", "Passages that teach the generator", "their masks earned unequally", SHARE),
        ("pred/groups_kept", "Masks that teach the predictor", "some answers right, some wrong", SHARE),
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
        ("clip_fraction", "Clipped tokens", "share", None),
        ("lr", "Learning rate", "of the step"),
        ("trained_tokens", "Tokens trained on", "per step"),
        ("time/step", "Seconds a step", "without the save"),
        ("tokens_per_second", "Tokens sampled a second", "over the whole step"),
        ("peak_memory_gb", "Largest memory of rank 0", "GB; on a GPU of the update"),
    ],
}  # fmt: skip


@dataclass
class Run:
    """What is read of one run directory."""

    folder: Path
    config: dict
    rows: list[dict]
    entries: list[list[dict]] = field(default_factory=list)
    """Evenly spaced passages of samples.jsonl, each with the rows of its masks."""
    chosen: list[tuple[int, int, float]] = field(default_factory=list)
    """(step, words, place in the passage from 0 to 1) of every valid mask in samples.jsonl."""
    fixed: list[dict] = field(default_factory=list)
    """Rows of one passage at several steps: probes.jsonl, else the passage that recurs most in samples.jsonl."""

    def values(self, key: str) -> list[tuple[float, float]]:
        """(step, value) where the run has this metric; a role's rewards and lengths only where it said anything."""
        role, _, name = key.partition("/")
        silent = f"{role}/responses" if name in OF_RESPONSES else ""
        rows = [row for row in self.rows if row.get(silent, 1)]
        return [(row["step"], float(row[key])) for row in rows if isinstance(row.get(key), int | float)]


@dataclass
class Family:
    """Runs that differ only in their seed."""

    name: str
    runs: list[Run]

    def series(self, key: str) -> Series:
        """The mean over the runs at each step, and from the second run on the lowest and the highest."""
        steps: dict[float, list[float]] = {}
        for run in self.runs:
            for step, value in run.values(key):
                steps.setdefault(step, []).append(value)
        points, band = [], []
        for step in sorted(steps):
            values = [value for value in steps[step] if math.isfinite(value)]
            points.append((step, fmean(values) if values else math.nan))
            band.append((step, min(values, default=math.nan), max(values, default=math.nan)))
        return Series(self.name, points, band if len(self.runs) > 1 else [])


def figure(title: str, about: str, svg: str, key: list[tuple[int, str]] | None = None, note: str = "") -> str:
    """key: (colour, text) of what is in it."""
    legend = "".join(f'<span class="key"><i class="c{c % COLOURS}"></i>{escape(t)}</span>' for c, t in key or [])
    note = f'<span class="warn">{escape(note)}</span>' if note else ""
    return (
        f"<figure><figcaption><b>{escape(title)}</b>{escape(about)}<div>{legend}{note}</div></figcaption>{svg}</figure>"
    )


def curves(section: str, families: list[Family]) -> tuple[list[str], list[str]]:
    """The section's charts, and the keys that were left out."""
    figures, left_out = [], []
    rows = [row for family in families for run in family.runs for row in run.rows]
    names = sorted({key.removeprefix("eval/") for row in rows for key in row if key.startswith("eval/")})
    benchmarks = [(f"eval/{name}", name, "share right", SHARE) for name in names]
    for key, title, about, *how in SECTIONS[section] or benchmarks:
        series = [family.series(key) for family in families]
        values = [y for one in series for _, y in one.points]
        finite = [value for value in values if math.isfinite(value)]
        if not any(finite) and len(finite) == len(values):
            left_out.append(key)
            continue
        lasts = [[y for _, y in one.points if math.isfinite(y)][-1:] for one in series]
        legend = [(at, number(last[0])) for at, last in enumerate(lasts) if last]
        bad = sum(not math.isfinite(y) for family in families for run in family.runs for _, y in run.values(key))
        svg = line_chart(series, f"{title}: {about}", *how)
        figures.append(figure(title, about, svg, legend, f"{bad} not finite, left out" if bad else ""))
    return figures, left_out


def stacks(families: list[Family], prefix: str, title: str, about: str) -> list[str]:
    """One chart of stacked shares per family, of all metrics with this prefix."""
    figures = []
    for family in families[:COLOURS]:
        rows = [row for run in family.runs for row in run.rows]
        keys = sorted({key for row in rows for key in row if key.startswith(prefix)})
        order = [prefix + kind for kind in LABELS]
        keys.sort(key=lambda key: order.index(key) if key in order else len(order))
        steps = sorted({row["step"] for row in rows if "gen/valid_rate" in row})
        if not keys or not any(row.get(key) for row in rows for key in keys):
            continue
        found = [dict(family.series(key).points) for key in keys]
        parts = [Series(key.removeprefix(prefix), [(step, one.get(step, 0.0)) for step in steps])
                 for key, one in zip(keys, found, strict=True)]  # fmt: skip
        text = f"{about}{': ' + family.name if len(families) > 1 else ''}"
        figures.append(figure(title, text, stacked_chart(parts, title), [(n, p.name) for n, p in enumerate(parts)]))
    return figures


def histograms(families: list[Family]) -> list[str]:
    """How many predictions of a mask were right, over the steps."""
    figures = []
    for at, family in enumerate(families[:COLOURS]):
        columns: dict[int, list] = {}
        for run in family.runs:
            for row in run.rows:
                if counts := row.get("pred/accuracy_histogram"):
                    columns.setdefault(row["step"], []).append(counts)
        if any(any(counts) for parts in columns.values() for counts in parts):
            merged = [(step, [sum(cells) for cells in zip(*columns[step], strict=True)]) for step in sorted(columns)]
            about = "right answers to a mask; the stronger, the more masks" + f": {family.name}" * (len(families) > 1)
            figures.append(figure("How hard the masks are", about, heat_chart(merged, about, at % COLOURS)))
    return figures


def reward_chart(families: list[Family]) -> list[str]:
    """The generator's mean reward of a step's valid masks against their accuracy, with the law of a fixed chance."""
    series, laws = [], {}
    for family in families:
        points = []
        for run in family.runs:
            rows = [row for row in run.rows if row.get("gen/valid_rate") and row.get("gen/responses")]
            points += [(row["pred/accuracy"], row["gen/reward"] / row["gen/valid_rate"]) for row in rows]
            if rows:
                size = run.config.get("predictions_per_mask", 8)
                laws[size, run.config.get("generator_reward", "one_minus_accuracy")] = size
        series.append(Series(family.name, points))
    if not laws:
        return []
    grid, lines = [n / 60 for n in range(61)], []
    for size, kind in laws:
        if kind == "variance":
            lines.append(Series("p (1-p) (1-1/G)", [(p, p * (1 - p) * (1 - 1 / size)) for p in grid]))
        else:
            lines.append(Series("(1-p) - (1-p)^G", [(p, (1 - p) - (1 - p) ** size) for p in grid]))
    names = ", ".join(f"{line.name}, G = {size}" for line, (size, _) in zip(lines, laws, strict=True))
    about = f"mean of a step's valid masks, later steps stronger. Dashed: {names}, if all were equally hard; else less"
    svg = point_chart(series, lines, about, "accuracy")
    legend = [(at, one.name) for at, one in enumerate(series) if one.points]
    return [figure("What masks earn", about, svg, legend if len(families) > 1 else None)]


def choice_charts(families: list[Family]) -> list[str]:
    """Lengths and places of the masks in samples.jsonl, the first third of the steps against the last."""
    figures = []
    for family in families[:COLOURS]:
        chosen = [one for run in family.runs for one in run.chosen]
        last = max((step for step, *_ in chosen), default=0)
        parts = [[one for one in chosen if one[0] <= last / 3], [one for one in chosen if one[0] > last * 2 / 3]]
        if not all(parts):
            continue
        name = f": {family.name}" * (len(families) > 1)
        key = [(n, f"{when} third of the steps, {len(part)} masks") for n, (when, part) in
               enumerate(zip(("first", "last"), parts, strict=True))]  # fmt: skip
        longest = min(10, max(words for _, words, _ in chosen))
        sizes = [str(n) for n in range(1, longest)] + [f"{longest}" + "+" * (longest == 10)]
        binned = (
            ("Words in a mask", sizes, "words", lambda one, most=longest: min(one[1], most) - 1),
            (
                "Where in the passage",
                [f"{10 * n}%" for n in range(10)],
                "from the start",
                lambda one: min(9, int(one[2] * 10)),
            ),
        )
        for title, names, unit, place in binned:
            series = []
            for (_, text), part in zip(key, parts, strict=True):
                counts = Counter(map(place, part))
                series.append(Series(text, [(n, counts[n] / len(part)) for n in range(len(names))]))
            svg = bar_chart(names, series, f"{title}{name}", unit)
            figures.append(figure(title, f"share of the valid masks in samples.jsonl{name}", svg, key))
    return figures


def phase_chart(families: list[Family]) -> list[str]:
    """Median seconds of each phase."""
    series = []
    for family in families:
        seconds = [[y for run in family.runs for x, y in run.values(f"time/{name}") if x > 0] for name in PHASES]
        finite = [(n, [y for y in one if math.isfinite(y)]) for n, one in enumerate(seconds)]
        series.append(Series(family.name, [(n, median(one)) for n, one in finite if one]))
    if not any(one.points for one in series):
        return []
    key = [(at, one.name) for at, one in enumerate(series)] if len(series) > 1 else None
    svg = bar_chart(PHASES, series, "seconds per phase", "")
    return [figure("Seconds by phase", "median; probe and save are not made at every step", svg, key)]
