"""What came of the experiments: tables and plots from miniature/runs.jsonl, and their places in PAGES.

A page holds a block between two lines, <!-- NAME --> and <!-- /NAME -->; each block stands exactly once. Tables, plots
and assets/figures/*.svg are functions of the record alone. Intervals are Student's t over seeds; bands in plots are the
lowest and the highest seed. The sentences around the blocks are written by hand.
"""

import math
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path
from statistics import fmean, stdev

from metrics import read_rows, write_whole
from miniature.claims import (
    ARMS, CLAIMS, LADDER_ARMS, LENGTH, RLVR_ARMS, SEVERAL_ARMS, WIKI_ARMS, Results, climb, differences, ends, gains,
    late, verdicts,
)  # fmt: skip
from miniature.real import REAL_RECORD, of_seeds, real_claims, real_tables, transfer_table
from report.charts import Series, line_chart, stand_alone

PROJECT = Path(__file__).resolve().parent.parent
RECORD = PROJECT / "miniature" / "runs.jsonl"
PAGES = ("docs/results.md", "docs/ladder.md")
# 97.5 % quantile of Student's t for so many values (one degree of freedom less)
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
MIXED, LONGER = "active, 1 of 4 masks random", "active, two facts, 200 steps"
PLOTS = {  # file name -> title, explanation, and curves: arm, key, name
    "facts": ("Facts on held-out articles, sampled", "share right; band: lowest and highest seed",
        [(arm, "fact", arm) for arm in ("active", "sft", "random_span", "frozen generator", "rewards shuffled")]),
    "masks": ("What the generator masks", "share of valid masks, means of five steps",
        [("active", "gen/share_fact", "active: facts"), ("active", "gen/share_noise", "active: noise"),
         ("frozen generator", "gen/share_fact", "frozen generator: facts")]),
    "copies": ("Copies of the subject, sampled", "share right, from 0.5; what active forgets",
        [(arm, "copy", arm) for arm in ("active", MIXED, "random_span")]),
    "comes-back": ("What `active` forgets, it wins back", "share right on held-out articles, sampled; share of masks",
        [("active, 500 steps", "copy", "copies"), ("active, 500 steps", "fact", "facts"),
         ("active, 500 steps", "gen/share_copy", "masks on copies")]),
    "never-masked": ("Facts that a run cannot mask, greedy", "share right, two facts an article",
        [(LONGER, "greedy_fact", "active: may be masked"), (LONGER, "greedy_shown", "active: read, never masked"),
         (LONGER, "greedy_unseen", "active: never read"), ("cpt, two facts", "greedy_shown", "cpt: read")]),
    "rlvr": ("RLVR: held-out subjects, greedy", "share right over 60 steps of RLVR",
        [(arm, "greedy", arm) for arm in RLVR_ARMS]),
    "ladder": ("The ladder: facts of four steps that nothing trains", "share right, sampled",
        [("ladder: active", "hop4", "active"), ("ladder: active", "no_thought_hop4", "active, at once"),
         ("ladder: random_span", "hop4", "random_span"), ("ladder: sft, bare answers", "hop4", "sft")]),
    "ladder-masks": ("The ladder: what the generator masks", "share of valid masks, means of five steps",
        [("ladder: active", f"gen/share_hop{n}", f"{n} step{'s' * (n > 1)}") for n in (1, 2, 3, 4)]),
    "real": ("Real text", "share right by step, active",
        [("active, real text", "pred/accuracy", "own masks"), ("active, real text", "all", "held out")]),
    "real-tried": ("Real text: against the agreement", "share of function words among valid masks",
        [("active, real text", "gen/share_function", "active"), ("frozen generator, real text", "gen/share_function",
         "frozen generator"), *[(f"active, {arm}, real text", "gen/share_function", arm) for arm in (
         "generator_reward: variance", "a word twice a step", "generator at a tenth", "cold start of 120 steps")]]),
}  # fmt: skip


def load_results(record: Path, arms: Iterable[str] = ()) -> Results:
    """Runs by arm, in the order of `arms` (of the record, if none are given) and of seeds, [] for an arm without runs;
    of two lines for a run the later."""
    rows = {(row["arm"], row["seed"]): row for row in read_rows(record)}
    names = arms or dict.fromkeys(arm for arm, _ in rows)
    return {arm: [rows[key] for key in sorted(rows) if key[0] == arm] for arm in names}


