"""Claims can fail, tables are arithmetic, README.md is what the record says, and `run` makes only what is missing."""

import copy
import doctest
import json
import random
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from reference import ROOT, tiny_config

import claims
import experiments
import outcomes
import worlds
from benchmarks.judge import check_answers
from charts import Series, line_chart, stand_alone
from claims import CLAIMS
from data import Passage
from masking import make_mask
from outcomes import blocks, fill, interval, load_results

BASE = {"fact": 0.25, "greedy_fact": 0.15, "template": 1.0, "copy": 0.9, "greedy_copy": 1.0, "noise": 0.0}
BASE |= {"shown": 0.2, "greedy_shown": 0.2, "unseen": 0.2, "greedy_unseen": 0.2}
BASE |= {"all": 0.5, "greedy": 0.15, "no_thought": 0.5, "greedy_no_thought": 0.15}


def made(arm: str, seed: int = 10, accuracy: float = 0.5, share: float = 0.0, **ends) -> dict:
    """A line of the record: BASE at step 0, `ends` at step 100, flat curves, round totals."""
    totals = dict.fromkeys(claims.TOTALS, 2000) | {"flops": 3e11}
    curves = {key: [0.0] * 20 for key in claims.CURVES}
    curves |= {"pred/accuracy": [accuracy] * 20, "gen/share_fact": [share] * 20}
    ends.setdefault("greedy_no_thought", ends.get("greedy", BASE["greedy"]))
    probes = [{"step": 0, **BASE}, {"step": 100, **BASE, **ends}]
    return {"arm": arm, "seed": seed, "words": [], "seconds": 1.0, "probes": probes, "curves": curves, "totals": totals}


HELD = [  # one run per arm in which every claim holds
    made("active", accuracy=0.4, share=0.9, fact=0.6, greedy_fact=0.7, copy=0.8),
    made("rewards shuffled", fact=0.1),
    made("random_span", fact=0.4),
    made("frozen generator", fact=0.3),
    made("active, 1 of 4 masks random", fact=0.55),
    made("sft", fact=0.6, greedy_fact=0.7),
    made("cpt", copy=0.7),
    made("random_token"),
    made("entropy_token, top 20 %"),
    made("entropy_token, top 60 %", fact=0.5),
    made("active, G = 4", accuracy=0.5),
    made("active, G = 16", accuracy=0.3),
    made("active, two facts", greedy_fact=0.5, greedy_shown=0.2, greedy_unseen=0.1),
    made("active, two facts, 200 steps", greedy_fact=0.5),
    made("cpt, two facts", greedy_shown=0.4),
    made("rlvr", accuracy=0.5, greedy=0.2),
    made("random_span, then rlvr", greedy=0.4),
    made("active, then rlvr", accuracy=0.8, greedy=0.6),
]
FAILS = [  # claim, arm, and an end of its run that alone makes the claim fail
    ("learns", "active", {"greedy_fact": 0.49}),
    ("learns", "rewards shuffled", {"fact": 0.31}),
    ("finds facts", "random_span", {"fact": 0.53}),
    ("finds facts", "frozen generator", {"fact": 0.53}),
    ("keeps copies", "active, 1 of 4 masks random", {"copy": 0.86}),
    ("keeps copies", "active, 1 of 4 masks random", {"fact": 0.49}),
    ("given answers", "sft", {"greedy_fact": 0.79}),
    ("given answers", "cpt", {"copy": 0.81}),
    ("entropy", "entropy_token, top 20 %", {"fact": 0.31}),
    ("entropy", "entropy_token, top 60 %", {"fact": 0.29}),
    ("never masked", "active, two facts", {"greedy_fact": 0.34}),
    ("never masked", "active, two facts", {"greedy_shown": 0.26}),
    ("never masked", "active, two facts", {"greedy_unseen": 0.26}),
    ("never masked", "cpt, two facts", {"greedy_shown": 0.29}),
    ("never masked", "cpt, two facts", {"greedy_unseen": 0.26}),
    ("never masked, longer", "active, two facts, 200 steps", {"greedy_fact": 0.44}),
    ("never masked, longer", "active, two facts, 200 steps", {"greedy_shown": 0.26}),
    ("never masked, longer", "active, two facts, 200 steps", {"greedy_unseen": 0.26}),
    ("before rlvr", "rlvr", {"greedy": 0.26}),
    ("before rlvr", "active, then rlvr", {"greedy": 0.49}),
    ("before rlvr", "random_span, then rlvr", {"greedy": 0.51}),
    ("no thought", "active, two facts", {"greedy_no_thought": 0.12}),
]
CURVED = [  # the same for curves
    ("finds facts", "active", "gen/share_fact", 0.49),
    ("finds facts", "active", "gen/share_noise", 0.06),
    ("difficulty", "active, G = 4", "pred/accuracy", 0.39),
    ("difficulty", "active, G = 16", "pred/accuracy", 0.41),
    ("never masked", "active, two facts", "gen/share_shown", 0.01),
    ("before rlvr", "active, then rlvr", "pred/accuracy", 0.5),
]


