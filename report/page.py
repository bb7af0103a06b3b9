"""A run's evidence as one page to look at, in any browser, by itself: RUN/report.html.

    python -m report RUN [RUN ...]      several runs in one picture; those that differ only in their seed become a band

Curves, histograms, what the generator masks, the responses to one passage at successive steps, and a browser of
rollouts. The page needs no network and loads nothing; texts of models and of Wikipedia are data in it and never markup.
An unfinished run, one row, NaNs or no samples still make a page. train.py writes it at the end of a run. Leaves out
which charts there are (figures.py), how they are drawn (charts.py) and the look of the page (assets/report.html).
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from html import escape
from itertools import groupby
from pathlib import Path
from statistics import fmean

import yaml

from prompts import last_answer
from report.charts import number
from report.figures import SECTIONS, Family, Run, choice_charts, curves, histograms, phase_chart, reward_chart, stacks

TEMPLATE = Path(__file__).parent.parent / "assets" / "report.html"
SEED_KEYS = {"seed", "run_dir", "resume", "wandb", "save_every", "keep_last", "samples_per_step", "probe_every"}
"""Config keys in which the runs of one band may differ: none of them changes what a run computes, but the seed."""
SAMPLE_BYTES = 1_200_000
"""Room for rollouts in the page, all runs together; of more, evenly spaced ones are kept."""
ENTRIES, TEXT_CHARS, STEPS_SHOWN, RESPONSES_SHOWN = 80, 1200, 5, 4


# ------------------------------------------------------------------------------------------------------------- reading


def stream(path: Path) -> Iterator[dict]:
    """The rows of a jsonl file, one at a time (samples.jsonl may be large); none if it is not there. A last line
    without its end is still being written and left out."""
    if path.exists():
        with path.open(encoding="utf-8", newline="\n") as file:
            yield from (json.loads(line) for line in file if line.endswith("\n"))


def read_run(folder: Path) -> Run:
    """Raises ValueError, one line, where there is nothing to show."""
    rows = sorted(stream(folder / "metrics.jsonl"), key=lambda row: row["step"])
    if not rows:
        raise ValueError(f"{folder}: no metrics.jsonl with a row in it; a run directory is expected")
    config = folder / "config.yaml"
    run = Run(folder, yaml.safe_load(config.read_text(encoding="utf-8")) if config.exists() else {}, rows)
    places, steps = [], {}  # each (step, passage) in order; the steps at which a passage occurs
    for row in stream(folder / "samples.jsonl"):
        passage, mask = row["passage"], row["mask"]
        if not places or places[-1] != (row["step"], passage["id"]):
            places.append((row["step"], passage["id"]))
            steps.setdefault(passage["id"], set()).add(row["step"])
        if not mask["invalid"] and mask["start"] >= 0:
            run.chosen.append((row["step"], len(mask["target"].split()), mask["start"] / len(passage["text"])))
    kept = set(even(places, ENTRIES))
    most = max(steps, key=lambda name: len(steps[name]), default=None)
    run.fixed = list(stream(folder / "probes.jsonl"))
    recurs = not run.fixed and most is not None and len(steps[most]) > 1
    for place, tasks in groupby(stream(folder / "samples.jsonl"), lambda row: (row["step"], row["passage"]["id"])):
        tasks = list(tasks)
        run.entries += [tasks] if place in kept else []
        run.fixed += tasks if recurs and place[1] == most else []
    return run


def even(items: list, most: int) -> list:
    """At most `most` of the items, evenly spaced, the first and the last among them.

    >>> even(list(range(11)), 3), even([1, 2], 3)
    ([0, 5, 10], [1, 2])
    """
    if len(items) <= most:
        return items
    return [items[round(n * (len(items) - 1) / (most - 1))] for n in range(most)]


def families(runs: list[Run]) -> list[Family]:
    """Runs that differ only in their seed, together; named by what sets them apart, method first."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        same = {key: value for key, value in run.config.items() if key not in SEED_KEYS} or str(run.folder)
        groups.setdefault(json.dumps(same, sort_keys=True, default=str), []).append(run)
    firsts = [group[0] for group in groups.values()]
    keys = [key for key in firsts[0].config if key not in SEED_KEYS]
    apart = [key for key in keys if len({str(one.config.get(key)) for one in firsts}) > 1]
    found = []
    for group in groups.values():
        group.sort(key=lambda run: str(run.config.get("seed")))
        first = group[0]
        words = [str(first.config.get(key)) if key == "method" else f"{key}={first.config.get(key)}" for key in apart]
        seeds = [str(run.config.get("seed", "?")) for run in group]
        name = ", ".join(words) if words and first.config else first.folder.resolve().name
        found.append(Family(f"{name} (seed{'s' * (len(seeds) > 1)} {', '.join(seeds)})", group))
    return found


# -------------------------------------------------------------------------------------- what was written, as text


