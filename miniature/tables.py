"""What came of the experiments: tables and plots from miniature/runs.jsonl, and their places in README.md.

    python -m miniature figures

README.md holds each table between two markers, <!-- NAME --> and <!-- /NAME -->; a marker that is missing is an error.
The plots are assets/figures/*.svg. Both are functions of the record alone, and a test compares the files with it.
Intervals are Student's t over seeds; bands in plots are the lowest and the highest seed. Leaves out predictions
(miniature/claims.py), the runs (miniature/runs.py), and sentences: those in README.md are written by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape
from pathlib import Path
from statistics import fmean, stdev

from metrics import read_rows, write_whole
from miniature.claims import ARMS, CLAIMS, FIRST, Results, final, gain, late, late_accuracy, mean_of, over
from report.charts import Series, line_chart, stand_alone

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "miniature" / "runs.jsonl"
FIGURES = Path("assets") / "figures"
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""97.5 % quantile of Student's t for so many values (one degree of freedom less)."""
TWO_FACTS = ("active, two facts", "active, two facts, 200 steps", "cpt, two facts")
RLVR = ("rlvr", *FIRST)


def load_results(record: Path) -> Results:
    """Runs by arm, in the order of ARMS and of seeds; of two lines for one run the later.

    Raises ValueError where there is no run at all, or one of an arm that miniature/claims.py does not know.
    """
    rows = {(row["arm"], row["seed"]): row for row in read_rows(record)}
    if not rows:
        raise ValueError(f"{record}: no runs; `python -m miniature run` makes them")
    if unknown := sorted({arm for arm, _ in rows} - set(ARMS)):
        raise ValueError(f"{record}: unknown arm {unknown[0]!r}; claims.ARMS has {', '.join(ARMS)}")
    results = {arm: [rows[key] for key in sorted(rows) if key[0] == arm] for arm in ARMS}
    return {arm: runs for arm, runs in results.items() if runs}


# -------------------------------------------------------------------------------------------------------------- tables


def interval(values: list[float]) -> str:
    """Mean and 95 % interval by Student's t over seeds; the mean alone of one value, or of more than ten.

    >>> interval([0.5, 0.7]), interval([0.1, 0.2, 0.3]), interval([0.25])
    ('0.60 ± 1.27', '0.20 ± 0.25', '0.25')
    """
    if len(values) not in STUDENT:
        return f"{fmean(values):.2f}"
    return f"{fmean(values):.2f} ± {STUDENT[len(values)] * stdev(values) / math.sqrt(len(values)):.2f}"


def extremes(values: list[float]) -> str:
    """Lowest and highest.

    >>> extremes([-0.001, 0.25])
    '0.00, 0.25'
    """
    return f"{round(min(values), 2) + 0.0:.2f}, {round(max(values), 2) + 0.0:.2f}"  # + 0.0: no minus before a zero


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows))


def methods_table(results: Results) -> str:
    """The arms on the mini-wiki as it stands."""
    keys = ("fact", "greedy_fact", "template", "copy", "greedy_copy")
    results = {arm: runs for arm, runs in results.items() if arm not in (*TWO_FACTS, *RLVR)}
    start = [run["probes"][0] for runs in results.values() for run in runs]
    rows = [["start", *(f"{fmean(one[key] for one in start):.2f}" for key in keys), "", "", "", "", ""]]
    for arm, runs in results.items():
        shares = [late(run, "gen/share_fact") for run in runs]
        spent = [mean_of(runs, total, key) for key in ("pred/responses", "trained_tokens", "flops")]
        cells = [interval([final(run, key) for run in runs]) for key in keys]
        cells.append(f"{fmean(shares):.2f}" if any(shares) else "")
        cells += [f"{spent[0] / 1000:.1f}k" if spent[0] else "none", f"{spent[1] / 1000:.1f}k", f"{spent[2]:.1e}"]
        rows.append([arm, *cells, str(len(runs))])
    heads = ["facts, sampled", "facts, greedy", "template", "copies, sampled", "copies, greedy", "masks on a fact"]
    return table(["method", *heads, "predictions", "tokens trained", "FLOPs", "seeds"], rows)


def total(run: dict, key: str) -> float:
    return run["totals"][key]