def held() -> claims.Results:
    return {run["arm"]: [copy.deepcopy(run)] for run in HELD}


def test_a_claim_holds_in_runs_made_to_its_words():
    assert {name: claim.test(held()) for name, claim in CLAIMS.items()} == dict.fromkeys(CLAIMS, True)


@pytest.mark.parametrize(("name", "arm", "ends"), FAILS)
def test_each_part_of_a_claim_can_fail(name, arm, ends):
    results = held()
    results[arm][0]["probes"][-1] |= ends
    assert not CLAIMS[name].test(results)


@pytest.mark.parametrize(("name", "arm", "curve", "value"), CURVED)
def test_each_part_about_training_can_fail(name, arm, curve, value):
    results = held()
    results[arm][0]["curves"][curve] = [value] * 20
    assert not CLAIMS[name].test(results)


def test_one_bad_seed_is_enough_where_every_seed_is_claimed():
    results = held()
    results["active"].append(made("active", seed=11, share=0.9, fact=0.6, greedy_fact=0.4))
    assert not CLAIMS["learns"].test(results)


def test_every_claim_is_tried_and_names_its_arms():
    assert {name for name, *_ in FAILS + CURVED} == set(CLAIMS)
    assert {arm for claim in CLAIMS.values() for arm in claim.arms} == set(claims.ARMS)


def test_late_is_the_last_20_steps_and_late_accuracy_begins_after_40():
    run = made("active")
    run["curves"]["pred/accuracy"] = [1.0] * 8 + [0.25] * 8 + [0.0, 1.0, 1.0, 1.0]  # means of five steps
    assert claims.late(run, "pred/accuracy") == 0.75
    assert claims.late_accuracy([run]) == pytest.approx((8 * 0.25 + 3) / 12)


def test_differences_go_by_seed_and_leave_out_what_only_one_arm_has():
    results = {"a": [made("a", 10, fact=0.5), made("a", 12, fact=0.75)], "b": [made("b", 12, fact=0.5), made("b", 13)]}
    assert claims.over(results, "a", "b", "fact") == [0.25]


# ------------------------------------------------------------------------------------------------------------- tables


def test_examples_in_the_docstrings():
    assert doctest.testmod(outcomes).failed == 0


def test_interval_is_students_t():
    # mean 0.3, standard deviation sqrt((0.04 + 0.01 + 0 + 0.01 + 0.04) / 4) = 0.158; 2.776 * 0.158 / sqrt(5) = 0.196
    assert interval([0.1, 0.2, 0.3, 0.4, 0.5]) == "0.30 ± 0.20"
    assert interval([0.5] * 11) == "0.50"


def test_tables_by_hand():
    pair = [made("active", 10, share=0.9, fact=0.5, copy=0.8), made("active", 11, share=0.7, fact=0.7, copy=0.8)]
    results = {"active": pair, "random_span": [made("random_span", 11, fact=0.4)]}
    cells = "0.60 ± 1.27 | 0.15 ± 0.00 | 1.00 ± 0.00 | 0.80 ± 0.00 | 1.00 ± 0.00 | 0.80 | 2.0k | 2.0k | 3.0e+11 | 2"
    assert outcomes.methods_table(results).split("\n")[2:] == [
        "| start | 0.25 | 0.15 | 1.00 | 0.90 | 1.00 |  |  |  |  |  |",
        f"| active | {cells} |",
        "| random_span | 0.40 | 0.15 | 1.00 | 0.90 | 1.00 |  | 2.0k | 2.0k | 3.0e+11 | 1 |",
    ]
    (row,) = outcomes.differences_table(results).split("\n")[2:]
    assert row == "| active - random_span | facts, sampled | 0.30 | 0.30, 0.30 |"