def interval(values: list[float]) -> str:
    """Mean and 95 % interval by Student's t over seeds; the mean alone of one value, or of more than ten."""
    t = STUDENT.get(len(values))
    return f"{fmean(values):.2f}" + (f" ± {t * stdev(values) / math.sqrt(len(values)):.2f}" if t else "")


def lowest_highest(values: list[float]) -> str:
    return f"{round(min(values), 2) + 0.0:.2f}, {round(max(values), 2) + 0.0:.2f}"  # + 0.0: no minus before a zero


def start(runs: list[dict], probe: str) -> str:
    return f"{fmean(run['probes'][0][probe] for run in runs):.2f}"


def end(runs: list[dict], probe: str) -> str:
    return interval(ends(runs, probe))


def total(runs: list[dict], key: str) -> float:
    return fmean(run["totals"][key] for run in runs)


def make_tables(results: Results) -> dict[str, str]:
    """Name of a block -> its table. Every arm needs a run."""
    probes = {"fact": "facts, sampled", "greedy_fact": "facts, greedy", "template": "template"}
    probes |= {"copy": "copies, sampled"}
    methods = [["method", *probes.values(), "masks on a fact", "predictions", "tokens trained", "FLOPs"]]
    methods.append(["start", *(start(sum((results[arm] for arm in WIKI_ARMS), []), key) for key in probes), *[""] * 4])
    for arm in WIKI_ARMS:
        runs, shares = results[arm], late(results[arm], "gen/share_fact")
        predictions, trained = total(runs, "pred/responses"), total(runs, "trained_tokens")
        methods.append([
            arm, *(end(runs, probe) for probe in probes), f"{fmean(shares):.2f}" if any(shares) else "",
            f"{predictions / 1000:.1f}k" if predictions else "none", f"{trained / 1000:.1f}k",
            f"{total(runs, 'flops'):.1e}"])  # fmt: skip

    pairs = [["difference", "in", "mean, 95 % interval", "lowest, highest seed"]]
    others = [("fact", "random_span"), ("fact", "frozen generator"), ("fact", "sft"), ("fact", MIXED), ("copy", MIXED)]
    for probe, arm in others:
        values = differences(results["active"], results[arm], probe)
        pairs.append([f"active - {arm}", probes[probe], interval(values), lowest_highest(values)])

    several = [["method", "facts", "greedy, step 0", "greedy, last step", "gain of greedy", "sampled, last step"]]
    for arm in SEVERAL_ARMS:
        for label, name in {"fact": "may be masked", "shown": "read, never masked", "unseen": "never read"}.items():
            runs, greedy = results[arm], f"greedy_{label}"
            cells = [start(runs, greedy), end(runs, greedy), interval(gains(runs, greedy)), end(runs, label)]
            several.append([arm, name, *cells])

    heads = ["held out, greedy, step 0", "step 60", "held out, sampled, step 0", "step 60", "trained on, late"]
    rlvr = [["method", *heads]]
    for arm in RLVR_ARMS:
        runs = results[arm]
        rlvr.append([arm, start(runs, "greedy"), end(runs, "greedy"), start(runs, "all"), end(runs, "all"),
                     interval(late(runs, "pred/accuracy"))])  # fmt: skip

    ladder = [["method", "three steps", "four", "four, at once", "thought use", "length, first and last",
               "masks on two to four", "tokens sampled, trained"]]  # fmt: skip
    for arm in LADDER_ARMS:
        runs = results[arm]
        used = [run["probes"][-1].get("thought_use", 0.0) for run in runs]  # missing where no response thinks
        lengths = fmean(run["curves"][LENGTH][0] for run in runs), fmean(late(runs, LENGTH))
        sampled = f"{total(runs, 'response_tokens') / 1000:.0f}k" if total(runs, "pred/responses") else "none"
        ladder.append([
            arm.removeprefix("ladder: "), f"{fmean(ends(runs, 'hop3')):.2f}", end(runs, "hop4"),
            f"{fmean(ends(runs, 'no_thought_hop4')):.2f}", f"{fmean(used):.2f}",
            f"{lengths[0]:.1f} {lengths[1]:.1f}", f"{fmean(climb(runs)):.2f}",
            f"{sampled} {total(runs, 'trained_tokens') / 1000:.0f}k"])  # fmt: skip

    tables = {"methods": methods, "differences": pairs, "never masked": several, "rlvr": rlvr, "ladder": ladder}
    held = {name: claim.holds(results) for name, claim in CLAIMS.items()}
    return {"claims": verdicts(held)} | {name: markdown(table) for name, table in tables.items()}


