"""Shows runs as one HTML page that needs no network: RUN/report.html. train.py writes it at the end of a run.

    python -m report RUN [RUN ...]      several runs in one page; those that differ only in their seed become a band

One chart per metric with all runs in it. Metrics that are absent, or 0 throughout, are left out and named. A metric
without a line in SECTIONS stands under "More numbers". Text of models and corpora is never markup. Unfinished runs and
runs without samples work too. Needs no torch.
"""

import base64
import hashlib
import json
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import fmean

import yaml

from prompts import last_answer
from report.charts import COLOURS, Series, heat_chart, line_chart, number, point_chart, stacked_chart

SEED_KEYS = {"seed", "run_dir", "resume", "wandb", "save_every", "keep_last", "samples_per_step", "probe_every"}
"""Config keys in which the runs of one band may differ: only the seed changes what a run computes."""
ENTRIES, TEXT_CHARS, STEPS_SHOWN, ANSWERS_SHOWN = 80, 1200, 5, 4
SAMPLE_BYTES = 1_200_000  # of rollouts in the page, all runs together
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
# beginnings of the keys that are no curve or are drawn in another form
ELSEWHERE = tuple("step method flops gen/share_ gen/invalid_ pred/accuracy_histogram pred/accuracy_caseless".split())


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


def stream(path: Path):
    """The rows of a jsonl file, one at a time; none if there is no file. An unfinished last line is left out."""
    if path.exists():
        with path.open(encoding="utf-8", newline="\n") as file:
            yield from (json.loads(line) for line in file if line.endswith("\n"))


def read_run(folder: Path) -> RunData:
    """Raises ValueError if the folder has no metrics."""
    rows = sorted(stream(folder / "metrics.jsonl"), key=lambda row: row["step"])
    if not rows:
        raise ValueError(f"{folder}: no metrics.jsonl with a row in it; a run directory is expected")
    config = folder / "config.yaml"
    run = RunData(folder, yaml.safe_load(config.read_text(encoding="utf-8")) if config.exists() else {}, rows)
    places = dict.fromkeys((row["step"], row["passage"]["id"]) for row in stream(folder / "samples.jsonl"))
    kept, occurrences = set(even(list(places), ENTRIES)), Counter(name for _, name in places)
    run.repeated = list(stream(folder / "probes.jsonl"))
    recurring, times = occurrences.most_common(1)[0] if places and not run.repeated else ("", 0)
    for place, tasks in groupby(stream(folder / "samples.jsonl"), lambda row: (row["step"], row["passage"]["id"])):
        tasks = list(tasks)
        run.entries += [tasks] if place in kept else []
        run.repeated += tasks if times > 1 and place[1] == recurring else []
    return run


def even(items: list, most: int) -> list:
    """At most `most` of the items, evenly spaced, the first and the last among them."""
    return items if len(items) <= most else [items[round(n * (len(items) - 1) / (most - 1))] for n in range(most)]


def group_by_seed(runs: list[RunData]) -> list[Family]:
    """Runs that differ only in their seed, together; named by the config keys in which the families differ."""
    groups: dict[str, list[RunData]] = {}
    for run in runs:
        same = {key: value for key, value in run.config.items() if key not in SEED_KEYS} or str(run.folder)
        groups.setdefault(json.dumps(same, sort_keys=True, default=str), []).append(run)
    configs = [group[0].config for group in groups.values()]
    differ = [key for key in configs[0] if key not in SEED_KEYS and len({str(c.get(key)) for c in configs}) > 1]
    families = []
    for group, config in zip(groups.values(), configs, strict=True):
        group.sort(key=lambda run: str(run.config.get("seed")))
        settings = [f"{key}={config.get(key)}".removeprefix("method=") for key in differ if config]
        name = ", ".join(settings) or group[0].folder.resolve().name
        seeds = ", ".join(str(run.config.get("seed", "?")) for run in group)
        families.append(Family(f"{name} (seed{'s' * (len(group) > 1)} {seeds})", group))
    return families


def shorten(text: str) -> str:
    return text if len(text) <= TEXT_CHARS else f"{text[:TEXT_CHARS]} ... ({len(text) - TEXT_CHARS:,} more characters)"


def split_response(text: str, command: str) -> dict:
    r"""A response as `t`, its thought (everything if there is no answer), and `a`, its answer or None:
    `r"It flows. \boxed{Rhine} or so"` -> `{"t": "It flows.", "a": "Rhine"}`"""
    answer = last_answer(text, command)
    end = len(text) if answer is None else text.rfind(f"\\{command}{{{answer}")
    return {"t": shorten(text[:end].rstrip("\\").strip()), "a": None if answer is None else shorten(answer.strip())}