def test_tables_of_the_variants_by_hand():
    results = {
        "active, two facts": [
            made("active, two facts", seed, greedy_fact=end) for seed, end in ((10, 0.35), (11, 0.45))
        ],
        "rlvr": [made("rlvr", accuracy=0.5, greedy=0.2, all=0.4)],
    }
    may, shown, _ = outcomes.never_masked_table(results).split("\n")[2:]
    told = "0.15 | 0.40 ± 0.64 | 0.25 ± 0.64 | 0.20, 0.30 | 0.25 | 0.25 ± 0.00"
    assert may == f"| active, two facts | may be masked | {told} |"
    told = "0.20 | 0.20 ± 0.00 | 0.00 ± 0.00 | 0.00, 0.00 | 0.20 | 0.20 ± 0.00"
    assert shown == f"| active, two facts | read, never masked | {told} |"
    assert outcomes.rlvr_table(results).split("\n")[2] == "| rlvr | 0.15 | 0.20 | 0.50 | 0.40 | 0.50 | 1 |"
    assert outcomes.thought_table(results).split("\n")[3] == "| rlvr | 0.20 | 0.20 | 0.40 | 0.50 |"


def test_a_failed_claim_is_bold_and_one_without_runs_is_left_out():
    results = {arm: runs for arm, runs in held().items() if arm in ("active", "rewards shuffled", "sft")}
    lines = outcomes.claims_table(results).split("\n")
    assert len(lines) == 3 and lines[2].startswith("| learns |") and lines[2].endswith("| 1 | yes |")
    results["active"][0]["probes"][-1]["greedy_fact"] = 0.2
    line = outcomes.claims_table(results).split("\n")[2]
    assert line.startswith("| **learns** |") and line.endswith("| **failed** |")


def test_of_two_lines_for_a_run_the_later_counts_and_an_unknown_arm_is_refused(tmp_path):
    record = tmp_path / "runs.jsonl"
    rows = [made("sft", 11, fact=0.1), made("sft", 10), made("sft", 11, fact=0.9), made("active", 10)]
    record.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = load_results(record)
    assert [(arm, [run["seed"] for run in runs]) for arm, runs in results.items()] == [
        ("active", [10]),
        ("sft", [10, 11]),
    ]
    assert claims.final(results["sft"][1], "fact") == 0.9
    record.write_text(json.dumps(made("magic")) + "\n")
    with pytest.raises(ValueError, match="unknown arm 'magic'"):
        load_results(record)
    with pytest.raises(ValueError, match="no runs"):
        load_results(tmp_path / "nothing.jsonl")


# --------------------------------------------------------------------------------------------------- plots and README


def test_a_band_is_the_mean_and_the_extremes_of_seeds_at_each_step():
    results = {"active": [made("active", 10, fact=0.5), made("active", 11, fact=0.75)]}
    series = outcomes.probed(results, "active", "fact")
    assert series.points == [(0, 0.25), (100, 0.625)] and series.band == [(0, 0.25, 0.25), (100, 0.5, 0.75)]
    assert outcomes.trained(results, "active", "pred/accuracy").points[:2] == [(3, 0.5), (8, 0.5)]


def test_a_plot_alone_is_xml_with_its_title_names_and_both_themes():
    names = ["<script>", "a & b", *("a name of some length",) * 3]
    chart = line_chart([Series(name, [(0, 0.0), (1, 1.0)]) for name in names], "label")
    text = stand_alone(chart, "Title", "how to read it", names)
    tree = ElementTree.fromstring(text)
    words = [element.text for element in tree.iter() if element.tag.endswith("}text")]
    assert words[:2] == ["Title", "how to read it"] and words[2:7] == names
    assert "prefers-color-scheme: dark" in text and "var(" not in text
    boxes = [element for element in tree if element.tag.endswith("}rect") and "dot" in element.get("class")]
    assert len({(box.get("x"), box.get("y")) for box in boxes}) == 5 and all(float(box.get("x")) < 360 for box in boxes)


def test_blocks_are_put_between_markers_and_nothing_else_changes():
    text = "before\n<!-- a -->\nold\n<!-- /a -->\nbetween\n<!-- b --><!-- /b -->\nafter\n"
    new = "before\n<!-- a -->\n\nA\n\n<!-- /a -->\nbetween\n<!-- b -->\n\nB\n\n<!-- /b -->\nafter\n"
    assert fill(text, {"a": "A", "b": "B"}) == new == fill(new, {"a": "A", "b": "B"})


@pytest.mark.parametrize("text", ["", "<!-- a -->", "<!-- /a --> <!-- a -->", "<!-- a --> <!-- /a --> <!-- a -->"])
def test_a_marker_that_is_missing_is_an_error_that_names_it(text):
    with pytest.raises(ValueError, match="<!-- a --> and <!-- /a -->"):
        fill(text, {"a": "A"})