def markdown(table: list[list[str]]) -> str:
    """Rows of cells, the heads first."""
    rows = (table[0], ["---"] * len(table[0]), *table[1:])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def series(runs: list[dict], key: str, name: str) -> Series:
    """The mean over seeds, with a band, at steps that all have. A key with a slash is a curve, any other a probe."""
    points: dict[int, list[float]] = {}
    for run in runs:
        if "/" in key:  # means of five steps, drawn at the middle one
            pairs = [(5 * n + 3, value) for n, value in enumerate(run["curves"][key])]
        else:
            pairs = [(row["step"], row[key]) for row in run["probes"]]
        for step, value in pairs:
            points.setdefault(step, []).append(value)
    shared = [(step, values) for step, values in sorted(points.items()) if len(values) == len(runs)]
    means = [(step, fmean(values)) for step, values in shared]
    return Series(name, means, [(step, min(values), max(values)) for step, values in shared])


def fill_blocks(pages: dict[str, str], blocks: dict[str, str]) -> dict[str, str]:
    """{path: text} of pages -> the same with every block between its markers, on whichever page these are.

    Raises ValueError for a block whose two markers do not stand exactly once.
    """
    pages = dict(pages)
    for name, block in blocks.items():
        marked = re.compile(f"^<!-- {name} -->$.*?^<!-- /{name} -->$", re.MULTILINE | re.DOTALL)
        found = [(path, match) for path, text in pages.items() for match in marked.finditer(text)]
        marks = sum(len(re.findall(f"^<!-- /?{name} -->$", text, re.MULTILINE)) for text in pages.values())
        if (len(found), marks) != (1, 2):
            raise ValueError(f"<!-- {name} -->, then <!-- /{name} -->: each must stand once in {', '.join(pages)}")
        ((path, match),) = found
        filled = f"<!-- {name} -->\n\n{block}\n\n<!-- /{name} -->"
        pages[path] = pages[path][: match.start()] + filled + pages[path][match.end() :]
    return pages


def write_pages(root: Path = PROJECT, record: Path = RECORD) -> list[Path]:
    """PAGES and the plots from the record. Returns what was written: nothing, if a marker is wrong.

    Raises ValueError for an arm without a run, and what fill_blocks raises.
    """
    results, real = load_results(record, ARMS), load_results(REAL_RECORD)
    if missing := [arm for arm, runs in results.items() if not runs]:
        raise ValueError(f"{record}: no run of {', '.join(missing)}; `python -m miniature run` makes them")
    results |= {f"{arm}, real text": of_seeds(runs) for arm, runs in real.items()}
    images, plots = {}, {}
    for name, (title, about, curves) in PLOTS.items():
        file = f"assets/figures/{name}.svg"
        lines = [series(results[arm], key, label) for arm, key, label in curves]
        svg = line_chart(lines, f"{title}: {about}", (0.5, 1.0) if name == "copies" else (0.0, 1.0))
        plots[file] = stand_alone(svg, title, about, [line.name for line in lines])
        images[name] = f'<img src="../{file}" width="49%" alt="{escape(title)}">'
    *first, second = (markdown(table) for table in (*real_tables(real, interval), transfer_table(interval)))
    parts = [*first, verdicts(real_claims(real)), second, "\n".join(map(images.pop, ("real", "real-tried")))]
    blocks = make_tables(results) | {"real text": "\n\n".join(parts)}
    blocks["plots"] = "\n".join(images.values())
    files = fill_blocks({page: (root / page).read_text(encoding="utf-8") for page in PAGES}, blocks) | plots
    (root / "assets" / "figures").mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        write_whole(root / path, text)
    return [root / path for path in files]
