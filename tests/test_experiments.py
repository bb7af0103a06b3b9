"""Claims can fail, tables are arithmetic, pages are what the record says, and `run` makes only what is missing."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.judge import check_answers
from miniature import claims, real, runs, tables, worlds
from miniature.claims import CLAIMS
from miniature.tables import fill_blocks, interval, load_results, make_tables

BASE = {"fact": 0.25, "greedy_fact": 0.15, "template": 1.0, "copy": 0.9, "greedy_copy": 1.0, "noise": 0.0}
BASE |= {"shown": 0.2, "greedy_shown": 0.2, "unseen": 0.2, "greedy_unseen": 0.2, "no_thought": 0.5}
BASE |= {"hop3": 0.1, "hop4": 0.1, "no_thought_hop3": 0.0, "no_thought_hop4": 0.0, "thought_use": 0.0}
BASE |= {"hop1": 1.0, "hop2": 0.1, "no_thought_hop2": 0.0, "all": 0.5, "greedy": 0.15, "greedy_no_thought": 0.15}


def make_run(arm: str, seed: int = 10, accuracy: float = 0.5, share: float = 0.0, shape=(), **ends) -> dict:
    """A line of the record: BASE at step 0, `ends` at step 100, flat curves but for `shape`, round totals."""
    totals = dict.fromkeys(claims.TOTALS, 2000) | {"flops": 3e11}
    curves = {key: [0.0] * 20 for key in claims.CURVES}
    curves |= {"pred/accuracy": [accuracy] * 20, "gen/share_fact": [share] * 20} | dict(shape)
    ends.setdefault("greedy_no_thought", ends.get("greedy", BASE["greedy"]))
    probes = [{"step": 0, **BASE}, {"step": 100, **BASE, **ends}]
    return {"arm": arm, "seed": seed, "words": [], "seconds": 1.0, "probes": probes, "curves": curves, "totals": totals}


HOLDING = {  # one run per arm in which every claim holds
    "active": {"accuracy": 0.4, "share": 0.9, "fact": 0.6, "greedy_fact": 0.7, "copy": 0.8},
    "rewards shuffled": {"fact": 0.1}, "random_span": {"fact": 0.4}, "frozen generator": {"fact": 0.3},
    "active, 1 of 4 masks random": {"fact": 0.55}, "sft": {"fact": 0.6, "greedy_fact": 0.7}, "cpt": {"copy": 0.7},
    "random_token": {}, "entropy_token, top 20 %": {}, "entropy_token, top 60 %": {"fact": 0.5},
    "active, G = 4": {"accuracy": 0.5}, "active, G = 16": {"accuracy": 0.3},
    "active, two facts": {"greedy_fact": 0.5, "greedy_shown": 0.2, "greedy_unseen": 0.1},
    "active, two facts, 200 steps": {"greedy_fact": 0.5}, "cpt, two facts": {"greedy_shown": 0.4},
    "active, 500 steps": {"fact": 0.96, "copy": 0.97, "shape": {"gen/share_copy": [0.0] * 19 + [0.3]}},
    "random_span, 500 steps": {"fact": 0.9}, "rlp": {}, "quiet_star": {"copy": 0.65},
    "rlvr": {"accuracy": 0.5, "greedy": 0.2}, "random_span, then rlvr": {"greedy": 0.4},
    "active, then rlvr": {"accuracy": 0.8, "greedy": 0.6},
    "ladder: active": {"hop3": 0.9, "hop4": 0.9, "thought_use": 0.3, "shape": {
        "pred/length_mean": [5.0] * 10 + [10.0] * 10, "gen/share_hop2": [0.05] * 4 + [0.3] * 4 + [0.2] * 12,
        "gen/share_hop4": [0.05] * 4 + [0.2] * 4 + [0.4] * 12}},
    "ladder: random_span": {"shape": {"pred/length_mean": [5.0] * 10 + [8.0] * 10}}, "ladder: frozen generator": {},
    "ladder: rewards shuffled": {"shape": {"pred/length_mean": [5.0] * 20}}, "ladder: sft, bare answers": {},
    "ladder: star": {}, "ladder: rlp": {"hop4": 0.4}, "ladder: quiet_star": {},
}  # fmt: skip
FAILS = {  # claim -> arm, probe or curve, and a value of it that alone makes the claim fail
    "learns": [("active", "greedy_fact", 0.49), ("rewards shuffled", "fact", 0.31)],
    "finds facts": [("random_span", "fact", 0.53), ("frozen generator", "fact", 0.53),
                    ("active", "gen/share_fact", 0.49), ("active", "gen/share_noise", 0.06)],
    "keeps copies": [("active, 1 of 4 masks random", "copy", 0.86), ("active, 1 of 4 masks random", "fact", 0.49)],
    "comes back": [("active, 500 steps", "copy", 0.95), ("active, 500 steps", "fact", 0.9),
                   ("active, 500 steps", "gen/share_copy", 0.29), ("random_span, 500 steps", "fact", 0.92)],
    "thoughts in the text": [("rlp", "fact", 0.4), ("rlp", "copy", 0.75), ("quiet_star", "fact", 0.5), (
        "quiet_star", "copy", 0.75), ("rlp", "greedy_fact", 0.55), ("quiet_star", "greedy_fact", 0.55)],
    "given answers": [("sft", "greedy_fact", 0.79), ("sft", "copy", 0.86), ("cpt", "copy", 0.81)],
    "entropy": [("entropy_token, top 20 %", "fact", 0.31), ("entropy_token, top 60 %", "fact", 0.29)],
    "difficulty": [("active, G = 4", "pred/accuracy", 0.39), ("active, G = 16", "pred/accuracy", 0.41)],
    "never masked": [("active, two facts", "greedy_fact", 0.34), ("active, two facts", "greedy_shown", 0.26),
                     ("active, two facts", "greedy_unseen", 0.26), ("cpt, two facts", "greedy_shown", 0.29),
                     ("cpt, two facts", "greedy_unseen", 0.26), ("active, two facts", "gen/share_shown", 0.01)],
    "never masked, longer": [("active, two facts, 200 steps", f"greedy_{label}", value)
                             for label, value in (("fact", 0.44), ("shown", 0.26), ("unseen", 0.26))],
    "before rlvr": [("rlvr", "greedy", 0.26), ("active, then rlvr", "greedy", 0.49),
                    ("random_span, then rlvr", "greedy", 0.51), ("active, then rlvr", "pred/accuracy", 0.5)],
    "no thought": [("active, two facts", "greedy_no_thought", 0.12), ("active, then rlvr", "greedy_no_thought", 0.5)],
    "thoughts grow": [("ladder: active", "pred/length_mean", 9.0), ("ladder: random_span", "pred/length_mean", 11.0)],
    "thoughts pay": [("ladder: active", "hop4", 0.49), ("ladder: active", "no_thought_hop3", 0.41),
                     ("ladder: active", "thought_use", 0.19), ("ladder: sft, bare answers", "hop3", 0.35),
                     ("ladder: rewards shuffled", "hop4", 0.16)],
    "climbs": [("ladder: active", "gen/share_hop4", 0.05), ("ladder: active", "gen/share_hop2", 0.01),
               ("ladder: frozen generator", "gen/share_hop3", 0.31)],
    "relatives": [("ladder: star", "hop4", 0.26), ("ladder: rlp", "hop4", 0.29), ("ladder: quiet_star", "hop4", 0.2)],
}  # fmt: skip


def holding() -> claims.Results:
    results = {arm: [make_run(arm, **ends)] for arm, ends in HOLDING.items()}
    results["active, 500 steps"][0]["probes"].insert(1, {"step": 50, **BASE, "copy": 0.84})  # forgets, and comes back
    return results


def test_a_claim_holds_in_runs_made_to_its_words():
    assert {name: claim.holds(holding()) for name, claim in CLAIMS.items()} == dict.fromkeys(FAILS, True)
    assert {arm for claim in CLAIMS.values() for arm in claim.arms} == set(claims.ARMS)
    results = holding()  # one bad seed is enough where every seed is claimed
    results["active"].append(make_run("active", seed=11, share=0.9, fact=0.6, greedy_fact=0.4))
    assert not CLAIMS["learns"].holds(results)


@pytest.mark.parametrize(("name", "arm", "key", "value"), [(name, *fail) for name in FAILS for fail in FAILS[name]])
def test_each_part_of_a_claim_can_fail(name, arm, key, value):
    results = holding()
    run = results[arm][0]
    if "/" in key:
        run["curves"][key] = [value] * 20
    else:
        run["probes"][-1][key] = value
    assert not CLAIMS[name].holds(results)


def test_late_is_the_last_20_steps_or_those_after_40_and_differences_go_by_seed():
    run = make_run("active")
    run["curves"]["pred/accuracy"] = [1.0] * 8 + [0.25] * 8 + [0.0, 1.0, 1.0, 1.0]  # means of five steps
    assert claims.late([run], "pred/accuracy") == [0.75]
    assert claims.late([run], "pred/accuracy", 8) == [pytest.approx((8 * 0.25 + 3) / 12)]
    pair = [make_run("a", 10, fact=0.5), make_run("a", 12, fact=0.75)]
    assert claims.differences(pair, [make_run("b", 12, fact=0.5), make_run("b", 13)], "fact") == [0.25]


def test_interval_is_students_t_and_no_zero_is_negative():
    # mean 0.3, standard deviation sqrt((0.04 + 0.01 + 0 + 0.01 + 0.04) / 4) = 0.158; 2.776 * 0.158 / sqrt(5) = 0.196
    assert interval([0.1, 0.2, 0.3, 0.4, 0.5]) == "0.30 ± 0.20"
    assert interval([0.5, 0.7]) == "0.60 ± 1.27" and interval([0.5] * 11) == "0.50"
    assert tables.lowest_highest([-0.001, 0.25]) == "0.00, 0.25"


def test_tables_by_hand():
    pair = [make_run("active", 10 + n, share=0.9 - n / 5, fact=0.5 + n / 5, copy=0.8) for n in (0, 1)]
    two_facts = [make_run("active, two facts", seed, greedy_fact=end) for seed, end in ((10, 0.35), (11, 0.45))]
    thinks = [make_run("ladder: star", hop3=0.5, hop4=0.75, no_thought_hop4=0.25, thought_use=0.125)]
    thinks[0]["curves"]["pred/length_mean"] = [4.0] * 19 + [8.0]
    results = {"active": pair, "random_span": [make_run("random_span", 11, fact=0.4)], "active, two facts": two_facts}
    results |= {"rlvr": [make_run("rlvr", accuracy=0.5, greedy=0.2, all=0.4)], "ladder: star": thinks}
    made = make_tables(holding() | results)
    cells = "0.60 ± 1.27 | 0.15 ± 0.00 | 1.00 ± 0.00 | 0.80 ± 0.00 | 0.80 | 2.0k | 2.0k | 3.0e+11"
    for row in (
        "| start | 0.25 | 0.15 | 1.00 | 0.90 |  |  |  |  |", f"| active | {cells} |",
        "| random_span | 0.40 | 0.15 | 1.00 | 0.90 |  | 2.0k | 2.0k | 3.0e+11 |",
    ):
        assert row in made["methods"].split("\n")
    assert "| active - random_span | facts, sampled | 0.30 | 0.30, 0.30 |" in made["differences"]
    cells = "0.15 | 0.40 ± 0.64 | 0.25 ± 0.64 | 0.25 ± 0.00"
    assert f"| active, two facts | may be masked | {cells} |" in made["never masked"]
    assert "| rlvr | 0.15 | 0.20 | 0.50 | 0.40 | 0.50 |" in made["rlvr"]
    assert "| star | 0.50 | 0.75 | 0.25 | 0.12 | 4.0 5.0 | 0.00 | 2k 2k |" in made["ladder"]


def test_a_failed_claim_is_bold():
    results = holding()
    assert make_tables(results)["claims"] == f"Held: {', '.join(CLAIMS)}."
    results["active"][0]["probes"][-1]["greedy_fact"] = 0.2
    line = make_tables(results)["claims"]
    assert line.startswith("Held: f") and line.endswith(" **Failed: learns, given answers, thoughts in the text.**")


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_of_two_lines_for_a_run_the_later_counts_and_an_arm_without_runs_is_named(tmp_path):
    rows = [make_run("sft", 11, fact=0.1), make_run("sft", 10), make_run("sft", 11, fact=0.9), make_run("active", 10)]
    results = load_results(write_rows(tmp_path / "runs.jsonl", rows), claims.ARMS)
    assert [(arm, run["seed"]) for arm in results for run in results[arm]] == [("active", 10), ("sft", 10), ("sft", 11)]
    assert claims.ends(results["sft"], "fact") == [0.25, 0.9]
    with pytest.raises(ValueError, match="no run of random_span, frozen generator"):
        tables.write_pages(tmp_path, tmp_path / "runs.jsonl")


def test_blocks_are_put_between_their_markers_on_whatever_page_and_nothing_else_changes():
    first = "before\n<!-- first run -->\n<!-- a -->\nold\n<!-- /a -->\nafter\n"
    blocks = {"a": "A", "b": "B \\1"}
    filled = fill_blocks({"a.md": first, "b.md": "<!-- b -->\n<!-- /b -->\n", "c.md": "text"}, blocks)
    assert filled == {
        "a.md": "before\n<!-- first run -->\n<!-- a -->\n\nA\n\n<!-- /a -->\nafter\n",
        "b.md": "<!-- b -->\n\nB \\1\n\n<!-- /b -->\n", "c.md": "text",
    }  # fmt: skip
    assert fill_blocks(filled, blocks) == filled


@pytest.mark.parametrize("marks", [
    [], ["a", "/a", "a", "/a"], ["a"], ["/a", "a"], ["/a", "a", "/a"], ["a", "a", "/a"], ["a", "b", "/a", "/b"],
])  # fmt: skip
def test_a_wrong_marker_is_an_error_that_names_it(marks):
    with pytest.raises(ValueError, match="<!-- [ab] -->, then <!-- /[ab] -->: each must stand once in x.md"):
        fill_blocks({"x.md": "\n".join(f"<!-- {mark} -->" for mark in marks)}, {"a": "A", "b": "B"})


def test_the_pages_and_the_plots_are_those_of_the_record(tmp_path):
    (tmp_path / "docs").mkdir()
    for page in tables.PAGES:
        (tmp_path / page).write_bytes((tables.PROJECT / page).read_bytes())
    for path in tables.write_pages(tmp_path):
        assert path.read_bytes() == (tables.PROJECT / path.relative_to(tmp_path)).read_bytes(), "make figures"
    figures = tables.PROJECT / "assets/figures"
    assert {path.name for path in figures.iterdir()} == {f"{name}.svg" for name in tables.PLOTS}
    (tmp_path / "docs/ladder.md").write_text("<!-- claims -->\nold\n<!-- /claims -->\n")
    with pytest.raises(ValueError, match="must stand once"):
        tables.write_pages(tmp_path)
    assert "old" in (tmp_path / "docs/ladder.md").read_text()  # nothing is written where a block is missing


def test_run_makes_what_is_missing_seed_by_seed_and_what_was_run_with_other_keys(tmp_path, monkeypatch):
    asked = []

    def run_arm(arm, seed):
        asked.append((arm, seed))
        return make_run(arm, seed) | {"words": claims.ARMS[arm]}

    monkeypatch.setattr(runs, "run_arm", run_arm)
    monkeypatch.setattr(runs, "RUNS", tmp_path / "runs")
    recorded = [make_run("active", 10) | {"words": claims.ARMS["active"]}, make_run("rewards shuffled", 10)]
    record = write_rows(tmp_path / "runs.jsonl", recorded)
    runs.run_missing(["learns"], [10, 11], record)
    assert asked == [("rewards shuffled", 10), ("active", 11), ("rewards shuffled", 11)]
    runs.run_missing(["learns"], [10, 11], record)
    assert len(asked) == 3
    made = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert made == ["questions.jsonl", "several.jsonl"]


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
        probe = {"probe/accuracy": 0.5, "probe/accuracy_fact": 0.123456, "probe/thought_use": 0.25}
        rows = [{"step": 0, **probe}]
        rows += [{"step": n, "reward": 1, "time/step": 2, "pred/accuracy": n / 10, "flops": n} for n in range(1, 11)]
        write_rows(folder / "metrics.jsonl", [*rows[:-1], rows[-1] | probe | {"peak_memory_gb": 1.0}])
        config = dict.fromkeys(claims.KEYS, 2) | {"seed": int(options["seed"]), "steps": 10}
        (folder / "config.yaml").write_text(json.dumps(config))
        (folder / "environment.txt").write_text("time: now\ngit: 123\n")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(runs, "RUNS", tmp_path)
    monkeypatch.setattr(runs.subprocess, "run", run)
    return calls


def test_a_run_becomes_a_line_and_its_folder_goes(trained, tmp_path):
    row = runs.run_arm("active, two facts", 10)
    (words,) = trained
    assert "configs/tiny.yaml" in words and "max_span_words=2" in words and {"seed=10", "save_every=0"} < set(words)
    assert row["probes"] == [{"step": step, "all": 0.5, "fact": 0.1235, "thought_use": 0.25} for step in (0, 10)]
    assert row["curves"]["pred/accuracy"] == [0.3, 0.8] and row["curves"]["gen/share_fact"] == [0, 0]
    assert row["totals"]["flops"] == 55 and row["seconds"] == 20 and row["environment"] == ["git: 123"]
    assert not list(tmp_path.iterdir())


def test_an_arm_that_starts_from_another_makes_that_first_and_starts_from_its_last_checkpoint(trained, tmp_path):
    row = runs.run_arm("active, then rlvr", 11)
    first, second = trained
    assert "configs/tiny.yaml" in first and "save_every=1000000" in first and "seed=11" in first
    assert "configs/tiny-rlvr.yaml" in second and "save_every=0" in second and "seed=11" in second
    (folder,) = (word.removeprefix("run_dir=") for word in first if word.startswith("run_dir="))
    assert f"model={folder}/checkpoints/latest/hf" in second and f"run_dir={folder}" not in second
    assert row["arm"] == "active, then rlvr" and row["seed"] == 11 and not list(tmp_path.iterdir())


def test_commands_that_do_not_exist_end_with_status_2(capsys):
    for words in ([], ["run", "no claim"], ["again"], ["paint"], ["keep", "run"], ["figures", "all"]):
        with pytest.raises(SystemExit) as ended:
            runs.main(words)
        assert ended.value.code == 2 and "claims: learns" in capsys.readouterr().err


def test_two_facts_an_article_of_different_kinds_and_no_unseen_fact_in_training():
    rows, facts = [json.loads(line) for line in worlds.make_several().splitlines()], worlds.FACTS
    subjects = {label: {facts[28 * kind + n].subject for kind in range(3) for n in part}
                for label, part in worlds.PARTS.items()}  # fmt: skip
    assert {label: len(names) for label, names in subjects.items()} == {"fact": 36, "shown": 24, "unseen": 24}
    assert len(set.union(*subjects.values())) == 84
    heldout = [worlds.is_heldout(row["url"], worlds.HELDOUT) for row in rows]
    assert 60 < sum(heldout) < 140
    for row, out in zip(rows, heldout, strict=True):
        words, stands = row["text"].split(), {label: row["labels"].count(label) for label in subjects}
        assert len(words) == len(row["labels"])
        if out:  # two sorts, each stated once
            assert sorted(stands.values()) == [0, 1, 1]
        else:
            assert (stands["fact"], stands["shown"], stands["unseen"]) in ((2, 0, 0), (1, 2, 0))
            assert not subjects["unseen"] & set(words)


def test_a_question_for_each_fact_with_the_fact_masked():
    rows = [json.loads(line) for line in worlds.make_questions().splitlines()]
    for row, fact in zip(rows, worlds.FACTS, strict=True):
        words = row["question"].split()
        assert words.count("[mask]") == 1 and words.count(fact.subject) == 2
        assert row["answer"] == fact.right and fact.right not in words


def test_math_verify_tells_the_words_of_a_kind_apart():
    pairs = []
    for kind in worlds.KINDS:
        values = kind.values.split()
        pairs += [*zip(values, values[1:] + values[:1], strict=True), *zip(values, values, strict=True)]
    assert check_answers(pairs) == [float(gold == answer) for gold, answer in pairs]


def test_a_run_on_real_text_is_kept_when_it_has_ended(tmp_path):
    config = dict.fromkeys(claims.KEYS, 2) | {"method": "active", "seed": 3, "steps": 6, "dtype": "float32"}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    (tmp_path / "environment.txt").write_text("command: train.py\ngit: abc\n")
    rows = [{"step": 0, "probe/accuracy": 0.25, "probe/accuracy_greedy": 0.5, "probe/perplexity": 40.0}]
    shared = {"reward": 0.5, "time/step": 20.0, "responses": 300, "peak_memory_gb": 4.0, "gen/valid_rate": 0.5}
    rows += [shared | {"step": n, "pred/accuracy": n / 10, "gen/top_word_share": 0.1} for n in range(1, 7)]
    write_rows(tmp_path / "metrics.jsonl", rows)
    with pytest.raises(ValueError, match="its 6 steps have not ended with a probe"):
        runs.record_run("active", tmp_path)
    rows[-1] |= rows[0] | {"step": 6, "probe/accuracy": 0.375}
    write_rows(tmp_path / "metrics.jsonl", rows)
    twice = [runs.record_run("active", tmp_path)] * 2  # kept again: one row in the table
    kept = load_results(write_rows(tmp_path / "real.jsonl", twice))
    (run,) = kept["active"]
    assert run["curves"]["pred/accuracy"] == [0.3, 0.6] and run["environment"] == ["git: abc"]
    kept["active"].append(run | {"seed": 4, "totals": {"responses": 2000}})
    kept["active, random_masks"] = kept["active"][:1]
    compared, tried = (tables.markdown(one).split("\n")[2:] for one in real.real_tables(kept, tables.interval))
    cells = "0.30→0.60 | 0.00→0.00 | 0.10→0.10 | 0.25→0.38"
    assert compared == [f"| active | 3 4 | {cells} | 0.50→0.50 |"]  # means over seeds
    assert tried == [f"| random_masks | 3 | {cells} |"]


def real_run(seed: int, share: float, held_out: float) -> dict:
    """From 0.5 of function words to `share`, and from 0.1 right on held-out masks to `held_out`."""
    curves = {"pred/accuracy": [0.2, 0.3, 0.4], "gen/share_function": [0.5, 0.6, share]}
    curves["gen/top_word_share"] = [0.1, 0.1, 0.1]
    probes = [{"all": 0.1, "greedy": 0.1}, {"all": held_out, "greedy": 0.1}]
    keys = {"method": "active", "dtype": "float32"}
    return {"seed": seed, "keys": keys, "totals": {"responses": 1}, "curves": curves, "probes": probes}


def test_predictions_on_real_text_need_all_their_seeds():
    active = [real_run(seed, 0.7, 0.1 + seed / 1000) for seed in (0, 10, 11, 12, 13)]
    frozen = [real_run(seed, 0.6, 0.1) for seed in (10, 11)]
    assert real.real_claims({"active": active, "frozen generator": frozen}) == {"own masks": True}
    held = real.real_claims({"active": active, "frozen generator": [*frozen, real_run(12, 0.64, 0.1)]})
    assert held == {"own masks": True, "function words": True, "frozen teaches more": False}
    (row,) = real.real_tables({"active": active}, tables.interval)[0][1:]
    assert row[1] == "10 11 12"  # the seed that served for tuning is left out
    # gains 0.010, 0.011, 0.012: standard deviation 0.001, times 4.303 / sqrt(3)
    assert row[5] == "0.10→0.11 (0.01 ± 0.00)"


def test_transfer_has_a_row_for_each_arm(tmp_path):
    sets = {"last_word": [0.25, 512], "heldout": [0.5, 512], "other": [0.125, 512]}
    rows = [{"model": name} | sets for name in ("start", "active 10", "active 11")]
    rows[2] = rows[2] | {"heldout": [0.7, 512]}
    write_rows(tmp_path / "transfer.jsonl", rows)
    start, active = real.transfer_table(tables.interval, tmp_path / "transfer.jsonl")[1:]
    assert start == ["start", "", "0.25", "0.50", "0.12"] and active[:2] == ["active", "10 11"]
    assert active[3] == "0.60 ± 1.27"  # 12.71 * 0.1414 / sqrt(2)
