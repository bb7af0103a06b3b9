r"""Benchmarks: every record is an item or counted, and who is right: a table of (gold, response, verdict) per kind."""

import json
from pathlib import Path
from unittest.mock import Mock

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import __main__ as commands
from benchmarks.judge import guessed_letter
from benchmarks.sets import BENCHMARKS, Item, Verdict, judge, load_items, prompt_template
from text.files import DataError

# ---- who is right: whole responses; test_judge.py has what may stand in the box
LETTERS = "ABCDEFGHIJ"


def one(name: str, gold: str, response: str, **flags) -> Verdict:
    [verdict] = judge(name, [Item("7", "", gold, LETTERS)], [response], **flags)
    return verdict


@pytest.mark.parametrize(("response", "answer", "score"), [
    (r"First \boxed{7}, no: \boxed{42}.", "42", 1.0), (r"First \boxed{42}, no: \boxed{7}.", "7", 0.0),
    (r"\boxed{42} and then \boxed{4", "42", 1.0),  # cut off: the last balanced one
    (r"\boxed{\frac{84}{2}}", r"\frac{84}{2}", 1.0), (r"\boxed{4", None, 0.0), (r"\boxed{}", None, 0.0),
    (r"\boxed{42} \boxed{ }", None, 0.0),  # the last one counts, empty or not
    (r"\boxed 42", None, 0.0), ("The answer is 42.", None, 0.0), ("", None, 0.0),
])  # fmt: skip
def test_the_last_balanced_box_and_nothing_else_is_judged(response, answer, score):
    assert one("math500", "42", response) == Verdict(answer, "box" if answer else "none", score)


def test_nothing_is_taken_from_outside_the_box_unless_asked_for():
    for name, gold in (("math500", "42"), ("mmlu_pro", "C"), ("bbeh", "42")):
        response = f"The answer is {gold}."
        assert one(name, gold, response) == Verdict(None, "none", 0.0)
        assert one(name, gold, response, last_number=True).how == ("last_number" if name == "math500" else "none")
        assert one(name, gold, response, guess=True).how == ("guess" if name == "mmlu_pro" else "none")
    assert one("gsm8k", "5", r"\boxed{5}, checked 3 times", last_number=True) == Verdict("5", "box", 1.0)
    assert one("gsm8k", "3", r"\boxed{}, checked 3 times", last_number=True) == Verdict("3", "last_number", 1.0)


@pytest.mark.parametrize(("text", "number"), [
    ("So it is 42.", "42"), ("3 boxes at $1,234.50 each", "1234.50"), ("It is 10-7, or 3/4", "3/4"),
    ("Below zero: −5 degrees", "-5"), ("from 3 to -7.", "-7"), ("x-7", "7"), (".5", ".5"), ("1,2", "2"),
    ("1,2345", "2345"), ("None.", None), ("12" * 50_000, "12" * 50_000),
])  # fmt: skip
def test_the_last_number_of_a_text(text, number):
    assert one("gsm8k", "1", text, last_number=True).answer == number


def test_a_guess_depends_on_the_id_alone_and_hits_as_often_as_chance():
    items = [Item(str(number), f"q{number}", "C", LETTERS) for number in range(2000)]
    texts = [r"\boxed{B}" if number % 2 else "Who knows?" for number in range(2000)]
    verdicts = judge("mmlu_pro", items, texts, guess=True)
    assert verdicts == judge("mmlu_pro", items[::-1], texts[::-1], guess=True)[::-1]
    assert [verdict.how for verdict in verdicts] == ["guess", "box"] * 1000
    right = sum(verdict.score for verdict in verdicts)
    assert abs(right - 100) < 4 * (1000 * 0.1 * 0.9) ** 0.5  # 1,000 guesses, one in ten; four standard deviations
    assert [v.answer for v in verdicts[::2]] == [guessed_letter(item.id, LETTERS) for item in items[::2]]
    assert one("mmlu_pro", "C", r"\boxed{K}", guess=True).how == "guess"  # beyond the options: not an answer


def test_samples_of_an_item_are_judged_one_by_one_in_order():
    item, texts = Item("60", "", "204"), [r"\boxed{204}", r"\boxed{205}", "", r"\boxed{\frac{408}{2}}"]
    assert [verdict.score for verdict in judge("aime24", [item] * 4, texts)] == [1.0, 0.0, 0.0, 1.0]
    assert judge("aime24", [], []) == []
    with pytest.raises(ValueError):
        judge("aime24", [item], texts)