def cut(text: str) -> str:
    return text if len(text) <= TEXT_CHARS else f"{text[:TEXT_CHARS]} ... ({len(text) - TEXT_CHARS:,} more characters)"


def parts(text: str, command: str) -> dict:
    r"""A response taken apart: `t` the thought (all of it where there is no answer), `a` the answer or None.

    >>> parts(r"It flows. \boxed{Rhine} or so", "boxed")
    {'t': 'It flows.', 'a': 'Rhine'}
    """
    answer = last_answer(text, command)
    end = len(text) if answer is None else text.rfind(f"\\{command}{{{answer}")
    return {"t": cut(text[:end].rstrip("\\").strip()), "a": None if answer is None else cut(answer.strip())}


def spans(task: dict) -> list[list[int]]:
    """[start, end] in characters of each masked place of the passage.

    >>> spans({"passage": {"text": "An art is art."}, "mask": {"masked": "An [mask] is [mask].", "target": "art"}})
    [[3, 6], [10, 13]]
    """
    mask, text, found, position = task["mask"], task["passage"]["text"], [], 0
    pieces, size = mask["masked"].split("[mask]"), len(mask["target"])
    for piece in pieces[:-1]:
        position += len(piece)
        found.append([position, position + size])
        position += size
    if all(text[start:end] == mask["target"] for start, end in found):
        return found
    return [[mask["start"], mask["start"] + size]] if mask["start"] >= 0 else []


def entry(tasks: list[dict]) -> dict:
    """One passage of a step for the page's browser of rollouts, with short keys."""
    passage, masks = tasks[0]["passage"], []
    for task in tasks:
        mask, proposal = task["mask"], task["proposal"]
        one = {"w": cut(mask["words"]), "i": mask["invalid"], "l": mask["label"]}
        if not mask["invalid"]:
            one |= {"o": mask["occurrences"], "k": spans(task), "x": mask["target"]}
        if proposal:
            one["g"] = parts(proposal["text"], "mask") | {"r": finite(proposal["reward"]), "f": proposal["finish"]}
        said = Counter((one["text"], finite(one["reward"]), one["finish"]) for one in task["predictions"])
        one["p"] = [
            parts(text, "boxed") | {"r": reward, "f": finish, "n": count}
            for (text, reward, finish), count in said.most_common()
        ]
        masks.append(one)
    return {"s": tasks[0]["step"], "t": passage["title"], "u": passage["url"], "x": passage["text"], "m": masks}


def finite(value: float | None) -> float | None:
    """JSON in a browser has no NaN."""
    return round(value, 4) if value is not None and math.isfinite(value) else None


def rollouts(runs: list[Run], room: int = SAMPLE_BYTES) -> str:
    """JSON of the runs' entries, cut to `room` bytes by leaving out every other one; safe inside a <script>."""
    data = [{"n": run.folder.resolve().name, "e": [entry(tasks) for tasks in run.entries]} for run in runs]

    def write() -> str:
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")

    while len((text := write()).encode("utf-8", "replace")) > room and any(one["e"] for one in data):
        for one in data:
            one["e"] = one["e"][::2] if len(one["e"]) > 1 else []
    return text


def link(passage: dict) -> str:
    """The title, as a link where the address is one of the web: the only thing in the page that leads out of it."""
    title, url = escape(passage["title"] or passage["id"]), passage["url"]
    if re.match(r"https?://", url):
        return f'<a href="{escape(url)}" rel="noopener noreferrer">{title}</a>'
    return f"{title} <small>{escape(url)}</small>"


def marked(masked: str, target: str) -> str:
    """The masked passage with the hidden words in their place, highlighted."""
    return f"<mark>{escape(target)}</mark>".join(map(escape, masked.split("[mask]")))


def card(step: int, tasks: list[dict]) -> str:
    """What was said at one step: the generator's masks, counted, and the answers to each mask, with their thoughts."""
    lines = []
    masks = Counter((task["mask"]["words"] or "nothing", task["mask"]["invalid"]) for task in tasks if task["proposal"])
    for (words, invalid), count in masks.most_common():
        times = f"{count} x " if count > 1 else ""
        cause = f" <small>{escape(invalid.replace('_', ' '))}</small>" if invalid else ""
        lines.append(f"<li{' class=no' * bool(invalid)}>{times}<b>{escape(cut(words))}</b>{cause}</li>")
    for task in tasks:
        said = Counter((one["text"].strip(), one["reward"]) for one in task["predictions"])
        if task["proposal"] and said:
            lines.append(f"<li>Answers to <b>{escape(task['mask']['target'])}</b>:</li>")
        for (text, reward), count in said.most_common(RESPONSES_SHOWN):
            one = parts(text, "boxed")
            times = f"{count} x " if count > 1 else ""
            answer = "no answer" if one["a"] is None else escape(one["a"])
            thought = f" <q>{escape(one['t'])}</q>" if one["t"] else ""
            lines.append(f'<li class="{"yes" if reward > 0 else "no"}">{times}<b>{answer}</b>{thought}</li>')
    return f'<div class="card"><h4>Step {step}</h4><ul>{"".join(lines)}</ul></div>'


