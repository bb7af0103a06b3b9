"""The page of a run: bands by hand, what is drawn, that text is never markup, and runs that are broken or long."""

import base64
import hashlib
import json
import math
import random
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from report.page import (
    EXAMPLES, SECTIONS, Family, RunData, build_page, count_responses, even, group_by_seed, main, make_figures,
    read_run, write_report,
)  # fmt: skip

EVIL = '</script><script>alert(1)</script><img src=x onerror=alert(2)>\' x=" onload="alert(3) & <!--BODY--> <!--'
TEXT = f"Bonn lies on the Rhine. {EVIL} \u2028 half \ud800 \U0001f600 Bonn"


def parse(text: str) -> tuple[list[tuple[str, dict]], list[str]]:
    """What a browser would see: tags with attributes, and text."""
    reader, tags, words = HTMLParser(convert_charrefs=True), [], []
    reader.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    reader.handle_data = words.append
    reader.feed(text)
    return tags, words


def sample(step: int, text: str = TEXT, title: str = "Bonn", url: str = "https://x.org/Bonn", **keys) -> dict:
    said = [{"text": r"It flows. \boxed{Rhine}", "finish": "answer", "correct": 1, "reward": 1.0}] * 3
    said.append({"text": EVIL, "finish": "length", "correct": 0, "reward": 0.0})
    mask = {"words": "Rhine", "invalid": "", "masked": text.replace("Rhine", "[mask]"), "target": "Rhine"}
    passage = {"id": f"{step}#0", "title": title, "url": url, "text": text}
    proposal = {"text": rf"{EVIL} \mask{{Rhine}}", "finish": "answer", "reward": 0.25}
    values = {"step": step, "passage": passage, "proposal": proposal, "predictions": said}
    return values | {"mask": mask | {"occurrences": 1, "start": 17, "label": ""}} | keys


def row(step: int, **keys) -> dict:
    values = {"reward": 0.5, "gen/valid_rate": 0.5, "gen/reward": 0.2, "gen/responses": 8, "pred/responses": 16}
    values |= {"pred/accuracy": 0.6, "pred/accuracy_histogram": [1, 0, 2], "time/update": 1.0, "loss": 0.1}
    return {"step": step, "method": "active"} | values | keys


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))


def write_run(folder: Path, rows: list[dict], samples: list[dict] = (), **config) -> Path:
    folder.mkdir(parents=True)
    write_rows(folder / "metrics.jsonl", rows)
    write_rows(folder / "samples.jsonl", samples)
    config = {"method": "active", "seed": 0, "steps": 100, "predictions_per_mask": 2, "run_dir": str(folder)} | config
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.txt").write_text("git: 0123abc\n")
    return folder


def read_page(*folders: Path) -> str:
    return write_report(list(folders)).read_text(encoding="utf-8")


def test_runs_that_differ_in_their_seed_are_one_band_with_mean_lowest_and_highest(tmp_path):
    names = {"a": (0, [1.0, 4.0]), "b": (1, [2.0, math.nan, 9.0]), "c": (2, [6.0])}
    runs = []
    for name, (seed, values) in names.items():
        rows = [row(step, loss=value) for step, value in enumerate(values, 1)]
        runs.append(read_run(write_run(tmp_path / name, rows, seed=seed)))
    other = read_run(write_run(tmp_path / "d", [row(1)], method="random_span", generator_reward="variance"))
    (band, alone) = group_by_seed([*runs, other])
    assert band.runs == runs and alone.runs == [other]
    assert band.name == "a (seed 0, 1, 2)" and alone.name == "d (seed 0)"
    series = band.series("loss")
    assert series.points == [(1, 3.0), (2, 4.0), (3, 9.0)]  # what is not finite is left out of the mean
    assert series.band == [(1, 1.0, 6.0), (2, 4.0, 4.0), (3, 9.0, 9.0)]
    assert alone.series("loss").band == []


def test_a_kind_of_mask_that_a_step_lacks_has_the_share_0_there(tmp_path):
    rows = [{"step": 0}, row(1, **{"gen/share_fact": 0.5}), row(2, **{"gen/invalid_no_answer": 0.25})]
    (family,) = group_by_seed([read_run(write_run(tmp_path / "run", rows))])
    assert family.series("gen/share_fact").points == [(1, 0.5), (2, 0.0)]
    assert family.series("gen/invalid_no_answer").points == [(1, 0.0), (2, 0.25)]