# ---------------------------------------------------------------------------------------------- where items come from
MMLU_PRO = {"question_id": 70, "question": "Which gas is most of the air?\n", "options": ["argon", "neon", "nitrogen"]}
MMLU_PRO |= {"answer": "C", "answer_index": 1}  # the index is as wrong as in item 3983
SUPERGPQA = {"uuid": "fbbc", "question": "Hydrocortisone ( ).", "options": ["heals", "can help"], "answer": "can help"}
SUPERGPQA["answer_letter"] = "B"
SUPERGPQA_INSIDE = {"question": "How much?\n Options are:\nA. $$1\nB. $$\n2 m\nB. of them\nC. V. vulgaris"}
SUPERGPQA_INSIDE["answer"] = "B. $$\n2 m\nB. of them"
BBEH = {"input": "Who dances with Eve?\nOptions:\n(A) Sam\n(B) Lola", "target": "(B)"}
MATH500 = {"problem": "Convert.", "solution": r"\boxed{9}", "answer": r"\left( 3, \frac{\pi}{2} \right)"}
MATH500["unique_id"] = "test/precalculus/807.json"
GSM8K = {"question": "How many clips?", "answer": "48/2 = <<48/2=24>>24, so in all\n#### 1,072"}
OLYMPIAD = {"id": 1606, "context": None, "question": "Find all.", "solution": ["So."], "final_answer": ["$69$,$84$"]}
MINERVA = {"problem": "Luminosity?", "solution": r"\[ L \simeq \boxed{4.5e33} \mathrm{ergs} \]", "idx": 1}
AMC23 = {"id": 0, "problem": "How far?", "answer": 27.0, "question": "How far?"}
AIME24 = {"id": 60, "problem": "How long?", "solution": r"\boxed{9}", "answer": "204", "url": "", "year": "2024"}
AIME25 = {"id": "3", "problem": "How wide?", "answer": "070"}
AIR = "Which gas is most of the air?\nOptions are:\nA. argon\nB. neon\nC. nitrogen"
INSIDE = "How much?\nOptions are:\nA. $$1\nB. $$\n2 m\nB. of them\nC. V. vulgaris"

LAYOUTS = [
    ("mmlu_pro", MMLU_PRO, Item("70", AIR, "C", "ABC")),
    ("mmlu_pro", MMLU_PRO | {"options": ["argon", "N/A", "nitrogen", "N/A", "N/A"]},
     Item("70", AIR.replace("neon", "N/A"), "C", "ABC")),
    ("supergpqa", SUPERGPQA, Item("fbbc", "Hydrocortisone ( ).\nOptions are:\nA. heals\nB. can help", "B", "AB")),
    ("supergpqa", SUPERGPQA_INSIDE, Item("1", INSIDE, "B", "ABC")), ("bbeh", BBEH, Item("1", BBEH["input"], "(B)")),
    ("bbeh", BBEH | {"task": "dancers", "mini": 1}, Item("dancers/1", BBEH["input"], "(B)")),
    ("bbeh", BBEH | {"target": 17.5}, Item("1", BBEH["input"], "17.5")),
    ("math500", MATH500, Item("test/precalculus/807.json", "Convert.", r"\left( 3, \frac{\pi}{2} \right)")),
    ("gsm8k", GSM8K, Item("1", "How many clips?", "1072")),
    ("olympiad", OLYMPIAD, Item("1606", "Find all.", "$69$,$84$")),
    ("olympiad", OLYMPIAD | {"final_answer": ["2", "3"]}, Item("1606", "Find all.", "2, 3")),
    ("minerva", MINERVA, Item("1", "Luminosity?", "4.5e33")),
    ("minerva", MINERVA | {"solution": r"\boxed{1}, then \boxed{\frac{1}{2}}"},
     Item("1", "Luminosity?", r"\frac{1}{2}")),
    ("minerva", {"question": "Luminosity?", "answer": "4.5e33"}, Item("1", "Luminosity?", "4.5e33")),
    ("amc23", AMC23, Item("0", "How far?", "27")),
    ("aime24", AIME24, Item("60", "How long?", "204")),
    ("aime24", {"id": 60, "problem": "How long?", "solution": r"\boxed{204}"}, Item("60", "How long?", "204")),
    ("aime25", AIME25, Item("3", "How wide?", "070")),
]  # fmt: skip


