"""Shows runs as one HTML page that needs no network: RUN/report.html. train.py writes it at the end of a run.

    python -m report RUN [RUN ...]      several runs in one page; those that differ only in their seed become a band

A metric that is not 0 throughout has a chart under its name in metrics.jsonl; one without a line in SECTIONS stands
under "More numbers". Then come the responses to one held-out passage at successive probes, examples of samples.jsonl,
and how each run was made. The template escapes all text of models and corpora. Needs no torch.
"""

import base64
import hashlib
import json
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import groupby
from pathlib import Path
from statistics import fmean

import yaml
from jinja2 import Environment
from markupsafe import Markup

from config import ConfigError, command
from prompts import last_answer
from report.charts import COLOURS, Series, line_chart, number

SEED_KEYS = {"seed", "run_dir", "resume", "wandb", "save_every", "keep_last", "samples_per_step", "probe_every"}
"""Config keys in which the runs of one band may differ: only the seed changes what a run computes."""
EXAMPLES, PROBES_SHOWN, ANSWERS_SHOWN = 20, 5, 4
SHARE = (0.0, 1.0)
# key or beginning of keys, explanation, fixed range of y, logarithmic y
SECTIONS = {
    "Held-out passages": [
        ("probe/accuracy", "right answers, sampled, with a thought; the same masks at every probe", SHARE),
        ("probe/accuracy_greedy", "right answers, the likeliest token each time", SHARE),
        ("probe/accuracy_greedy_no_thought*", "the likeliest tokens behind an opened box, by kind", SHARE),
        ("probe/accuracy_greedy_*", "the likeliest tokens, by kind of word", SHARE),
        ("probe/accuracy_no_thought*", "sampled behind an opened box, by kind", SHARE),
        ("probe/accuracy_*", "right answers by kind of word", SHARE),
        ("probe/valid_rate", "share of responses with a closed box", SHARE),
        ("probe/thought_use", "accuracy that a thought about another passage costs"),
        ("probe/perplexity", "of plain text; rises: the model forgets text"),
    ],
    "Benchmarks": [
        ("eval/*_rate", "share of responses", SHARE),
        ("eval/*", "right answers and their standard error in per cent; length_mean in tokens"),
    ],
    "What is masked": [
        ("gen/share_*", "share of the valid masks, by the corpus's labels, else by form", SHARE),
        ("gen/invalid_*", "share of the generator's responses, by what makes the mask invalid", SHARE),
        ("gen/valid_rate", "share of the generator's responses", SHARE),
        ("gen/distinct", "different masks per passage; 1: the generator always chooses the same"),
        ("gen/top_word_share", "share of the valid masks that name the same words", SHARE),
        ("gen/span_words", "words in a valid mask, mean"),
        ("gen/occurrences", "of a mask's words in their passage, mean"),
    ],
    "Rewards": [
        ("gen/reward", "of masks; by default 1 - accuracy, 0 if none is right or the mask is invalid", SHARE),
        ("pred/accuracy", "right predictions of the step's masks; the generator moves it", SHARE),
        ("pred/accuracy_zero", "masks that nobody solves: they teach nothing", SHARE),
        ("pred/accuracy_one", "masks that all solve: they teach nothing", SHARE),
        ("gen/groups_kept", "passages that teach the generator: their masks earned unequally", SHARE),
        ("pred/groups_kept", "masks that teach the predictor: their answers earned unequally", SHARE),
        ("reward", "mean over all responses of both roles"),
    ],
    "Responses": [
        ("*/length_mean", "tokens"),
        ("*/truncated", "share cut at the limit", SHARE),
        ("pred/valid_rate", "share of predictions with a closed box", SHARE),
        ("pred/tokens_after_answer", "rambling, mean"),
        ("entropy", "nats a token, of the tokens trained on; collapse to 0: lower the learning rate"),
        ("surprisal", "nats a token, of all that was sampled"),
    ],
    "Training": [
        ("loss", "says little in reinforcement learning"),
        ("grad_norm", "before clipping"),
        ("mismatch_abs", "trainer against sampler: mean difference of log-probs; must stay flat", None, True),
        ("mismatch_kl", "trainer against sampler, nats a token; must stay flat", None, True),
        ("time/step", "seconds, without the save"),
        ("time/probe", "seconds"),
        ("time/*", "seconds in each phase of the step"),
        ("tokens_per_second", "tokens sampled, over the whole step"),
        ("peak_memory_gb", "of rank 0; on a GPU of the update"),
    ],
    "More numbers": [("*", "")],  # what no line above names: a metric of your own
}
TOGETHER = ("gen/share_*", "gen/invalid_*", "time/*")
"""Beginnings whose keys share a chart, one per band of runs; every other key has a chart with all runs in it, but the
probe's kinds share one where there is one band."""


