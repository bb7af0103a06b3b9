"""Questions with answers from the layouts that maths sets come in; every record is a question or is counted."""

import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from config import Config
from data import DataError, Question, load_questions, question_text, strip_instruction

GSM8K = {"question": "48 clips, then half as many: how many?", "answer": "48/2 = <<48/2=24>>24, so 72.\n#### 72"}
VERL = {
    "data_source": "deepscaler",
    "prompt": [{"content": "How likely is abc? Think, then answer within \\boxed{}.", "role": "user"}],
    "ability": "math",
    "reward_model": {"ground_truth": "\\frac{3}{7}", "style": "rule"},
    "extra_info": {"index": 0, "split": "train"},
}


def load(path: Path, **changes) -> tuple[list[Question], dict[str, int], list[str]]:
    log: list[str] = []
    questions, counts = load_questions(Config(data=str(path), **changes), log.append)
    return questions, counts, log


def write(path: Path, *records) -> Path:
    """jsonl; text stands for a line as it is."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    text = "".join(line + "\n" for line in lines)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


def only(path: Path, record: dict) -> Question:
    [question] = load(write(path / "one.jsonl", record))[0]
    return question


def test_gsm8k_gives_the_number_after_the_mark(tmp_path):
    assert only(tmp_path, GSM8K) == Question("one.jsonl:1", GSM8K["question"], "72")
    assert only(tmp_path, GSM8K | {"answer": "Much.\n#### 109,200,000"}).answer == "109200000"


def test_verl_gives_its_user_turn_as_it_stands_and_the_ground_truth(tmp_path):
    question = only(tmp_path, VERL)
    assert question.text == "How likely is abc? Think, then answer within \\boxed{}."
    assert question.answer == "\\frac{3}{7}"


def test_a_verl_prompt_goes_before_other_texts_and_drops_the_system_turn():
    system = {"role": "system", "content": "Be brief."}
    assert question_text(VERL | {"question": "the bare one", "prompt": [system, *VERL["prompt"]]}).startswith("How")


def test_verl_as_parquet_with_its_nested_columns(tmp_path):
    records = [VERL, VERL | {"reward_model": {"ground_truth": "", "style": "rule"}}, VERL]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "verl.parquet")
    questions, counts, log = load(tmp_path / "verl.parquet")
    assert [(question.id, question.answer) for question in questions] == [
        ("verl.parquet:1", "\\frac{3}{7}"),
        ("verl.parquet:3", "\\frac{3}{7}"),  # a repeated question stays
    ]
    assert counts == {"records": 3, "questions": 2, "no_answer": 1}
    assert any("verl.parquet: row 2: skipped" in line for line in log)


@pytest.mark.parametrize(
    ("record", "answer"),
    [
        ({"problem": "p", "answer": r"\frac{1}{2}", "solution": r"\boxed{9}"}, r"\frac{1}{2}"),
        ({"prompt": "p", "answer": " 5 "}, "5"),
        ({"question": "p", "answer": 27.0}, "27"),  # AMC
        ({"question": "p", "answer": 0.5}, "0.5"),
        ({"question": "p", "answer": 12}, "12"),
        ({"question": "p", "answer": 0}, "0"),
        ({"question": "p", "final_answer": [r"$\frac{1}{2 n+2}$"]}, r"$\frac{1}{2 n+2}$"),  # OlympiadBench
        ({"question": "p", "final_answer": ["1", 3.0]}, "1, 3"),
        ({"question": "p", "final_answer": "8"}, "8"),
        ({"problem": "p", "solution": r"Not \boxed{1} but \boxed{\{2\}}."}, r"\{2\}"),  # MATH, Minerva
        ({"problem": "p", "answer": None, "solution": r"\boxed{1}"}, "1"),
        ({"problem": "p", "answer": r"So $\boxed{12,345}$."}, "12345"),
    ],
)
def test_generic_layouts(record, answer, tmp_path):
    assert only(tmp_path, record) == Question("one.jsonl:1", "p", answer)


@pytest.mark.parametrize(
    ("record", "cause"),
    [
        ({"answer": "5"}, "no_question"),
        ({"question": "  ", "answer": "5"}, "no_question"),
        ({"question": 7, "answer": "5"}, "no_question"),
        ({"prompt": [], "answer": "5"}, "no_question"),
        ({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "no_question"),
        ({"prompt": [{"role": "user", "content": None}], "answer": "5"}, "no_question"),
        ({"prompt": ["a"], "answer": "5"}, "no_question"),
        ({"question": "p"}, "no_answer"),
        ({"question": "p", "answer": ""}, "no_answer"),
        ({"question": "p", "answer": True}, "no_answer"),
        ({"question": "p", "answer": float("nan")}, "no_answer"),
        ({"question": "p", "answer": float("inf")}, "no_answer"),
        ({"question": "p", "answer": ["1", "2"]}, "no_answer"),  # both, or either?
        ({"question": "p", "final_answer": []}, "no_answer"),
        ({"question": "p", "final_answer": ["1", None]}, "no_answer"),
        ({"question": "p", "answer": {"value": 5}}, "no_answer"),
        ({"question": "p", "answer": "5" * 2001}, "no_answer"),
        ({"question": "p", "solution": "By symmetry, 7."}, "no_answer"),  # a text without a mark is no answer
        ({"question": "p", "reward_model": {"ground_truth": None}, "answer": "5"}, "no_answer"),
        ({"question": "p", "options": ["1", "2"], "answer": "B"}, "choices"),
        ({"question": "p \ud800", "answer": "5"}, "bad_utf8"),
    ],
)
def test_a_record_that_is_no_question_is_counted_with_file_and_line(record, cause, tmp_path):
    questions, counts, log = load(write(tmp_path / "mixed.jsonl", GSM8K, record))
    assert [question.id for question in questions] == ["mixed.jsonl:1"]
    assert counts == {"records": 2, "questions": 1, cause: 1}
    assert any(f"{tmp_path / 'mixed.jsonl'}:2: skipped" in line for line in log)


def test_broken_lines_and_files_are_counted_and_the_rest_is_read(tmp_path):
    write(tmp_path / "a.jsonl", "{no json", GSM8K, "[1]", "", GSM8K)
    (tmp_path / "b.jsonl").write_bytes(b'{"question": "\xff"}\n')
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no more")
    (tmp_path / "d.jsonl").write_bytes(b"")
    pq.write_table(pa.Table.from_pylist([{"text": "prose"}]), tmp_path / "e.parquet")
    whole = gzip.compress((json.dumps(GSM8K) + "\n").encode() * 2)
    (tmp_path / "f.jsonl.gz").write_bytes(whole[:-9])  # cut off in the last block
    questions, counts, _ = load(tmp_path)
    assert [question.id for question in questions[:2]] == ["a.jsonl:2", "a.jsonl:5"]
    broken = {"bad_json": 2, "bad_utf8": 1, "empty": 1, "no_question": 1, "unreadable": 2}
    assert {cause: counts[cause] for cause in broken} == broken
    assert counts["questions"] == counts["records"] == len(questions)


def test_a_folder_is_read_in_the_order_of_its_names_whatever_the_seed(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.json"):
        write(tmp_path / name, GSM8K)
    pq.write_table(pa.Table.from_pylist([GSM8K]), tmp_path / "d.parquet")
    expected = ["a.jsonl.gz:1", "b.jsonl:1", "d.parquet:1", "sub/c.json:1"]
    for seed in (0, 1, 2):
        questions, _, log = load(tmp_path, seed=seed)
        assert [question.id for question in questions] == expected
    assert log[-1].startswith("data: 4 questions") and log[-1].endswith("skipped: nothing")


def test_only_the_first_three_of_a_cause_are_logged(tmp_path):
    _, counts, log = load(write(tmp_path / "a.jsonl", GSM8K, *[{"question": "p"}] * 5))
    assert counts["no_answer"] == 5 and sum("a.jsonl:" in line for line in log) == 3


def test_reading_ends_at_max_passages(tmp_path):
    questions, _, log = load(write(tmp_path / "a.jsonl", *[GSM8K] * 5), max_passages=2)
    assert len(questions) == 2 and "max_passages=2 reached" in log[0]


def test_a_source_without_questions_says_why(tmp_path):
    with pytest.raises(DataError, match=r"no usable question in .*a\.jsonl: skipped 1 no_answer; first.*a\.jsonl:1"):
        load(write(tmp_path / "a.jsonl", {"question": "p"}))


def test_a_hub_dataset_is_streamed_in_seeded_order(monkeypatch):
    asked = []

    def load_dataset(name, part, split, streaming):
        asked.append((name, part, split, streaming))
        rows = [GSM8K | {"question": f"q{number}"} for number in range(50)]
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    orders = []
    for seed in (0, 0, 1):
        questions, _, _ = load(Path("openai/gsm8k"), data_config="main", text_field="question", seed=seed)
        orders.append([question.text for question in questions])
    assert asked[0] == ("openai/gsm8k", "main", "train", True)
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) and len(set(orders[0])) == 50


def test_a_hub_dataset_that_cannot_be_read_is_one_line(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="hub dataset 'openai/gsm8k'.*no network at all.*local copy"):
        load(Path("openai/gsm8k"))


def test_instructions_that_data_sets_append_can_be_taken_off():
    asked = "What is 1 + 1? Let's think step by step and output the final answer within \\boxed{}."
    assert strip_instruction(asked) == "What is 1 + 1?"
    assert strip_instruction("What is 1 + 1?") == "What is 1 + 1?"