def one_passage(run: Run) -> str:
    """The responses to one fixed passage at successive steps: how the answers and the thoughts change."""
    if not run.fixed:
        return "<p>This run has no probes.jsonl, and no passage occurs at two steps of its samples.jsonl.</p>"
    blocks: dict[str, list[dict]] = {}
    for row in run.fixed:  # probes.jsonl: by mask, and one block for the generator; a recurring passage: one block
        key = row["mask"]["masked"] if row["proposal"] is None else ""
        blocks.setdefault(key, []).append(row)
    html = [f"<p>{link(run.fixed[0]['passage'])}, in the run {escape(run.folder.resolve().name)}</p>"]
    for key, rows in blocks.items():
        passage, mask = rows[0]["passage"], rows[0]["mask"]
        text = marked(mask["masked"], mask["target"]) if key else escape(passage["text"])
        kind = f" ({escape(mask['label'])})" if mask["label"] else ""
        what = f"Recovering the highlighted words{kind}" if key else "What the generator masks"
        steps = {step: list(part) for step, part in groupby(rows, lambda row: row["step"])}
        cards = "".join(card(step, steps[step]) for step in even(sorted(steps), STEPS_SHOWN))
        html.append(f'<h3>{what}</h3><p class="text">{text}</p><div class="cards">{cards}</div>')
    return "".join(html)


# ------------------------------------------------------------------------------------------------------------ the page


def facts(families: list[Family]) -> str:
    """The runs in a table: how far they are, and the first and last of the numbers that count."""
    keys = {"probe/accuracy": "held out, sampled", "probe/accuracy_greedy": "held out, greedy"}
    keys |= {"pred/accuracy": "training, right", "gen/valid_rate": "masks valid", "pred/groups_kept": "masks kept"}
    lines = ["<tr><th>runs<th>steps" + "".join(f"<th>{name}" for name in keys.values())]
    for at, family in enumerate(families):
        done = [str(run.rows[-1]["step"]) + f" of {run.config.get('steps', '?')}" for run in family.runs]
        done = ", ".join(done if len(set(done)) > 1 else done[:1])
        cells = []
        for key in keys:
            values = [y for _, y in family.series(key).points if math.isfinite(y)]
            many = 1 if key.startswith("probe/") else 20  # a step is a small sample, a probe is not
            ends = [number(fmean(part)) for part in (values[:many], values[-many:]) if part]
            cells.append(" &rarr; ".join(ends))
        name = f'<span class="key"><i class="c{at % 6}"></i>{escape(family.name)}</span>'
        lines.append(f"<tr><td>{name}<td>{done}" + "".join(f"<td>{cell}" for cell in cells))
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def page(runs: list[Run]) -> str:
    """The whole page."""
    groups = families(runs)
    extra = {
        "Held-out passages": [],
        "Benchmarks": [],
        "What is masked": [
            *stacks(groups, "gen/share_", "Kinds of words masked", "share of the valid masks, by the corpus's labels"),
            *stacks(groups, "gen/invalid_", "Invalid masks, by cause", "share of the generator's responses"),
            *choice_charts(groups),
        ],
        "Rewards": histograms(groups) + reward_chart(groups),
        "Responses": [],
        "Training": phase_chart(groups),
    }
    body, absent = [], []
    for section in SECTIONS:
        figures, left_out = curves(section, groups)
        absent += left_out
        if figures or extra[section]:
            body.append(f"<h2>{section}</h2><div class='grid'>{''.join(extra[section] + figures)}</div>")
    first = next((run for run in runs if run.fixed), runs[0])
    body.append(f"<h2>One passage, step by step</h2>{one_passage(first)}")
    notes = f"Not shown, because these runs do not have them or they are 0 throughout: {', '.join(absent)}."
    title = ", ".join(run.folder.resolve().name for run in runs[:4]) + " ..." * (len(runs) > 4)
    template = TEMPLATE.read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    filled = {
        "TITLE": escape(title),
        "SCRIPT_HASH": f"sha256-{digest}",  # the page's own script is the only one that a browser will run
        "FACTS": facts(groups),
        "BODY": "".join(body),
        "NOTES": f'<p class="faint">{escape(notes)}</p>' if absent else "",
        "ROLLOUTS": rollouts(runs),
    }
    text = re.sub(r"<!--([A-Z_]+)-->", lambda slot: filled[slot[1]], template)  # one pass: fillings are not searched
    return text.encode("utf-8", "replace").decode()  # half a surrogate pair, in some model's text, becomes a "?"


def write_report(folders: list[Path]) -> Path:
    """Reads the runs and writes report.html into the first. Raises ValueError where one has nothing to show."""
    text = page([read_run(Path(folder)) for folder in folders])
    target = Path(folders[0]) / "report.html"
    beside = target.with_name("report.html.part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, target)
    return target


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


if __name__ == "__main__":
    main()