@dataclass
class RunData:
    """One run directory. rows: of metrics.jsonl; probes: of probes.jsonl; samples: passages of samples.jsonl, evenly
    spaced, each with the rows of its masks; made: the texts of config.yaml and environment.txt."""

    name: str
    config: dict
    rows: list[dict]
    probes: list[dict]
    samples: list[list[dict]]
    made: str


@dataclass
class Family:
    """Runs that differ only in their seed."""

    name: str
    runs: list[RunData]

    @property
    def rows(self) -> list[dict]:
        return [row for run in self.runs for row in run.rows]

    def series(self, key: str, name: str = "") -> Series:
        """The mean over the runs at each step; with several runs also the lowest and the highest value."""
        steps: dict[int, list[float]] = {}
        for row in self.rows:
            if key in row:
                steps.setdefault(row["step"], []).append(row[key])
        finite = {step: [y for y in steps[step] if math.isfinite(y)] or [math.nan] for step in sorted(steps)}
        band = [(step, min(values), max(values)) for step, values in finite.items() if len(self.runs) > 1]
        return Series(name or self.name, [(step, fmean(values)) for step, values in finite.items()], band)


def stream(path: Path):
    """The rows of a jsonl file, one at a time; none if there is no file. An unfinished last line is left out."""
    if path.exists():
        with path.open(encoding="utf-8", newline="\n") as file:
            yield from (json.loads(line) for line in file if line.endswith("\n"))


def even(items: list, most: int) -> list:
    """At most `most` of the items, evenly spaced, the first and the last among them."""
    return items if len(items) <= most else [items[round(n * (len(items) - 1) / (most - 1))] for n in range(most)]


def read_run(folder: Path) -> RunData:
    """Raises ConfigError if the folder has no metrics, OSError if it has no config."""
    rows = list(stream(folder / "metrics.jsonl"))
    if not rows:
        raise ConfigError(f"{folder}: no metrics.jsonl with a row in it; a run directory is expected")
    # a kind of mask that does not occur at a step has no key there
    kinds = {key for row in rows for key in row if key.startswith(("gen/share_", "gen/invalid_"))}
    rows = [dict.fromkeys(kinds, 0.0) | row if "gen/valid_rate" in row else row for row in rows]
    wanted = set(even([row["step"] for row in rows if "reward" in row], EXAMPLES))  # all samples may exceed the memory
    samples = [row for row in stream(folder / "samples.jsonl") if row["step"] in wanted]
    passages = [list(tasks) for _, tasks in groupby(samples, lambda row: (row["step"], row["passage"]["id"]))]
    texts = [path.read_text(encoding="utf-8") for path in (folder / "config.yaml", folder / "environment.txt")]
    config, probes = yaml.safe_load(texts[0]), list(stream(folder / "probes.jsonl"))
    return RunData(folder.resolve().name, config, rows, probes, even(passages, EXAMPLES), "\n".join(texts))


def group_by_seed(runs: list[RunData]) -> list[Family]:
    """Runs that differ only in their seed, together, named by the first of them."""
    groups: dict[str, list[RunData]] = {}
    for run in runs:
        same = {key: value for key, value in run.config.items() if key not in SEED_KEYS}
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(run)
    seeds = [", ".join(str(run.config["seed"]) for run in group) for group in groups.values()]
    return [Family(f"{group[0].name} (seed {text})", group) for group, text in zip(groups.values(), seeds, strict=True)]


def figure(title: str, about: str, lines: list[Series], legend: list[str], options: tuple) -> dict:
    """One chart for the template. legend: a text per line, empty for none. options: fixed, log of line_chart."""
    svg = Markup(line_chart(lines, f"{title}: {about}", *options))  # it has escaped its text
    return {"title": title, "about": about, "svg": svg, "legend": [(n % COLOURS, x) for n, x in enumerate(legend) if x]}


