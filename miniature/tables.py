"""What came of the experiments: tables and plots from miniature/runs.jsonl, and their places in README.md and docs/.

    python -m miniature figures

A page holds a block between two lines, <!-- NAME --> and <!-- /NAME -->. A block may stand on any page; each stands
exactly once. Tables, plots and assets/figures/*.svg are functions of the record alone. Intervals are Student's t over
seeds; bands in plots are the lowest and the highest seed. The sentences around the blocks are written by hand.
"""

import math
import re
from html import escape
from pathlib import Path
from statistics import fmean, stdev

from metrics import read_rows, write_whole
from miniature.claims import ARMS, CLAIMS, LENGTH, STARTS_FROM, Results, climb, differences, ends, gains, late
from miniature.real import load_real, real_claims, real_table, transfer_table
from report.charts import Series, line_chart, stand_alone

PROJECT = Path(__file__).resolve().parent.parent
RECORD = PROJECT / "miniature" / "runs.jsonl"
PLOTS = "assets/figures"
# 97.5 % quantile of Student's t for so many values (one degree of freedom less)
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
SEVERAL_ARMS = ("active, two facts", "active, two facts, 200 steps", "cpt, two facts")
RLVR_ARMS = ("rlvr", *STARTS_FROM)
LADDER_ARMS = tuple(arm for arm in ARMS if arm.startswith("ladder"))
HAND_WRITTEN = ("first run", "patches", "/patches")  # markers of a page around text that is not from the record


def load_results(record: Path) -> Results:
    """Runs by arm, in the order of ARMS and of seeds; of two lines for one run the later. ValueError without runs."""
    rows = {(row["arm"], row["seed"]): row for row in read_rows(record)}
    if not rows:
        raise ValueError(f"{record}: no runs; `python -m miniature run` makes them")
    if unknown := sorted({arm for arm, _ in rows} - set(ARMS)):
        raise ValueError(f"{record}: unknown arm {unknown[0]!r}; claims.ARMS has {', '.join(ARMS)}")
    results = {arm: [rows[key] for key in sorted(rows) if key[0] == arm] for arm in ARMS}
    return {arm: runs for arm, runs in results.items() if runs}


def interval(values: list[float]) -> str:
    """Mean and 95 % interval by Student's t over seeds; the mean alone of one value, or of more than ten."""
    t = STUDENT.get(len(values))
    return f"{fmean(values):.2f}" + (f" ± {t * stdev(values) / math.sqrt(len(values)):.2f}" if t else "")


def lowest_highest(values: list[float]) -> str:
    return f"{round(min(values), 2) + 0.0:.2f}, {round(max(values), 2) + 0.0:.2f}"  # + 0.0: no minus before a zero


def start_end(runs: list[dict], probe: str) -> list[str]:
    return [f"{fmean(run['probes'][0][probe] for run in runs):.2f}", interval(ends(runs, probe))]