def test_nothing_is_written_where_a_marker_is_missing(tmp_path):
    (tmp_path / "README.md").write_text("<!-- claims -->\n")
    with pytest.raises(ValueError, match="claims"):
        outcomes.write_readme(tmp_path)
    assert (tmp_path / "README.md").read_text() == "<!-- claims -->\n" and len(list(tmp_path.iterdir())) == 1


def test_the_readme_and_the_plots_are_those_of_the_record():
    results = load_results(outcomes.RECORD)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert fill(text, blocks(results)) == text, "make figures"
    plots = {file: svg for file, (_, svg) in outcomes.draw_plots(results).items()}
    files = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / outcomes.FIGURES).iterdir()}
    assert files == plots, "make figures"


# -------------------------------------------------------------------------------------------------------------- runs


def test_run_makes_what_is_missing_seed_by_seed_and_what_was_run_with_other_words(tmp_path, monkeypatch):
    record, asked = tmp_path / "runs.jsonl", []

    def run_one(arm, seed):
        asked.append((arm, seed))
        return made(arm, seed) | {"words": claims.ARMS[arm]}

    monkeypatch.setattr(experiments, "run_one", run_one)
    monkeypatch.setattr(experiments, "RUNS", tmp_path / "runs")
    there = [made("active", 10) | {"words": claims.ARMS["active"]}, made("rewards shuffled", 10)]
    record.write_text("".join(json.dumps(row) + "\n" for row in there))
    experiments.run_missing(["learns"], [10, 11], record)
    assert asked == [("rewards shuffled", 10), ("active", 11), ("rewards shuffled", 11)]
    experiments.run_missing(["learns"], [10, 11], record)
    assert len(asked) == 3
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["questions.jsonl", "several.jsonl"]


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """train.py replaced by ten rows of metrics; the words of each call."""
    calls = []

    def run(words, env, **_):
        assert env["CUDA_VISIBLE_DEVICES"] == ""  # also on a machine with GPUs: digits are compared with the record
        calls.append(words)
        options = dict(word.split("=", 1) for word in words if "=" in word)
        folder = Path(options["run_dir"])
        folder.mkdir(parents=True)
        probe = {"probe/accuracy": 0.5, "probe/accuracy_fact": 0.123456}
        rows = [{"step": 0, **probe}]
        rows += [{"step": n, "reward": 1, "time/step": 2, "pred/accuracy": n / 10, "flops": n} for n in range(1, 11)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows[:-1], rows[-1] | probe]))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(experiments, "RUNS", tmp_path)
    monkeypatch.setattr(experiments.subprocess, "run", run)
    monkeypatch.setattr(experiments, "environment", lambda: "time: now\ngit: 123\n")
    return calls


def test_a_run_becomes_a_line_and_its_folder_goes(trained, tmp_path):
    row = experiments.run_one("active, two facts", 10)
    (words,) = trained
    assert words[-2:] == ["seed=10", f"run_dir={tmp_path / 'active-two-facts-10'}"] and "save_every=0" in words
    assert row["probes"] == [{"step": step, "all": 0.5, "fact": 0.1235} for step in (0, 10)]
    assert row["curves"]["pred/accuracy"] == [0.3, 0.8] and row["curves"]["gen/share_fact"] == [0, 0]
    assert row["totals"]["flops"] == 55 and row["seconds"] == 20 and row["environment"] == ["git: 123"]
    assert not list(tmp_path.iterdir())


def test_an_arm_that_starts_from_another_makes_that_first_and_starts_from_its_last_checkpoint(trained, tmp_path):
    row = experiments.run_one("active, then rlvr", 11)
    first, second = trained
    assert "configs/tiny.yaml" in first and "save_every=1000000" in first and "seed=11" in first
    assert "configs/tiny-rlvr.yaml" in second and "save_every=0" in second and "seed=11" in second
    assert f"model={tmp_path / 'active-11' / 'checkpoints' / 'latest' / 'hf'}" in second
    assert row["first"]["arm"] == "active" and row["seconds"] == 40 and not list(tmp_path.iterdir())


def test_a_run_that_fails_is_told_with_arm_seed_and_its_last_words(trained, monkeypatch):
    monkeypatch.setattr(experiments.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=3, stderr="no disk"))
    with pytest.raises(RuntimeError, match="sft, seed 12: exit status 3\nno disk"):
        experiments.run_one("sft", 12)