def test_masks_are_counted_and_so_are_the_answers_with_their_stored_verdicts():
    shaped = [{"text": r"\boxed{Rhine}", "correct": 1, "reward": -0.25}]
    wrong = [{"text": r"Or \boxed{Elbe}", "correct": 0, "reward": 0.5}] * 2
    invalid = {"words": "", "invalid": "no_answer", "masked": "", "target": ""}
    tasks = [sample(1, predictions=[], mask=invalid), sample(1, predictions=shaped), sample(1, predictions=wrong)]
    rhine, nothing = count_responses(tasks)
    assert (rhine["count"], rhine["task"]) == (2, tasks[1]) and (nothing["count"], nothing["answers"]) == (1, [])
    assert rhine["answers"] == [
        (2, "Elbe", r"Or \boxed{Elbe}", 0, 0.5), (1, "Rhine", r"\boxed{Rhine}", 1, -0.25)
    ]  # fmt: skip


def test_text_of_models_and_passages_is_never_markup(tmp_path):
    rows = [row(step, **{f"gen/invalid_{EVIL}": 0.1}) for step in (1, 2)]
    address = f"https://x.org/{EVIL}\"'"
    first = sample(1, title=EVIL, url=address)
    first["predictions"].append({"text": rf"So. \boxed{{{EVIL}}}", "finish": "eos", "correct": 0, "reward": 0.0})
    first["mask"] |= {"target": EVIL, "label": EVIL}
    samples = [first, sample(2, url="javascript:x")]
    folder = write_run(tmp_path / f"run {EVIL.replace('/', '')}", rows, samples, method=EVIL)
    write_rows(folder / "probes.jsonl", [first | {"proposal": None}, first])
    (folder / "environment.txt").write_text(EVIL)
    text = read_page(folder, write_run(tmp_path / "other", rows, [], method="cpt"))
    found, words = parse(text)
    assert sum(EVIL in some for some in words) > 10  # it is there, as text
    tags = [tag for tag, _ in found]
    assert tags.count("script") == 1 and "img" not in tags and tags.count("body") == 1
    assert not any(name.startswith("on") for _, attributes in found for name in attributes)
    assert [attributes["href"] for tag, attributes in found if tag == "a"] == [address] * 2  # of the probe, the example
    assert TEXT.replace("\ud800", "?") in words and "javascript:x" in words


def test_the_page_loads_nothing_and_runs_no_script_but_its_own(tmp_path):
    text = read_page(write_run(tmp_path / "run", [row(1), row(2)], [sample(1)]))
    tags, _ = parse(text)
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [a["content"] for tag, a in tags if tag == "meta" and "http-equiv" in a]
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}';" in policy
    assert not any("src" in attributes or tag == "link" for tag, attributes in tags)
    assert not re.search(r"@import|url\(|fetch\(|innerHTML", text)


def test_one_passage_shows_answers_and_masks_at_successive_probes(tmp_path):
    folder = write_run(tmp_path / "run", [row(step) for step in range(1, 41)])
    same = {"passage": sample(9)["passage"]}
    kinds = {"proposal": None}, {"predictions": []}  # the answers to a fixed mask, and what the generator masks
    probes = [sample(step, **kind, **same) for step in range(0, 41, 5) for kind in kinds]
    write_rows(folder / "probes.jsonl", probes)
    tags, words = parse(build_page([read_run(folder)]))
    words = [text for text in (" ".join(some.split()) for some in words) if text]
    assert [text for text in words if re.match(r"Step \d", text)] == [f"Step {n}" for n in (0, 10, 20, 30, 40)] * 2
    assert [tag for tag, keys in tags if keys.get("class") == "yes"] == ["li"] * 5  # right at each of the five
    assert words.count("3 x") == 5 and words.count(r"It flows. \boxed{Rhine}") == 5 and "Recovering Rhine" in words


def test_examples_are_spread_over_the_run_and_the_page_holds_how_it_was_made(tmp_path):
    rows = [{"step": 0}, *(row(step) for step in range(1, 101))]
    folder = write_run(tmp_path / "run", rows, [sample(step) for step in range(1, 101)], temperature=0.875)
    _, words = parse(read_page(folder))
    steps = [int(found[1]) for found in (re.match(r"Step (\d+):", text) for text in words) if found]
    assert len(steps) == 20 and steps[0] == 1 and steps[-1] == 100 and steps == sorted(steps)
    assert any("temperature: 0.875" in text and "git: 0123abc" in text for text in words)