def make_tables(results: Results) -> dict[str, str]:
    """Name of a block -> its table. A row whose arms have no runs is left out."""
    claims = [["claim", "seeds", "held"]]
    for name, claim in CLAIMS.items():
        if all(arm in results for arm in claim.arms):
            name, verdict = (name, "yes") if claim.holds(results) else (f"**{name}**", "**failed**")
            claims.append([name, str(min(len(results[arm]) for arm in claim.arms)), verdict])

    names = {"fact": "facts, sampled", "greedy_fact": "facts, greedy", "template": "template"}
    names |= {"copy": "copies, sampled", "greedy_copy": "copies, greedy"}
    wiki = {arm: runs for arm, runs in results.items() if arm not in (*SEVERAL_ARMS, *RLVR_ARMS, *LADDER_ARMS)}
    methods = [["method", *names.values(), "masks on a fact", "predictions", "tokens trained", "FLOPs", "seeds"]]
    if runs := sum(wiki.values(), []):
        methods.append(["start", *(start_end(runs, probe)[0] for probe in names), *[""] * 5])
    for arm, runs in wiki.items():
        shares, totals = late(runs, "gen/share_fact"), ("pred/responses", "trained_tokens", "flops")
        predictions, tokens, flops = (fmean(run["totals"][total] for run in runs) for total in totals)
        cells = [*(interval(ends(runs, probe)) for probe in names), f"{fmean(shares):.2f}" if any(shares) else ""]
        cells += [f"{predictions / 1000:.1f}k" if predictions else "none", f"{tokens / 1000:.1f}k", f"{flops:.1e}"]
        methods.append([arm, *cells, str(len(runs))])

    pairs = [["difference", "in", "mean, 95 % interval", "lowest, highest seed"]]
    others = [("fact", arm) for arm in ("random_span", "frozen generator", "sft", "active, 1 of 4 masks random")]
    for probe, arm in [*others, ("greedy_fact", "sft"), ("copy", "active, 1 of 4 masks random")]:
        if values := differences(results.get("active", []), results.get(arm, []), probe):
            pairs.append([f"active - {arm}", names[probe], interval(values), lowest_highest(values)])

    difficulty = [["G", "best-paid accuracy", "accuracy of masks, steps 41 to 100"]]
    for size, arm in ((4, "active, G = 4"), (8, "active"), (16, "active, G = 16")):
        if arm in results:
            values, best = late(results[arm], "pred/accuracy", 8), 1 - size ** (-1 / (size - 1))
            difficulty.append([str(size), f"{best:.2f}", interval(values)])

    several = [["method", "facts", "greedy, step 0", "greedy, last step", "gain of greedy", "its lowest, highest seed",
                "sampled, last step"]]  # fmt: skip
    for arm in [arm for arm in SEVERAL_ARMS if arm in results]:
        for label, name in {"fact": "may be masked", "shown": "read, never masked", "unseen": "never read"}.items():
            runs, values = results[arm], gains(results[arm], f"greedy_{label}")
            row = [arm, name, *start_end(runs, f"greedy_{label}"), interval(values), lowest_highest(values)]
            several.append([*row, start_end(runs, label)[1]])

    rlvr = [["method", "held out, greedy, step 0", "step 60", "held out, sampled, step 0", "step 60",
             "trained on, late", "seeds"]]  # fmt: skip
    for arm in [arm for arm in RLVR_ARMS if arm in results]:
        runs = results[arm]
        row = [arm, *start_end(runs, "greedy"), *start_end(runs, "all"), interval(late(runs, "pred/accuracy"))]
        rlvr.append([*row, str(len(runs))])

    ladder = [["method", "three steps", "four", "four, at once", "thought use", "length, first and last",
               "masks on two to four", "tokens sampled, trained"]]  # fmt: skip
    for arm in [arm for arm in LADDER_ARMS if arm in results]:
        runs = results[arm]
        used = [run["probes"][-1].get("thought_use", 0.0) for run in runs]
        lengths = [fmean(run["curves"][LENGTH][0] for run in runs), fmean(late(runs, LENGTH))]
        means = [fmean(ends(runs, "hop3")), interval(ends(runs, "hop4"))]
        means += [fmean(ends(runs, "no_thought_hop4")), fmean(used)]
        shown = [one if isinstance(one, str) else f"{one:.2f}" for one in means]
        shown += [" ".join(f"{one:.1f}" for one in lengths), f"{fmean(climb(runs, -4, None)):.2f}"]
        sampled, trained = (fmean(run["totals"][key] for run in runs) for key in ("response_tokens", "trained_tokens"))
        asked = any(run["totals"]["pred/responses"] for run in runs)
        shown.append(f"{f'{sampled / 1000:.0f}k' if asked else 'none'} {trained / 1000:.0f}k")
        ladder.append([arm.removeprefix("ladder: "), *shown])

    tables = {"claims": claims, "methods": methods, "differences": pairs, "difficulty": difficulty}
    tables |= {"never masked": several, "rlvr": rlvr, "ladder": ladder}
    return {name: markdown(table) for name, table in tables.items()}


def markdown(table: list[list[str]]) -> str:
    """Rows of cells, the heads first."""
    rows = (table[0], ["---"] * len(table[0]), *table[1:])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def series(results: Results, arm: str, key: str, name: str = "") -> Series:
    """The mean over seeds, with a band. A key with a slash is a curve; its means of five steps stand at the middle."""
    runs = results[arm]
    if "/" in key:
        curves = zip(*(run["curves"][key] for run in runs), strict=True)
        points = [(5 * n + 3, values) for n, values in enumerate(curves)]
    else:
        steps = sorted(set.intersection(*({row["step"] for row in run["probes"]} for run in runs)))
        rows = {step: [row for run in runs for row in run["probes"] if row["step"] == step] for step in steps}
        points = [(step, [row[key] for row in rows[step]]) for step in steps]
    means = [(step, fmean(values)) for step, values in points]
    return Series(name or arm, means, [(step, min(values), max(values)) for step, values in points])