def load(name: str, path: Path, limit: int = 0) -> tuple[list[Item], dict[str, int], str]:
    return load_items(name, str(path), limit, log=lambda line: None)


def write(path: Path, *records: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(("name", "record", "item"), LAYOUTS)
def test_every_layout_gives_its_item_and_its_gold_in_a_box_is_right(name, record, item, tmp_path):
    items, counts, _ = load(name, write(tmp_path / "set.jsonl", record))
    assert items == [item] and counts == {"records": 1, "items": 1}
    assert judge(name, items, [rf"So the answer is \boxed{{{item.gold}}}."])[0].score == 1.0


def test_each_benchmark_has_a_prompt_and_its_number_of_samples():
    assert {name for name, row in BENCHMARKS.items() if row.samples == 32} == {"amc23", "aime24", "aime25"}
    assert {row.samples for row in BENCHMARKS.values()} == {1, 32}
    for name in BENCHMARKS:
        assert "\\boxed{" in prompt_template(name)
    assert "letter" in prompt_template("supergpqa") and "letter" not in prompt_template("gsm8k")


def test_bbehs_repository_is_read_task_by_task_and_ids_carry_the_task(tmp_path):
    for file, size in ("tasks/bbeh_dancers/task", 2), ("tasks/bbeh_boxes/task", 1), ("mini/data", 5):
        write(tmp_path / f"{file}.json", {"canary": "x", "examples": [BBEH] * size})  # mini: part of the same items
    items, counts, _ = load("bbeh", tmp_path)
    assert [item.id for item in items] == ["bbeh_boxes/1", "bbeh_dancers/1", "bbeh_dancers/2"]
    assert counts == {"records": 3, "items": 3} and len(load("bbeh", tmp_path / "mini/data.json")[0]) == 5


def test_of_a_folder_subset_and_split_are_read_or_its_only_file(tmp_path):
    for part in ("main/train-00000-of-00001", "main/test-00000-of-00001", "socratic/test-00000-of-00001"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist([GSM8K | {"question": part}]), tmp_path / f"{part}.parquet")
    (tmp_path / "main/notes.txt").write_text("no record")
    assert [item.question for item in load("gsm8k", tmp_path)[0]] == ["main/test-00000-of-00001"]
    assert len(load("gsm8k", write(tmp_path / "other/a.jsonl", GSM8K).parent)[0]) == 1
    write(tmp_path / "other/gsm8k_test.jsonl", GSM8K)
    with pytest.raises(DataError, match="2 files, none named after split 'test'; give one"):
        load("gsm8k", tmp_path / "other")


def test_records_without_a_distinct_id_are_numbered_from_one(tmp_path):
    assert [item.id for item in load("gsm8k", write(tmp_path / "a.jsonl", GSM8K, GSM8K))[0]] == ["1", "2"]
    log: list[str] = []
    path = write(tmp_path / "b.jsonl", AIME25, AIME25 | {"answer": ""}, AIME25)  # the two exams may both begin at 1
    items, _, _ = load_items("aime25", str(path), log=log.append)
    assert [item.id for item in items] == ["1", "3"] and any("ids repeat" in line for line in log)


def test_the_hub_is_asked_for_the_rows_dataset_subset_and_split(monkeypatch):
    rows = [OLYMPIAD | {"image_1": None}, OLYMPIAD | {"id": 1607, "image_1": None}]
    monkeypatch.setattr(datasets, "load_dataset", asked := Mock(return_value=datasets.Dataset.from_list(rows)))
    items, counts, _ = load_items("olympiad")
    asked.assert_called_once_with("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", split="train")
    assert [item.id for item in items] == ["1606", "1607"] and counts == {"records": 2, "items": 2}


def test_a_limit_is_spread_over_the_set_in_its_order_and_leaves_the_counts(tmp_path):
    path = write(tmp_path / "a.jsonl", *[AIME25 | {"id": str(n), "answer": str(n)} for n in range(10)])
    items, counts, fingerprint = load("aime25", path, limit=4)
    assert [item.id for item in items] == ["0", "2", "5", "7"] and counts == {"records": 10, "items": 10}
    assert load("aime25", path, limit=4) == (items, counts, fingerprint)
    assert load("aime25", path, limit=10) == load("aime25", path, limit=99) == load("aime25", path)


def test_the_fingerprint_is_of_ids_questions_and_golds(tmp_path):
    changes = {}, {"id": "4"}, {"problem": "How high?"}, {"answer": "71"}, {"url": "x"}
    prints = [load("aime25", write(tmp_path / "a.jsonl", AIME25 | change))[2] for change in changes]
    assert len(set(prints)) == 4 and prints[0] == prints[4]
    assert all(len(found) == 16 and int(found, 16) >= 0 for found in prints)


NO_ITEM = [  # cause, benchmark, changes of a good record, each of which makes it useless
    ("no_question", "gsm8k", GSM8K, {"question": "  "}, {"question": None}),
    ("no_answer", "gsm8k", GSM8K, {"answer": ""}, {"answer": "1" * 2001}),
    ("bad_utf8", "gsm8k", GSM8K, {"question": "half \ud800"}),
    ("no_answer", "minerva", MINERVA, {"solution": "By symmetry, 7."}),
    ("no_answer", "olympiad", OLYMPIAD, {"final_answer": None}),
    ("no_answer", "amc23", AMC23, {"answer": True}),
    ("no_answer", "mmlu_pro", MMLU_PRO, {"answer": "D"}, {"answer": None}, {"answer": "nitrogen"}),
    ("no_options", "mmlu_pro", MMLU_PRO, {"options": ["argon"]}, {"options": ["argon"] * 27}, {"options": None}),
    ("no_answer", "supergpqa", SUPERGPQA_INSIDE, {"answer": "B. other words"}),
    ("no_answer", "supergpqa", SUPERGPQA, {"answer_letter": ""}),
    ("no_answer", "bbeh", BBEH, {"target": " "}, {"target": ["(B)"]}),
]


@pytest.mark.parametrize("cause, name, good, change", [row[:3] + (one,) for row in NO_ITEM for one in row[3:]])
def test_a_record_that_is_no_item_is_counted_and_named(cause, name, good, change, tmp_path):
    log: list[str] = []
    path = write(tmp_path / "a.jsonl", *[good | change] * 4, good)
    items, counts, _ = load_items(name, str(path), log=log.append)
    assert len(items) == 1 and counts == {"records": 5, "items": 1, cause: 4}
    assert sum(f"{path}:" in line for line in log) == 3  # the rest is only counted
    with pytest.raises(DataError, match=f"{name}: no item in .*1: skipped"):
        load(name, write(tmp_path / "bad.jsonl", good | change))


@pytest.mark.parametrize(("name", "record", "missing"), [
    ("gsm8k", {"prompt": "p", "answer": "1"}, "'question'; fields are prompt, answer"),
    ("gsm8k", {"question": "p", "target": "1"}, "'answer'; fields are question, target"),
    ("minerva", {"text": "p", "answer": "1"}, "'problem' or 'question'; fields are text, answer"),
    ("mmlu_pro", {"question": "p", "answer": "A"}, "'options'; fields are question, answer"),
    ("supergpqa", {"question": "p", "options": ["a", "b"]}, "'answer_letter' or 'answer'; fields"),
    ("bbeh", {"question": "p", "target": "A"}, "'input'; fields"),
])  # fmt: skip
def test_a_missing_field_is_an_error_of_the_whole_file_wherever_it_is_missing(name, record, missing, tmp_path):
    good = next(record for layout, record, _ in LAYOUTS if layout == name)
    with pytest.raises(DataError, match=rf"a\.jsonl:2: no field {missing}"):
        load(name, write(tmp_path / "a.jsonl", good, record, good))


def test_the_command_shows_the_first_prompt_and_ends_bad_input_with_status_2(tmp_path, monkeypatch, capsys):
    words = ["benchmarks", "show", "mmlu_pro"]
    monkeypatch.setattr("sys.argv", [*words, str(write(tmp_path / "a.jsonl", MMLU_PRO))])
    commands.main()
    shown = capsys.readouterr().out
    assert AIR in shown and "'items': 1" in shown and shown.endswith("=> C\n")
    monkeypatch.setattr("sys.argv", [*words, str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as stop:
        commands.main()
    assert stop.value.code == 2 and "no such file" in capsys.readouterr().err