def mask_spans(task: dict) -> list[list[int]]:
    """[start, end] in characters of each masked place of the passage."""
    mask, text, size, starts = task["mask"], task["passage"]["text"], len(task["mask"]["target"]), []
    for before in mask["masked"].split("[mask]")[:-1]:
        starts.append(len(before) + (starts[-1] + size if starts else 0))
    if any(text[start : start + size] != mask["target"] for start in starts):
        starts = [mask["start"]] if mask["start"] >= 0 else []
    return [[start, start + size] for start in starts]


def finite(value: float | None) -> float | None:
    """JSON in a browser has no NaN."""
    return round(value, 4) if value is not None and math.isfinite(value) else None


def count_predictions(task: dict) -> list[dict]:
    """The task's distinct predictions, most frequent first, with short keys for the page. In rows without "correct", of
    older runs, a reward of 1 is a right answer."""
    said = [(one["text"].strip(), one.get("correct", int(one["reward"] == 1)), one) for one in task["predictions"]]
    counts = Counter((text, correct, finite(one["reward"]), one["finish"]) for text, correct, one in said).most_common()
    return [
        split_response(text, "boxed") | {"c": correct, "r": reward, "f": finish, "n": count}
        for (text, correct, reward, finish), count in counts
    ]


def browser_entry(tasks: list[dict]) -> dict:
    """One passage of a step for the page's browser of rollouts, with short keys."""
    passage, masks = tasks[0]["passage"], []
    for task in tasks:
        mask, proposal = task["mask"], task["proposal"]
        item = {"w": shorten(mask["words"]), "i": mask["invalid"], "l": mask["label"], "p": count_predictions(task)}
        item |= {} if mask["invalid"] else {"k": mask_spans(task), "x": mask["target"]}
        if proposal:
            item["g"] = split_response(proposal["text"], "mask")
            item["g"] |= {"r": finite(proposal["reward"]), "f": proposal["finish"]}
        masks.append(item)
    return {"s": tasks[0]["step"], "t": passage["title"], "u": passage["url"], "x": passage["text"], "m": masks}


def rollouts_json(runs: list[RunData]) -> str:
    """The runs' entries, safe inside a <script>. Every second entry is left out until they fit into SAMPLE_BYTES."""
    data = [{"n": run.folder.resolve().name, "e": [browser_entry(tasks) for tasks in run.entries]} for run in runs]
    while True:
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        for char in "<\u2028\u2029":
            text = text.replace(char, f"\\u{ord(char):04x}")
        if len(text.encode("utf-8", "replace")) <= SAMPLE_BYTES or not any(item["e"] for item in data):
            return text
        for item in data:
            item["e"] = item["e"][::2] if len(item["e"]) > 1 else []


def title_link(passage: dict) -> str:
    """The title; a link if its address is one of the web."""
    title, url = escape(passage["title"] or passage["id"]), escape(passage["url"])
    if re.match(r"https?://", url):
        return f'<a dir="auto" href="{url}" rel="noopener noreferrer">{title}</a>'
    return f'<span dir="auto">{title}</span> <small dir="auto">{url}</small>'


def step_card(step: int, tasks: list[dict]) -> str:
    """The responses at one step: the generator's masks, counted, and the answers to each mask with their thoughts."""

    def line(kind: str, count: int, text: str, rest: str) -> str:
        times = f"{count} x " if count > 1 else ""
        return f'<li class="{kind}">{times}<b dir="auto">{escape(text)}</b>{rest}</li>'

    masks = [task["mask"] for task in tasks if task["proposal"]]
    counts, lines = Counter((mask["words"] or "nothing", mask["invalid"]) for mask in masks), []
    for (words, invalid), count in counts.most_common():
        cause = f" <small>{escape(invalid.replace('_', ' '))}</small>" if invalid else ""
        lines.append(line("no" if invalid else "", count, shorten(words), cause))
    for task in tasks:
        if task["proposal"] and task["predictions"]:
            lines.append(f'<li>Answers to <b dir="auto">{escape(task["mask"]["target"])}</b>:</li>')
        for item in count_predictions(task)[:ANSWERS_SHOWN]:
            thought = f' <q dir="auto">{escape(item["t"])}</q>' if item["t"] else ""
            answer = "no answer" if item["a"] is None else item["a"]
            lines.append(line("yes" if item["c"] else "no", item["n"], answer, thought))
    return f'<div class="card"><h4>Step {step}</h4><ul>{"".join(lines)}</ul></div>'