def draw_plots(results: Results) -> dict[str, tuple[str, str]]:
    """File name -> (its alt text, its SVG). A plot whose arms have no runs yet is left out."""
    longer = "active, two facts, 200 steps"
    plots = (
        ("facts", "Facts on held-out articles, sampled", "share right; band: lowest and highest seed",
         [(arm, "fact") for arm in ("active", "sft", "random_span", "frozen generator", "rewards shuffled")]),
        ("masks", "What the generator masks", "share of valid masks, means of five steps",
         [("active", "gen/share_fact", "active: facts"), ("active", "gen/share_noise", "active: noise"),
          ("frozen generator", "gen/share_fact", "frozen generator: facts")]),
        ("copies", "Copies of the subject, sampled", "share right, from 0.5; what active forgets",
         [(arm, "copy") for arm in ("active", "active, 1 of 4 masks random", "random_span")]),
        ("difficulty", "Accuracy of the masks, by predictions a mask", "share right, means of five steps",
         [("active, G = 4", "pred/accuracy", "G = 4"), ("active", "pred/accuracy", "G = 8"),
          ("active, G = 16", "pred/accuracy", "G = 16")]),
        ("never-masked", "Facts that a run cannot mask, greedy", "share right, two facts an article",
         [(longer, "greedy_fact", "active: may be masked"), (longer, "greedy_shown", "active: read, never masked"),
          (longer, "greedy_unseen", "active: never read"), ("cpt, two facts", "greedy_shown", "cpt: read")]),
        ("rlvr", "RLVR: held-out subjects, greedy", "share right over 60 steps of RLVR",
         [(arm, "greedy") for arm in RLVR_ARMS]),
        ("ladder", "The ladder: facts of four steps that nothing trains", "share right, sampled",
         [("ladder: active", "hop4", "active"), ("ladder: active", "no_thought_hop4", "active, at once"),
          ("ladder: random_span", "hop4", "random_span"), ("ladder: sft, bare answers", "hop4", "sft")]),
        ("ladder-masks", "The ladder: what the generator masks", "share of valid masks, means of five steps",
         [("ladder: active", f"gen/share_hop{n}", f"{n} step{'s' * (n > 1)}") for n in (1, 2, 3, 4)]),
        ("real", "Real text", "share right by step, active",
         [("active, real text", "pred/accuracy", "own masks"), ("active, real text", "all", "held out")]),
    )  # fmt: skip
    drawn = {}
    for file, title, about, curves in plots:
        if all(arm in results for arm, *_ in curves):
            lines = [series(results, *curve) for curve in curves]
            svg = line_chart(lines, f"{title}: {about}", (0.5, 1.0) if file == "copies" else (0.0, 1.0))
            drawn[f"{file}.svg"] = (title, stand_alone(svg, title, about, [line.name for line in lines]))
    return drawn


def fill_blocks(pages: dict[str, str], blocks: dict[str, str]) -> dict[str, str]:
    """{path: text} of pages -> those that hold a block, with every block filled in.

    Raises ValueError for an unknown marker, an opening without its end, and a block that does not stand exactly once.
    """
    filled, placed = {}, []
    for path, text in pages.items():
        marks = [mark for mark in re.findall(r"^<!-- (.+) -->$", text, re.MULTILINE) if mark not in HAND_WRITTEN]
        for mark in marks:
            if mark.removeprefix("/") not in blocks:
                raise ValueError(f"{path}: unknown marker <!-- {mark} -->; known: {', '.join(blocks)}")
        if marks != [mark for name in marks[::2] for mark in (name, f"/{name}")]:
            raise ValueError(f"{path}: each marker <!-- NAME --> needs its <!-- /NAME --> before the next: {marks}")
        placed += marks[::2]
        for name in marks[::2]:
            block = blocks[name].replace('src="', 'src="' + "../" * path.count("/"))
            found = re.search(f"^<!-- {name} -->$(.*?)^<!-- /{name} -->$", text, re.MULTILINE | re.DOTALL)
            text = f"{text[: found.start(1)]}\n\n{block}\n\n{text[found.end(1) :]}"
        filled |= {path: text} if marks else {}
    if wrong := [name for name in blocks if placed.count(name) != 1]:
        raise ValueError(f"{', '.join(pages)}: <!-- {wrong[0]} --> must stand once, not {placed.count(wrong[0])} times")
    return filled


def write_pages(root: Path = PROJECT, record: Path = RECORD) -> list[Path]:
    """The pages and the plots from the record. Returns what was written: nothing, if a marker is wrong."""
    results, real = load_results(record), load_real()
    plots = draw_plots(results | {f"{arm}, real text": runs for arm, runs in real.items()})
    images = {file: f'<img src="{PLOTS}/{file}" width="49%" alt="{escape(alt)}">' for file, (alt, _) in plots.items()}
    curves = images.pop("real.svg", "")  # beside its own table
    parts = [real_table(real, interval), real_claims(real), transfer_table(interval)]
    parts = [markdown(part) for part in parts if len(part) > 1] + [curves] * bool(curves)
    blocks = make_tables(results) | {"real text": "\n\n".join(parts)}
    blocks["plots"] = "\n".join(images.values())
    paths = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    pages = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    files = fill_blocks(pages, blocks) | {f"{PLOTS}/{file}": svg for file, (_, svg) in plots.items()}
    (root / PLOTS).mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        write_whole(root / path, text)
    return [root / path for path in files]