def differences_table(results: Results) -> str:
    """Seed by seed: the pairs that the claims speak of."""
    pairs = [("fact", other) for other in ("random_span", "frozen generator", "sft", "active, 1 of 4 masks random")]
    pairs += [("greedy_fact", "sft"), ("copy", "active, 1 of 4 masks random")]
    rows = []
    for probe, other in pairs:
        if other in results and "active" in results and (values := over(results, "active", other, probe)):
            what = {"fact": "facts, sampled", "greedy_fact": "facts, greedy", "copy": "copies, sampled"}[probe]
            rows.append([f"active - {other}", what, interval(values), extremes(values)])
    return table(["difference", "in", "mean, 95 % interval", "lowest, highest seed"], rows)


def difficulty_table(results: Results) -> str:
    rows = []
    for size, arm in ((4, "active, G = 4"), (8, "active"), (16, "active, G = 16")):
        if arm in results:
            each = [late_accuracy([run]) for run in results[arm]]
            best = f"{1 - size ** (-1 / (size - 1)):.2f}"
            rows.append([str(size), best, interval(each), extremes(each)])
    return table(["G", "best-paid accuracy", "accuracy of masks, steps 41 to 100", "lowest, highest seed"], rows)


def claims_table(results: Results) -> str:
    """Every claim whose arms have runs. Seeds: of the arm with the fewest."""
    rows = []
    for name, claim in CLAIMS.items():
        if all(arm in results for arm in claim.arms):
            seeds = str(min(len(results[arm]) for arm in claim.arms))
            names = (name, "yes") if claim.test(results) else (f"**{name}**", "**failed**")
            rows.append([names[0], claim.prediction, seeds, names[1]])
    return table(["claim", "predicted before the runs", "seeds", "held"], rows)


def never_masked_table(results: Results) -> str:
    """Greedy and sampled accuracy at the start and the end, by what a run could do with a fact."""
    sorts = {"fact": "may be masked", "shown": "read, never masked", "unseen": "never read"}
    rows = []
    for arm in [arm for arm in TWO_FACTS if arm in results]:
        for key, told in sorts.items():
            runs = results[arm]
            starts = [f"{mean_of(runs, first_probe, probe):.2f}" for probe in (f"greedy_{key}", key)]
            ends = [interval([final(run, probe) for run in runs]) for probe in (f"greedy_{key}", key)]
            gains = [gain(run, f"greedy_{key}") for run in runs]
            rows.append([arm, told, starts[0], ends[0], interval(gains), extremes(gains), starts[1], ends[1]])
    heads = ["greedy, step 0", "greedy, last step", "gain of greedy", "its lowest, highest seed"]
    return table(["method", "facts", *heads, "sampled, step 0", "sampled, last step"], rows)


def first_probe(run: dict, probe: str) -> float:
    return run["probes"][0][probe]


def rlvr_table(results: Results) -> str:
    rows = []
    for arm in [arm for arm in RLVR if arm in results]:
        runs = results[arm]
        cells = [f"{mean_of(runs, first_probe, 'greedy'):.2f}", interval([final(run, "greedy") for run in runs])]
        cells += [f"{mean_of(runs, first_probe, 'all'):.2f}", interval([final(run, "all") for run in runs])]
        cells.append(interval([late(run, "pred/accuracy") for run in runs]))
        rows.append([arm, *cells, str(len(runs))])
    heads = ["held out, greedy, step 0", "step 60", "held out, sampled, step 0", "step 60", "trained on, late"]
    return table(["method", *heads, "seeds"], rows)


def thought_table(results: Results) -> str:
    """At the end of each run, over all its probe masks."""
    rows = []
    for arm, runs in results.items():
        if all("greedy_no_thought" in run["probes"][-1] for run in runs):
            keys = ("greedy", "greedy_no_thought", "all", "no_thought")
            rows.append([arm, *(interval([final(run, key) for run in runs]) for key in keys)])
    heads = ["greedy", "greedy, answer opened at once", "sampled", "sampled, answer opened at once"]
    return table(["method", *heads], rows)


TABLES: dict[str, Callable[[Results], str]] = {
    "claims": claims_table,
    "methods": methods_table,
    "differences": differences_table,
    "difficulty": difficulty_table,
    "never masked": never_masked_table,
    "rlvr": rlvr_table,
    "thought": thought_table,
}


# --------------------------------------------------------------------------------------------------------------- plots


def band(name: str, rows: list[list[tuple[float, float]]]) -> Series:
    """(step, value) of each seed -> their mean, with the lowest and the highest."""
    together = [(seeds[0][0], [value for _, value in seeds]) for seeds in zip(*rows, strict=True)]
    points = [(step, fmean(values)) for step, values in together]
    return Series(name, points, [(step, min(values), max(values)) for step, values in together])