def passage_by_step(run: RunData) -> str:
    """The responses to one passage at successive steps."""
    if not run.repeated:
        return "<p>This run has no probes.jsonl, and no passage occurs at two steps of its samples.jsonl.</p>"
    blocks: dict[str, list[dict]] = {}
    for row in run.repeated:  # one block per mask of probes.jsonl, and one for everything with a generator's response
        blocks.setdefault(row["mask"]["masked"] if row["proposal"] is None else "", []).append(row)
    name = f'<span dir="auto">{escape(run.folder.resolve().name)}</span>'
    html = f"<p>{title_link(run.repeated[0]['passage'])}, in the run {name}</p>"
    for masked, rows in blocks.items():
        heading, text, mask = "What the generator masks", escape(rows[0]["passage"]["text"]), rows[0]["mask"]
        if masked:
            heading = "Recovering the highlighted words" + (f" ({escape(mask['label'])})" if mask["label"] else "")
            text = f"<mark>{escape(mask['target'])}</mark>".join(map(escape, masked.split("[mask]")))
        steps = {step: list(tasks) for step, tasks in groupby(rows, lambda row: row["step"])}
        cards = "".join(step_card(step, steps[step]) for step in even(sorted(steps), STEPS_SHOWN))
        html += f'<h3>{heading}</h3><p class="text" dir="auto">{text}</p><div class="cards">{cards}</div>'
    return html


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
    drawn = {key for _, key, *_ in lines} | {key for key in present if key.startswith(ELSEWHERE)}
    for section, pattern, title, about, *options in lines:
        prefix, keys = pattern.removesuffix("*"), [pattern]
        if "*" in pattern:
            keys = [key for key in present if key.startswith(prefix) and key not in drawn]
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


def overview(families: list[Family]) -> str:
    """A table: steps, and the first and last values of the main metrics."""
    keys = ["probe/accuracy", "probe/accuracy_greedy", "pred/accuracy", "gen/valid_rate", "pred/groups_kept"]
    table = "<tr><th>runs<th>steps<th>held out, sampled<th>held out, greedy<th>training, right"
    table += "<th>masks valid<th>masks kept"
    for colour, family in enumerate(families):
        steps = dict.fromkeys(f"{run.rows[-1]['step']} of {run.config.get('steps', '?')}" for run in family.runs)
        table += f'<tr><td><span class="key" dir="auto"><i class="c{colour % 6}"></i>{escape(family.name)}</span>'
        table += f"<td>{', '.join(steps)}"
        for key in keys:
            values = [y for _, y in family.series(key).points if math.isfinite(y)]
            many = 1 if key.startswith("probe/") else 20  # a step is a small sample, a probe is not
            ends = [number(fmean(part)) for part in (values[:many], values[-many:]) if part]
            table += f"<td>{' &rarr; '.join(ends)}"
    return f'<div class="wide"><table>{table}</table></div>'


def build_page(runs: list[RunData]) -> str:
    """The whole page as HTML."""
    families = group_by_seed(runs)
    figures, absent = curves(families)
    about = "share of the valid masks, by the corpus's labels, else by form"
    kinds = stacks(families, "gen/share_", "Kinds of words masked", about)
    kinds += stacks(families, "gen/invalid_", "Invalid masks, by cause", "share of the generator's responses")
    figures["What is masked"] = kinds + figures["What is masked"]
    figures["Rewards"] = histograms(families) + reward_chart(families) + figures["Rewards"]
    body = "".join(f"<h2>{name}</h2><div class='grid'>{''.join(some)}</div>" for name, some in figures.items() if some)
    body += f"<h2>One passage, step by step</h2>{passage_by_step(next((run for run in runs if run.repeated), runs[0]))}"
    notes = f"Not shown, because these runs do not have them or they are 0 throughout: {', '.join(absent)}."
    template = (Path(__file__).parent.parent / "assets" / "report.html").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)[1]
    contents = {
        "TITLE": escape(", ".join(run.folder.resolve().name for run in runs[:4]) + " ..." * (len(runs) > 4)),
        # the browser runs no other script than this one
        "SCRIPT_HASH": f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        "SUMMARY": overview(families),
        "BODY": body,
        "NOTES": f'<p class="faint">{escape(notes)}</p>' if absent else "",
        "ROLLOUTS": rollouts_json(runs),
    }
    text = re.sub(r"<!--([A-Z_]+)-->", lambda slot: contents[slot[1]], template)  # one pass: contents are not searched
    return text.encode("utf-8", "replace").decode()  # unpaired surrogates of a model's text become "?"


def write_report(folders: list[Path]) -> Path:
    """Writes report.html into the first of the run directories. Raises ValueError if one has no metrics."""
    text = build_page([read_run(Path(folder)) for folder in folders])
    temporary = Path(folders[0]) / "report.html.part"
    temporary.write_text(text, encoding="utf-8")
    return temporary.replace(temporary.with_suffix(""))


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__.strip())
        raise SystemExit(0 if len(sys.argv) > 1 else 2)
    try:
        target = write_report(list(map(Path, sys.argv[1:])))
    except (ValueError, OSError) as error:
        print(f"report error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{target}: {target.stat().st_size / 1e6:.2f} MB")