def make_figures(families: list[Family]) -> dict[str, list[dict]]:
    """The charts of each section, of all numbers that are not 0 throughout."""
    rows = [row for family in families for row in family.rows]
    keys = sorted({key for row in rows for key, y in row.items() if isinstance(y, int | float) and y} - {"step"})
    figures: dict[str, list[dict]] = {section: [] for section in SECTIONS}
    for section, pattern, about, *options in [(name, *line) for name, lines in SECTIONS.items() for line in lines]:
        found = [key for key in keys if fnmatch(key, pattern)]
        keys = [key for key in keys if key not in found]
        if pattern in TOGETHER or (len(families) == 1 and fnmatch(pattern, "probe/*[*]")):
            for family in families if found else ():
                own = sorted(found, key=pattern.startswith)  # `all` comes last: a kind has one colour in all charts
                lines = [family.series(key, key.removeprefix(pattern[:-1]).lstrip("_") or "all") for key in own]
                if any(line.points for line in lines):
                    title = f"{pattern} of {family.name}" if len(families) > 1 else pattern
                    legend = [f"{line.name} {last_value(line)}" for line in lines]
                    figures[section].append(figure(title, about, lines, legend, options))
            continue
        for key in found:
            lines = [family.series(key) for family in families]
            figures[section].append(figure(key, about, lines, [last_value(line) for line in lines], options))
    return figures


def last_value(line: Series) -> str:
    """Its last finite value, empty without one."""
    return next((number(y) for _, y in reversed(line.points) if math.isfinite(y)), "")


def count_responses(tasks: list[dict]) -> list[dict]:
    """The masks of one passage at one step, most frequent first: the first task that chose it, how many did, and all
    predictions of it as (how many, answer, text, correct, reward), most frequent first."""
    masks: dict[tuple, list[dict]] = {}
    for task in tasks:
        masks.setdefault((task["mask"]["words"], task["mask"]["invalid"]), []).append(task)
    counted = []
    for same in sorted(masks.values(), key=len, reverse=True):
        said = Counter((x["text"], x["correct"], x["reward"]) for task in same for x in task["predictions"])
        answers = [(n, last_answer(said[0], "boxed"), *said) for said, n in said.most_common(ANSWERS_SHOWN)]
        counted.append({"task": same[0], "count": len(same), "answers": answers})
    return counted


def probes_by_step(probes: list[dict]) -> list[dict]:
    """The responses at successive probes: one block per fixed mask, and one for the masks that the generator chose."""
    blocks: dict[tuple, list[dict]] = {}
    for row in probes:
        shown = (f"Recovering {row['mask']['target']}", row["mask"]["masked"])
        if row["proposal"]:
            shown = ("What the generator masks", row["passage"]["text"])
        blocks.setdefault(shown, []).append(row)
    made = []
    for (title, text), rows in blocks.items():
        steps = {step: list(tasks) for step, tasks in groupby(rows, lambda row: row["step"])}
        cards = [(step, count_responses(steps[step])) for step in even(list(steps), PROBES_SHOWN)]
        made.append({"title": title, "text": text, "cards": cards})
    return made


def build_page(runs: list[RunData]) -> str:
    """The whole page as HTML."""
    families = group_by_seed(runs)
    template = (Path(__file__).parent.parent / "assets" / "report.html").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()  # the browser runs no other script
    probed = next((run for run in runs if run.probes), None)
    text = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template).render(
        title=", ".join(family.name for family in families), script_hash=f"sha256-{digest}", families=families,
        figures=make_figures(families), probed=probed, blocks=probes_by_step(probed.probes) if probed else [],
        runs=runs, count_responses=count_responses,
    )  # fmt: skip
    return text.encode("utf-8", "replace").decode()  # unpaired surrogates of a model's text become "?"


def write_report(folders: list[Path]) -> Path:
    """Writes report.html into the first of the run directories. Raises ConfigError or OSError as read_run does."""
    target = Path(folders[0]) / "report.html"
    target.write_text(build_page([read_run(Path(folder)) for folder in folders]), encoding="utf-8")
    return target


def main() -> None:
    with command(__doc__):
        target = write_report(list(map(Path, sys.argv[1:])))
    print(f"{target}: {target.stat().st_size / 1e6:.2f} MB")