def probed(results: Results, arm: str, probe: str, name: str = "") -> Series:
    return band(name or arm, [[(row["step"], row[probe]) for row in run["probes"]] for run in results[arm]])


def trained(results: Results, arm: str, curve: str, name: str = "") -> Series:
    """A curve of means over five steps, each at the middle one."""
    return band(name or arm, [[(5 * n + 3, y) for n, y in enumerate(run["curves"][curve])] for run in results[arm]])


def draw_plots(results: Results) -> dict[str, tuple[str, str]]:
    """File name -> (its alt text, its SVG). A plot whose arms have no runs yet is left out."""
    mask_share = "share of valid masks, means of five steps"
    made = (
        ("facts", "Facts on held-out articles, sampled", "share right; band: lowest and highest seed", [
            (probed, arm, "fact") for arm in ("active", "sft", "random_span", "frozen generator", "rewards shuffled")
        ]),
        ("masks", "What the generator masks", mask_share, [
            (trained, "active", "gen/share_fact", "active: facts"),
            (trained, "active", "gen/share_noise", "active: noise"),
            (trained, "frozen generator", "gen/share_fact", "frozen generator: facts"),
        ]),
        ("copies", "Copies of the subject, sampled", "share right, from 0.5; what active forgets", [
            (probed, arm, "copy") for arm in ("active", "active, 1 of 4 masks random", "random_span")
        ]),
        ("difficulty", "Accuracy of the masks, by predictions a mask", "share right, means of five steps", [
            (trained, arm, "pred/accuracy", name)
            for arm, name in (("active, G = 4", "G = 4"), ("active", "G = 8"), ("active, G = 16", "G = 16"))
        ]),
        ("never-masked", "Facts that a run cannot mask, greedy", "share right, two facts an article", [
            (probed, "active, two facts, 200 steps", "greedy_fact", "active: may be masked"),
            (probed, "active, two facts, 200 steps", "greedy_shown", "active: read, never masked"),
            (probed, "active, two facts, 200 steps", "greedy_unseen", "active: never read"),
            (probed, "cpt, two facts", "greedy_shown", "cpt: read"),
        ]),
        ("rlvr", "RLVR: held-out subjects, greedy", "share right over 60 steps of RLVR", [
            (probed, arm, "greedy") for arm in RLVR
        ]),
    )  # fmt: skip
    plots = {}
    for file, title, about, lines in made:
        if all(arm in results for _, arm, *_ in lines):
            series = [make(results, *how) for make, *how in lines]
            svg = line_chart(series, f"{title}: {about}", (0.5, 1.0) if file == "copies" else (0.0, 1.0))
            told = ", ".join(f"{one.name} ends at {one.points[-1][1]:.2f}" for one in series)
            plots[f"{file}.svg"] = (f"{title}: {told}", stand_alone(svg, title, about, [one.name for one in series]))
    return plots


# --------------------------------------------------------------------------------------------------------- the README


def blocks(results: Results) -> dict[str, str]:
    """What stands between each pair of markers."""
    found = {name: make(results) for name, make in TABLES.items()}
    images = [
        f'<img src="{(FIGURES / file).as_posix()}" width="49%" alt="{escape(alt)}">'
        for file, (alt, _) in draw_plots(results).items()
    ]
    return found | {"plots": "\n".join(images)}


def fill(text: str, found: dict[str, str]) -> str:
    """The text with each block between its markers. Raises ValueError where a marker does not stand exactly once."""
    for name, block in found.items():
        marks = f"<!-- {name} -->", f"<!-- /{name} -->"
        places = [text.find(mark) for mark in marks]
        if [text.count(mark) for mark in marks] != [1, 1] or places[0] > places[1]:
            raise ValueError(f"README.md: {marks[0]} and {marks[1]} must each stand once, in this order")
        text = f"{text[: places[0]]}{marks[0]}\n\n{block}\n\n{text[places[1] :]}"
    return text


def write_readme(root: Path = ROOT, record: Path = RECORD) -> list[Path]:
    """README.md and the plots from the record. Returns what was written. Nothing is, if a marker is missing."""
    results = load_results(record)
    text = fill((root / "README.md").read_text(encoding="utf-8"), blocks(results))
    (root / FIGURES).mkdir(parents=True, exist_ok=True)
    written = [root / "README.md"]
    write_whole(root / "README.md", text)
    for file, (_, svg) in draw_plots(results).items():
        written.append(root / FIGURES / file)
        write_whole(root / FIGURES / file, svg)
    return written


def printed(results: Results) -> str:
    """All tables, for the terminal."""
    return "\n\n".join(make(results) for make in TABLES.values())