@pytest.mark.parametrize("rows", [
    [{"step": 0, "method": "active", "probe/accuracy": 0.5}], [{"step": 1, "method": "cpt"}], [row(7)],
    [row(1, reward=math.nan, loss=math.inf, **{"pred/accuracy": math.nan, "gen/reward": math.nan}), row(2, lr=0)],
    [row(1, **{"pred/accuracy_histogram": [0, 0, 0], "gen/valid_rate": 0.0, "pred/accuracy": 0.0})],
    [row(1, mismatch_kl=0.0, mismatch_abs=0.0), row(2, mismatch_kl=1e-9, mismatch_abs=math.nan, lr=1e-300)],
])  # fmt: skip
def test_a_run_that_is_young_or_broken_still_makes_a_page(tmp_path, rows):
    folder = write_run(tmp_path / "run", rows)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "meth')  # it is being written
    (folder / "samples.jsonl").unlink()
    text = read_page(folder)
    assert "run (seed 0)" in text and "nan" not in re.sub(r"<script.*", "", text, flags=re.DOTALL)


def test_the_probes_kinds_share_a_chart_in_one_run_and_have_their_own_where_runs_are_compared(tmp_path):
    kinds = {"": 0.2, "_copy": 0.1, "_fact": 0.3, "_greedy_copy": 0.4, "_no_thought": 0.5, "_no_thought_fact": 0.6}
    rows = [row(1, **{f"probe/accuracy{kind}": value for kind, value in kinds.items()})]
    families = [Family(name, [RunData(name, {}, rows, [], [], "")]) for name in "ab"]
    of_one, of_two = (make_figures(some)["Held-out passages"] for some in (families[:1], families))
    assert {one["title"]: [text for _, text in one["legend"]] for one in of_one} == {
        "probe/accuracy": ["0.2"], "probe/accuracy_greedy_*": ["copy 0.4"],
        "probe/accuracy_no_thought*": ["fact 0.6", "all 0.5"], "probe/accuracy_*": ["copy 0.1", "fact 0.3"],
    }  # fmt: skip
    assert {one["title"] for one in of_two} == {f"probe/accuracy{kind}" for kind in kinds}


def test_two_thousand_steps_of_long_responses_stay_under_three_megabytes(tmp_path):
    """Of one run each step that is shown has a paper-like sample: 8 masks, 8 predictions of 4,000 characters."""
    rng = random.Random(0)
    keys = [key for key in row(1) if key not in ("step", "method", "pred/accuracy_histogram")]
    keys += [key for lines in SECTIONS.values() for key, *_ in lines if "*" not in key]
    keys += ["gen/share_fact", "gen/share_copy", "gen/share_noise", "gen/invalid_too_long"]
    folders = []
    for name in "ab":
        rows = [row(step, **{key: rng.random() for key in keys}) for step in range(1, 2001)]
        rows = [one | {"pred/accuracy_histogram": [rng.randrange(30) for _ in range(9)]} for one in rows]
        samples = []
        for step in even(list(range(1, 2001)), EXAMPLES) if name == "a" else ():
            for n in range(8):
                said = [{"text": f"{rng.random()} Größe 東 " * 250, "correct": 0, "reward": 0.0} for _ in range(8)]
                task = sample(step, text="Über den Rhine 北京 " * 250, predictions=said)
                samples.append(task | {"mask": task["mask"] | {"words": f"Rhine {n}"}})
        folders.append(write_run(tmp_path / name, rows, samples, method=name))
    target = write_report(folders)
    assert 500_000 < target.stat().st_size < 3_000_000
    lines = re.findall(r'class="line [^>]* d="([^"]*)"', target.read_text())
    assert len(lines) > 40 and all(line.count("L") < 200 for line in lines)


def test_the_command_writes_the_page_or_says_in_one_line_why_not(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "run", [row(1)])
    monkeypatch.setattr(sys, "argv", ["report/", str(folder)])
    main()
    assert capsys.readouterr().out.startswith(f"{folder / 'report.html'}: 0.0")
    for words in ([str(tmp_path)], [str(tmp_path / "none")], [str(folder), str(tmp_path)]):
        monkeypatch.setattr(sys, "argv", ["report/", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1