def test_again_tells_what_equals_the_record_and_tests_the_claim_on_fresh_seeds(tmp_path, monkeypatch, capsys):
    recorded = [run | {"seed": seed} for run in held()["active"] + held()["rewards shuffled"] for seed in (10, 11)]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in recorded))
    monkeypatch.setattr(experiments, "RECORD", tmp_path / "runs.jsonl")
    monkeypatch.setattr(experiments, "RUNS", tmp_path / "runs" / "experiments")

    def run_one(arm, seed):
        run = held()[arm][0] | {"seed": seed}
        if (arm, seed) == ("active", 11):
            run["probes"][-1]["fact"] += 1e-4
        run["probes"][-1]["greedy_fact"] -= lost if seed == 21 and arm == "active" else 0
        return run

    monkeypatch.setattr(experiments, "run_one", run_one)
    lost = 0
    assert experiments.again("learns") is True
    assert "3 of 4 runs of seeds (10, 11) equal the record" in capsys.readouterr().out
    lost = 0.5
    assert experiments.again("learns") is False
    assert "On the fresh seeds (20, 21): FAILS" in capsys.readouterr().out


def test_a_run_equals_the_record_in_the_probes_that_the_record_holds():
    old, new = made("active"), made("active")
    for probe in old["probes"]:
        del probe["greedy_no_thought"]
    assert experiments.same_probes(new, old)
    new["probes"][1]["fact"] += 1e-4
    assert not experiments.same_probes(new, old)


def test_commands_that_do_not_exist_end_with_status_2(capsys, monkeypatch):
    for words in ([], ["run", "no claim"], ["again"], ["paint"]):
        monkeypatch.setattr("sys.argv", ["experiments.py", *words])
        with pytest.raises(SystemExit) as ended:
            experiments.main()
        assert ended.value.code == 2 and "claims: learns" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- worlds


def test_two_facts_an_article_of_different_kinds_and_no_unseen_fact_in_training():
    rows = [json.loads(line) for line in worlds.make_several(0).splitlines()]
    tiers = worlds.make_tiers(0)
    subjects = {label: {fact.subject for kind in kinds for fact in kind} for label, kinds in tiers.items()}
    assert {label: len(names) for label, names in subjects.items()} == {"fact": 36, "shown": 24, "unseen": 24}
    assert len(set.union(*subjects.values())) == 84
    assert rows[0]["text"] == json.loads(worlds.make_several(0, 1))["text"]
    heldout = [worlds.is_heldout(row["url"], worlds.HELDOUT) for row in rows]
    assert 60 < sum(heldout) < 140
    for row, out in zip(rows, heldout, strict=True):
        words, stands = row["text"].split(), {label: row["labels"].count(label) for label in tiers}
        assert len(words) == len(row["labels"])
        if out:  # two sorts, each stated once
            assert sorted(stands.values()) == [0, 1, 1]
        else:
            assert (stands["fact"], stands["shown"], stands["unseen"]) in ((2, 0, 0), (1, 2, 0))
            assert not subjects["unseen"] & set(words)


def test_no_mask_of_a_shown_fact_is_valid_in_training_and_a_taught_one_is():
    config = tiny_config("", mask_rule="one_mask_words", max_occurrences=1, max_span_words=2)
    rows = [json.loads(line) for line in worlds.make_several(0, 200).splitlines()]
    rows = [row for row in rows if "shown" in row["labels"] and not worlds.is_heldout(row["url"], worlds.HELDOUT)]
    assert len(rows) > 50
    for row in rows:
        passage = worlds_passage(row)
        words = row["text"].split()
        for first, label in enumerate(row["labels"]):
            spans = [words[first : first + 1], words[first : first + 2], words[max(0, first - 1) : first + 1]]
            faults = [make_mask(" ".join(span), passage, config, random.Random(0)).invalid for span in spans]
            if label == "shown":
                assert all(faults), faults
            if label == "fact":
                assert not any(faults[:1]), faults


def worlds_passage(row: dict):
    return Passage(row["id"], row["title"], row["url"], row["text"], row["labels"])


def test_a_question_for_each_fact_with_the_fact_masked():
    rows = [json.loads(line) for line in worlds.make_questions(0).splitlines()]
    assert len({row["question"] for row in rows}) == 84
    for row, fact in zip(rows, worlds.make_facts(0), strict=True):
        words = row["question"].split()
        assert words.count("[mask]") == 1 and words.count(fact.subject) == 2
        assert row["answer"] == fact.right and fact.right not in words


def test_math_verify_tells_the_words_of_a_kind_apart():
    pairs = []
    for kind in worlds.KINDS:
        around = kind.values[1:] + kind.values[:1]
        pairs += [(value, other) for value, other in zip(kind.values, around, strict=True)]
        pairs += [(value, value) for value in kind.values]
    assert check_answers(pairs) == [float(gold == answer) for gold, answer in pairs]
