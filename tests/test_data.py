"""data.py: what becomes a passage, what is skipped and counted, who is held out, and which passages a step gets.

The tokenizer of these tests makes one token of each white-space separated word, so lengths can be counted by eye.
"""

import copy
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import regex
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import data
from config import Config
from data import Corpus, Passage, build_index, load_corpus, step_passages
from text import files
from text import paragraphs as paragraphs_module
from text.files import DataError
from text.paragraphs import paragraphs
from relatives import rlvr
from relatives.rlvr import load_questions

# "+" marks prose. In the hub's layout: headings on lines of their own, list items indented, references at the end
MARKED = """+The Bell Rock Lighthouse, off the coast of Angus, is the oldest sea-washed lighthouse that survives.

Construction

+The structure was built between 1807 and 1810 by Robert Stevenson on the Bell Rock (also known as Inchcape).
+Standing 35 metres tall, its light is visible from 56 kilometres inland.

Workers
 Peter Logan, foreman builder
 Francis Watt, foreman joiner, who built the beacon on the rock and slept in it.

Year
Height
1810
35 m

+Robert Southey wrote “The Inchcape Rock” about it, and the set {granite, oak} occurs in Stevenson's notes.

See also
 List of lighthouses in Scotland

References

Stevenson, Robert. An Account of the Bell Rock Light-House. Edinburgh: Archibald Constable, 1824.
"""
LIGHTHOUSE = MARKED.replace("\n+", "\n").removeprefix("+")
LIGHTHOUSE_PROSE = [line[1:] for line in MARKED.split("\n") if line.startswith("+")]


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


def make_config(source, **changes) -> Config:
    values = {"min_passage_tokens": 5, "max_passage_tokens": 40, "heldout": 0.3, "passages_per_step": 4, **changes}
    return Config(data=str(source), **values)


def write_jsonl(path: Path, records: list) -> Path:
    """Records a line; bytes stand for a line as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    payload = b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in records)
    path.write_bytes(gzip.compress(payload) if path.suffix == ".gz" else payload)
    return path


def write_parquet(path: Path, rows: list[dict], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def sentence(number: int, words: int = 8) -> str:
    return " ".join(f"w{number}x{i}" for i in range(words - 1)) + f" end{number}."


def long_text(count: int, words: int = 10, first: int = 0) -> str:
    return "\n\n".join(sentence(number, words) for number in range(first, first + count))


def records(count: int, first: int = 0) -> list[dict]:
    return [{"id": f"a{i}", "title": f"T{i}", "url": f"https://example.org/{i}", "text": sentence(i)}
            for i in range(first, first + count)]  # fmt: skip


def build(config: Config, tokenizer, folder: Path, neighbours=(), logged=None) -> tuple[list[dict], dict, list[str]]:
    """Rows of the index, its counts, and what was logged."""
    logged = [] if logged is None else logged
    build_index(config, tokenizer, folder, logged.append, neighbours)
    rows = [json.loads(line) for line in (folder / "passages.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    return rows, json.loads((folder / "index.json").read_text())["counts"], logged


@pytest.fixture
def index(tmp_path, tokenizer):
    """(source, folder, neighbours, config keys) -> what `build` returns of an index in tmp_path / folder."""

    def built(source: Path, folder: str = "index", neighbours=(), **changes):
        return build(make_config(source, **changes), tokenizer, tmp_path / folder, neighbours)

    return built


# ---- articles to paragraphs
def test_prose_stays_and_headings_lists_tables_and_references_go_and_a_lone_line_is_taken_as_it_is():
    # Construction; Workers and 2; table; See also, its item, References, its entry
    assert paragraphs(LIGHTHOUSE) == (LIGHTHOUSE_PROSE, 1 + 3 + 4 + 4)
    assert paragraphs("  no capital,  two spaces, no stop ") == (["no capital,  two spaces, no stop"], 0)


@pytest.mark.parametrize("heading", ["References", "== External links ==", "See also:", "FURTHER READING", "Notes "])
def test_everything_after_a_reference_heading_is_dropped(heading):
    text = f"{sentence(1, 12)}\n\n{heading}\n\nA full sentence, such as a reference may well contain, ends like this."
    assert paragraphs(text) == ([sentence(1, 12)], 2)
    inside = f"{sentence(1, 12)}\n\nThe word {heading.strip()} inside a long sentence is no heading and stays."
    assert len(paragraphs(inside)[0]) == 2


def test_hard_wrapped_text_is_joined_again():
    first = "The tower stands on a reef that lies eleven miles\nfrom Arbroath, where Mr.\nStevenson landed with\nmen."
    second = "It was lit for the first time in February of 1811 by\r\nJohn Reid and his assistants."
    assert paragraphs(f"{first}\n\nHeading\n\n{second}") == ([" ".join(one.split()) for one in (first, second)], 1)
    a_list = " An item of a list that is long and has no full stop at its end\n Another item that happens to have one."
    assert paragraphs(f"{sentence(1, 12)}\n\n{a_list}") == ([sentence(1, 12)], 2)


@pytest.mark.parametrize("line", [
    "* A bullet stays a bullet, even if it reads like a whole sentence.",
    "12. So does a number in front of what reads like a whole sentence.",
    "| cell of a table || another cell, with a full stop at the very end.", "Too short to be prose.",
    "Long enough to be a paragraph of prose but without a final stop",
])  # fmt: skip
def test_what_is_no_prose(line):
    after = sentence(2, 12).capitalize()
    assert paragraphs(f"{sentence(1, 12)}\n\n{line}\n\n{after}") == ([sentence(1, 12), after], 1)
    assert paragraphs(f"{line}\n{after}") == ([after], 1) or line[0] == "L"


def test_sentences_end_in_many_scripts():
    for end in (".", "!", '."', ".)", "。", "؟", "…»"):
        line = "Ein Satz, lang genug, um ein Absatz zu sein, endet so" + end
        assert paragraphs(f"{line}\n\nx") == ([line], 1)
    chinese = ["青石镇位于一条大河的北岸，距离白沙镇", "大约三十公里，四周都是低矮的山丘。"]  # no spaces
    thai = "เมืองนี้ตั้งอยู่ริมแม่น้ำสายใหญ่ทางเหนือของประเทศ มีตลาด"  # no mark ends a Thai sentence
    hindi = "यह नगर नदी के तट पर स्थित है और यहाँ के लोग खेती करते हैं।"
    text = "\n".join(chinese) + f"\n\n太短。\n\n{thai}\n\n{hindi}"
    assert paragraphs(text) == (["".join(chinese), thai, hindi], 1)


@pytest.mark.parametrize("end", ["\r", "\r\n", "\u2028", "\x85"])
def test_lines_end_in_many_ways(end):
    assert paragraphs(LIGHTHOUSE.replace("\n", end))[0] == LIGHTHOUSE_PROSE


THAI = "เมืองนี้ตั้งอยู่ริมแม่น้ำสายใหญ่ทางเหนือของประเทศมีตลาดและวัดเก่าแก่หลายแห่งผู้คนส่วนใหญ่ทำนาและค้าขาย"


def test_wrapped_lines_and_indented_paragraphs_are_whole_again():
    chinese = "青石镇位于大河的北岸，距离白沙镇大约三十公里，这个镇在1949年以前因为“丝绸”贸易而兴盛，每年有船只。"
    for text, widths in ((THAI, (33, 40, 45)), (chinese, range(20, 33))):
        for width in widths:
            letters = regex.findall(r"\X", text)
            lines = ["".join(letters[i : i + width]) for i in range(0, len(letters), width)]
            assert paragraphs("\n".join(lines) + f"\n\n{LIGHTHOUSE_PROSE[0]}")[0] == [text, LIGHTHOUSE_PROSE[0]]
            if text == chinese:
                assert paragraphs("\u3000\u3000" + "\n".join(lines) + f"\n\u3000\u3000{text}")[0] == [text, text]
    typed = "    The tower stands on a reef that lies\neleven miles off.\n    It was lit in the winter of 1811 by\nmen."
    first, second = (" ".join(part.split()) for part in typed.split("\n    "))
    assert paragraphs(typed)[0] == [first, second]


def test_closing_marks_do_not_hide_a_sentences_end_and_markdown_is_read():
    line = "Ein Satz, lang genug, um ein Absatz zu sein, endet so"
    for end in (" เมือง (2500)", ".\u200f", ".[1][12]", ".“", ".**", "。｣", "፡፡", " है |"):
        assert paragraphs(f"{line}{end}\n\nx") == ([line + end], 1)
    bold, item = "**Ada Lovelace** was an English mathematician.", "**Ada Lovelace was an English mathematician."
    code = '```\nprint("A line of code, long enough to be a sentence of prose.")\n```'
    goes_on = "x = y\n\nholds for all the numbers there are in the world."
    assert paragraphs("\n\n".join([bold, item, code, goes_on]))[0] == [bold]


@pytest.mark.parametrize("sentences", [
    ["Am 3. Mai kam er. ", "Er sagte: „Ja.“ ", "Es war 45. "], ["Он жил на ул. Ленина. ", "Потом умер."],
    ["यह नगर है।", "नगर बड़ा है।"], ["重さは３．５である．", "次だ。"], ["ที่นี่ ", "ดร. สมชาย"],
    ["It is so.[1] ", "“No.” ", "Yes."],
    ["Mr. Fox ran to St. Ives. ", "J. R. Fox saw 3.5 km of it. ", "Why? ", "“Because.” ", "So he said, etc. and left."],
    ["石门镇位于北岸。", "这个镇很大！", "他说：「好。」", "好？"],
    ["यह नगर है। ", "नगर की स्थापना हुई।"], ["เมืองนี้ ", "มีตลาด ", "ใหญ่"], ["one sentence without an end"],
])  # fmt: skip
def test_a_paragraph_is_cut_at_sentence_ends(sentences, tokenizer):
    text = "".join(sentences)
    ends = [match.end() for match in paragraphs_module.SENTENCE_BREAK.finditer(text)]
    assert [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True) if a < b] == sentences
    for longest in (3, 6, 9, 50):
        [pieces] = data.cut_at_sentences([text], tokenizer, longest)
        assert " ".join(pieces).split() == text.split() or "".join(pieces) == text
        for piece, after in zip(pieces, pieces[1:], strict=False):  # the last end that fits, not an earlier one
            first = next(s for s in sentences if after.startswith(s.strip()))
            assert len(f"{piece} {first}".split()) > longest or " " not in text
        assert all(len(piece.split()) <= longest or piece in [s.strip() for s in sentences] for piece in pieces)


# ---- paragraphs to passages
def test_paragraphs_are_added_until_the_target_and_never_beyond_the_maximum():
    def groups(lengths, targets):
        targets = iter(targets)
        return data.group_paragraphs(lengths, joint=1, longest=120, draw_target=lambda: next(targets))

    assert groups([50, 60, 90, 30], [100, 100, 100]) == [[0, 1], [2], [3]]
    assert groups([50, 49, 9], [100, 100]) == [[0, 1], [2]]  # 100 is reached exactly
    assert groups([60, 60], [100, 100]) == [[0], [1]]  # 60 + 1 + 60 is one too many
    assert groups([60, 59], [100]) == [[0, 1]]
    assert groups([10, 10, 10], [5, 15, 99]) == [[0], [1, 2]]
    assert groups([10, 300, 10], [50, 50, 50]) == [[0], [1], [2]]  # the one that is too long stays alone
    assert groups([], []) == []


def test_passages_are_consecutive_paragraphs_with_lengths_spread_over_the_whole_range(tmp_path, index):
    texts = {str(a): long_text(40, first=1000 * a) for a in range(30)}
    source = write_jsonl(tmp_path / "a.jsonl", [{"id": a, "url": f"u{a}", "text": text} for a, text in texts.items()])
    rows, counts, _ = index(source, min_passage_tokens=20, max_passage_tokens=160)
    lengths = [len(row["text"].split()) for row in rows]
    assert all(row["text"] in texts[row["id"].split("#")[0]] for row in rows)
    assert 20 <= min(lengths) <= 30 and 120 < max(lengths) <= 160
    # log-uniform: as many targets in 20..56 (the geometric mean) as above; a whole paragraph may overshoot by 9 tokens
    assert 0.35 < sum(length < 60 for length in lengths) / len(lengths) < 0.65
    assert len(rows) == counts["passages"] and counts["articles"] == 30
    assert len({row["id"] for row in rows}) == len(rows)


def test_the_maximum_holds_for_joined_text_even_if_tokens_do_not_add_up(tmp_path):
    """One token per character: a blank line costs two tokens."""
    letters = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="[UNK]")
    line = "Fifty characters of prose, with a full stop here.."
    assert len(line) == 50 and len(tokenizer(line)["input_ids"]) == 50
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "\n\n".join([line] * 400)}])
    for longest, paragraphs_at_most in ((101, 1), (102, 2), (153, 2), (154, 3)):
        config = make_config(source, min_passage_tokens=50, max_passage_tokens=longest)
        rows, _, _ = build(config, tokenizer, tmp_path / "index")
        assert max(len(row["text"]) for row in rows) == paragraphs_at_most * 52 - 2 <= longest


def test_an_articles_passages_do_not_depend_on_its_neighbours(tmp_path, index):
    articles, cuts = [{"id": str(a), "text": f"{sentence(90 + a)}\n{long_text(30)}"} for a in range(4)], []
    for name, some in (("all", articles), ("last", articles[3:])):
        rows, _, _ = index(write_jsonl(tmp_path / f"{name}.jsonl", some), name)
        cuts.append([row["text"] for row in rows if row["id"].startswith("3#")])
    assert cuts[0] == cuts[1] and len(cuts[1]) > 3


def test_labelled_records_are_taken_whole_and_what_are_no_labels_is_ignored_and_said_once(tmp_path, index):
    text = " Rellin is a city .\n\nReferences\n\nRellin lies in Norland . "
    labels = "copy template template template template noise copy template template fact template".split()
    others = zip(records(5), ([0], ["sports"], "topic", 7, []), strict=True)
    some = [{"id": "r", "text": text, "labels": labels}, {"id": "s", "text": text[1:], "labels": labels[1:]}]
    some += [{"text": sentence(9)}, *(record | {"labels": ignored} for record, ignored in others)]
    rows, counts, logged = index(write_jsonl(tmp_path / "mini.jsonl", some))
    by_id = {row["id"]: row for row in rows}
    assert (by_id["r#0"]["text"], by_id["r#0"]["labels"]) == (text, labels)
    assert len(rows) == 1 + 1 + 5 and [row["labels"] for row in rows].count(None) == 6
    assert counts["labels_ignored"] == 6 and sum("labels are ignored" in line for line in logged) == 1


# ---- what is skipped
def test_every_skipped_record_is_counted_by_cause_and_logged_with_its_line(tmp_path, index):
    source = write_jsonl(tmp_path / "mixed.jsonl", [
        {"id": "good", "text": sentence(1)}, b'{"id": "torn", "text": "The line ends in the mid',
        b'["a", "list"]', b"[" * 100_000, b'{"id": "latin", "text": "caf\xe9 au lait, not UTF-8 at all."}',
        b'{"id": "half", "text": "half of a surrogate pair \\ud800 cannot be written as UTF-8."}',
        {"id": "body", "body": "the field has another name"}, {"id": "number", "text": 7},
        {"id": "good", "text": sentence(1)}, {"id": "blank", "text": " \n "},
        {"id": "short", "text": "Four words are few."}, {"id": "long", "text": sentence(3, 41)},
        {"id": "heads", "text": "Heading\n\nAnother heading\n\nReferences\n\nSome."},
        {"id": "m1", "text": "The token [mask] would be taken for ours."},
        {"id": "m2", "text": "Here \\mask{word} would be taken for ours."},
        {"id": "m3", "text": "Here \\boxed{7} would be taken for ours."}, b"", {"id": "fits", "text": sentence(4, 40)},
        {"id": "braces", "text": "Braces {like these} and a \\mathbb{R} do no harm 🗼."},
    ])  # fmt: skip
    rows, counts, logged = index(source)
    assert [row["id"] for row in rows] == ["good#0", "fits#0", "braces#0"]
    assert counts == {
        "articles": 9, "passages": 3, "dropped_lines": 4, "bad_json": 3, "bad_utf8": 2, "no_text": 2, "duplicate": 1,
        "empty": 1, "too_short": 1, "too_long": 1, "no_prose": 1, "reserved": 3,
    }  # fmt: skip
    for line, cause in ((2, "bad_json"), (5, "bad_utf8"), (6, "bad_utf8"), (7, "no_text"), (9, "duplicate")):
        assert any(f"mixed.jsonl:{line}: " in entry and files.CAUSES[cause] in entry for entry in logged)
    assert all(f"{counts[cause]} {cause}" in logged[-1] for cause in files.CAUSES if cause in counts)


def test_broken_parquet_files_and_rows_are_named_and_the_rest_is_read(tmp_path, index):
    write_parquet(tmp_path / "src/good.parquet", records(3))
    cut = write_parquet(tmp_path / "src/cut.parquet", records(200, first=50))
    cut.write_bytes(cut.read_bytes()[:-100])
    write_parquet(tmp_path / "src/columns.parquet", [{"body": "x"}])
    latin = pa.array([b"caf\xe9 " * 8, sentence(9).encode()], pa.binary()).view(pa.utf8())
    pq.write_table(pa.table({"text": latin}), tmp_path / "src/latin.parquet")
    write_parquet(tmp_path / "src/null.parquet", [{"text": sentence(10)}, {"text": None}], row_group_size=1)
    rows = records(200, first=300)  # two row groups, of which the first has its pages overwritten
    torn = write_parquet(tmp_path / "src/torn.parquet", rows, row_group_size=100, use_dictionary=False)
    payload = bytearray(torn.read_bytes())
    payload[4:2000] = bytes(1996)
    torn.write_bytes(payload)
    rows, counts, logged = index(tmp_path / "src")
    numbers = {row["id"] for row in rows}
    assert {"a0#0", "a1#0", "a2#0", "latin.parquet:2#0", "null.parquet:1#0"} <= numbers
    assert {f"a{i}#0" for i in range(400, 500)} <= numbers and len(rows) == 105
    assert (counts["unreadable"], counts["no_text"], counts["bad_utf8"]) == (2, 2, 1)
    for name in ("cut.", "columns.", "latin.parquet: row 1:", "null.parquet: row 2:", "torn.parquet: row group 0"):
        assert any(name in entry for entry in logged)


def test_lines_of_ten_megabytes(tmp_path, index):
    long_line = {"id": "long", "text": "word " * 2_000_000}
    article = {"id": "article", "text": (sentence(1, 20) + "\n\n") * 1000 + "x" * 10_000_000}
    source = write_jsonl(tmp_path / "a.jsonl", [long_line, article, *records(2)])
    rows, counts, _ = index(source)
    assert counts["too_long"] == 1 and rows[-1]["id"] == "a1#0"
    assert {row["id"].split("#")[0] for row in rows} == {"article", "a0", "a1"}
    assert paragraphs_module.token_counts(["x" * 2000], None, longest=40) == [41]  # it costs the tokenizer nothing


def test_long_paragraphs_go_on_in_further_passages_and_lose_only_sentences_that_do_not_fit(tmp_path, index):
    long = [sentence(i).capitalize() for i in range(12)]
    text = " ".join([*long[:7], sentence(77, 50).capitalize(), *long[7:]])
    rows, counts, logged = index(write_jsonl(tmp_path / "a.jsonl", [{"text": text}]))
    assert [row["text"] for row in rows] == [" ".join(long[:5]), " ".join(long[5:7]), " ".join(long[7:])]
    assert (counts["cut"], counts["too_long"]) == (1, 1) and "1 paragraphs cut" in logged[-1]


def test_ids_that_begin_anew_in_each_file_cost_no_article(tmp_path, index):
    for part in "abc":
        rows = [{"id": i, "text": f"{part} {sentence(i)}"} for i in range(10)]
        write_jsonl(tmp_path / f"src/{part}.jsonl", [*rows, rows[3], {"text": sentence(99)}])
    rows, counts, _ = index(tmp_path / "src")
    assert len(rows) == len({row["id"] for row in rows}) == 31 and counts["duplicate"] == 3 + 2
    assert {row["key"] for row in rows if row["text"][1] == " "} == set("0123456789")  # whatever the seed


def test_a_text_at_several_addresses_counts_once_and_so_is_on_one_side_of_the_split(tmp_path, index):
    rows = [{"url": f"{site}/{i}", "text": sentence(i)} for i in range(40) for site in "ab"]
    rows, counts, _ = index(write_jsonl(tmp_path / "a.jsonl", rows))
    assert len({row["text"] for row in rows}) == len(rows) == counts["duplicate"] == 40


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(("layout", "name"), [
    (list, "a.json"), (list, "a.jsonl"), (lambda rows: {"examples": rows}, "a.json"),
    (lambda rows: {"version": 1, "data": rows}, "a.JSON"),
])  # fmt: skip
def test_one_json_value_holds_records_as_lines_do(layout, name, indent, tmp_path, index):
    (tmp_path / name).write_text("\ufeff" + json.dumps(layout([*records(6), 7]), indent=indent))
    rows, counts, logged = index(tmp_path / name)
    assert [row["id"] for row in rows] == [f"a{i}#0" for i in range(6)] and counts["bad_json"] == 1
    assert f"{name}: record 7: skipped, not a JSON object (a int)" in logged[0]


def test_bytes_links_and_invisible_characters(tmp_path, index):
    write_parquet(tmp_path / "src/a.parquet", [{"text": sentence(1).encode()}])
    (tmp_path / "blob").write_text(json.dumps({"text": sentence(2).replace(" ", "\u200b ") + "\u00ad می\u200cخواهم"}))
    (tmp_path / "src/b.jsonl").symlink_to(tmp_path / "blob")
    (tmp_path / "src/more").symlink_to(tmp_path)
    for book in "xy":
        (tmp_path / "src" / book).mkdir()
        (tmp_path / "src" / book / "text.TXT").write_text(f"{book} {sentence(3)}")
    rows, _, logged = index(tmp_path / "src")
    assert {row["text"] for row in rows} >= {sentence(1), f"{sentence(2)} می\u200cخواهم"} and "1 files" in logged[0]
    assert {row["key"] for row in rows} >= {"x/text", "y/text"}
    assert len(index(tmp_path / "src/b.jsonl")[0]) == 1


# ---- sources
def test_text_comes_from_the_configs_field_behind_a_byte_order_mark_and_missing_ids_from_file_and_line(tmp_path, index):
    first = b"\xef\xbb\xbf" + json.dumps({"body": sentence(0), "text": 3}).encode()
    source = write_jsonl(tmp_path / "a.jsonl", [first, {"id": 17, "body": sentence(1), "title": None}])
    rows, _, _ = index(source, text_field="body")
    assert [(row["id"], row["title"], row["url"]) for row in rows] == [("a.jsonl:1#0", "", ""), ("17#0", "", "")]
    assert [row["text"] for row in rows] == [sentence(0), sentence(1)]


def test_a_folder_of_all_kinds(tmp_path, index):
    source = tmp_path / "src"
    write_parquet(source / "deep/er/p.parquet", records(2))
    write_jsonl(source / "j.jsonl", records(2, first=10))
    write_jsonl(source / "g.jsonl.gz", records(2, first=20))
    (source / "Bell Rock.txt").write_text(LIGHTHOUSE, encoding="utf-8")
    (source / "z.txt.gz").write_bytes(gzip.compress(sentence(5).encode()))
    line = b"A good line of some length makes a paragraph."
    (source / "latin.txt").write_bytes(line + b"\n\nUn caf\xe9 noir.\n\n" + line)
    (source / "empty.txt").write_bytes(b"")
    (source / "README.md").write_text("no data")
    write_jsonl(source / ".hidden.jsonl", records(1, first=30))
    rows, counts, logged = index(source)
    ids = {row["id"].split("#")[0] for row in rows}
    assert ids == {"a0", "a1", "a10", "a11", "a20", "a21", "Bell Rock.txt:1", "z.txt.gz:1"}
    assert {row["title"] for row in rows if ".txt" in row["id"]} == {"Bell Rock", "z"}
    tower = [row["text"] for row in rows if row["title"] == "Bell Rock"]
    assert "\n\n".join(tower) == "\n\n".join(LIGHTHOUSE_PROSE)
    assert (counts["bad_utf8"], counts["empty"]) == (1, 1)
    assert any("latin.txt:3: " in entry for entry in logged) and any("empty.txt: " in entry for entry in logged)
    assert any("1 files of other kinds" in entry for entry in logged)  # README.md; hidden files do not count


def test_a_long_text_file_is_cut_into_pieces_that_stay_on_one_side(tmp_path, index, monkeypatch):
    monkeypatch.setattr(files, "TXT_PIECE", 1000)
    (tmp_path / "src").mkdir()
    for book in "ABCDEFGHIJKLMNOPQRST":  # the last line ends a piece, after which there is nothing left
        lines = [book + sentence(i, 12) + "\n\n" for i in range(99)] + [book + " ".join([sentence(99, 12)] * 12)]
        (tmp_path / f"src/{book}.txt").write_text("".join(lines) + "\n\n")
    rows, counts, _ = index(tmp_path / "src", max_passage_tokens=12)
    assert Counter(row["title"] for row in rows) == dict.fromkeys("ABCDEFGHIJKLMNOPQRST", 99)
    assert len({row["id"] for row in rows}) == 20 * 99 and counts["too_long"] == 20 and "empty" not in counts
    assert len({row["id"].split("#")[0] for row in rows}) > 100  # pieces
    corpus = load_corpus(tmp_path / "index", make_config(tmp_path / "src"))
    assert not {p.title for p in corpus.train} & {p.title for p in corpus.heldout}


def hub_folder(folder: Path) -> Path:
    """The layout of wikimedia/wikipedia: one folder per config, shards in it, and a card that names them."""
    for shard in range(2):
        write_parquet(folder / f"20231101.en/train-0000{shard}-of-00002.parquet", records(30, first=30 * shard))
    write_parquet(folder / "20231101.de/train-00000-of-00001.parquet", records(5, first=900))
    part = "- config_name: 20231101.{0}\n  data_files:\n  - split: train\n    path: 20231101.{0}/*\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{part.format('en')}{part.format('de')}---\n")
    return folder


def test_an_index_is_taken_over_from_a_neighbour_that_has_the_same(tmp_path, index, monkeypatch):
    """A run, its dry run and its controls read the hub once, and the same text even if the hub has changed since."""
    source = write_parquet(tmp_path / "a.parquet", records(30))
    first = index(source, "one/cache")
    index(source, "other/cache", seed=1)
    for name in ("half", "damaged", "empty"):
        (tmp_path / name / "cache").mkdir(parents=True)
    (tmp_path / "half/cache/passages.jsonl").touch()
    (tmp_path / "damaged/cache/index.json").write_text("no json")
    (tmp_path / "empty/cache/index.json").write_bytes((tmp_path / "one/cache/index.json").read_bytes())
    monkeypatch.setattr(data, "file_records", None)  # whoever reads the source fails
    neighbours = sorted(tmp_path.glob("*/cache"))
    rows, counts, logged = index(source, "two/cache", neighbours)
    assert logged == [f"data: index taken over from {tmp_path / 'one/cache'}"] and (rows, counts) == first[:2]
    passages = tmp_path / "one/cache/passages.jsonl"
    passages.write_bytes(b"".join(passages.read_bytes().splitlines(keepends=True)[1:]))  # not whole: not for others
    with pytest.raises(TypeError):
        index(source, "four/cache", [tmp_path / "one/cache"])
    with pytest.raises(TypeError):
        index(source, "three/cache", neighbours, seed=2)


def test_an_index_that_is_built_anew_while_it_is_copied_is_not_taken(tmp_path, index, monkeypatch):
    source, copy = write_jsonl(tmp_path / "a.jsonl", records(30)), shutil.copy
    index(source, "one/cache")
    own, _, _ = index(source, "two/cache", seed=3)

    def slow_copy(file, target):
        done = copy(file, target)
        index(source, "one/cache", seed=7, max_passages=10)  # meanwhile
        return done

    monkeypatch.setattr(data.shutil, "copy", slow_copy)
    _, _, logged = index(source, "two/cache", [tmp_path / "one/cache"])
    assert "taken over" not in " ".join(logged) and "30 passages kept" in logged[-1]
    assert index(source, "two/cache", seed=3)[0] == own


def test_a_hub_dataset_is_streamed_in_seeded_order_and_a_capped_one_samples_row_groups(tmp_path, index, monkeypatch):
    # load_dataset takes a folder for a hub name; only the look-up of local paths is switched off
    monkeypatch.setattr(data, "local_files", lambda config, log: None)
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)  # each stream ends with a pause of 5 s
    source, orders = hub_folder(tmp_path / "hub"), []
    for seed in (0, 0, 1):
        rows, _, _ = index(source, f"index{len(orders)}", data_config="20231101.en", seed=seed)
        orders.append([row["id"] for row in rows])
    assert sorted(orders[0]) == sorted(f"a{i}#0" for i in range(60))
    assert orders[0] == orders[1] != orders[2]
    assert [row["id"] for row in index(source, "capped", max_passages=7)[0]] == orders[0][:7]
    # datasets reads ten shards at a time from their beginning; one file of 40 row groups must not count as one
    write_parquet(tmp_path / "one/train.parquet", records(8000), row_group_size=20)
    rows, _, _ = index(tmp_path / "one", "sample", data_config="", max_passages=40)
    groups = {int(row["id"][1:].split("#")[0]) // 20 for row in rows}
    assert len(groups) > 5 and max(groups) > 100
    with pytest.raises(DataError, match="20231101.xx.*Available"):
        index(source, data_config="20231101.xx")
    with pytest.raises(DataError, match="text_field='body'; columns are .*text"):
        index(source, text_field="body")


def test_a_download_in_the_hubs_layout_reads_the_chosen_config_alone(tmp_path, index):
    source = hub_folder(tmp_path / "hub")
    for changes, numbers in (({}, range(60)), ({"data_config": "20231101.de"}, range(900, 905))):
        assert {row["id"] for row in index(source, **changes)[0]} == {f"a{i}#0" for i in numbers}


def test_an_unreachable_hub_is_one_line(tmp_path, tokenizer, monkeypatch):
    offline = Mock(side_effect=ConnectionError("Couldn't reach the Hub\nafter five tries"))
    monkeypatch.setattr("datasets.load_dataset", offline)
    for read in (lambda config: build_index(config, tokenizer, tmp_path / "index"), load_questions):
        with pytest.raises(DataError, match="'someone/some-text'.*Couldn't reach the Hub after.*local copy") as error:
            read(make_config("someone/some-text"))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "index/index.json").exists()


@pytest.mark.parametrize(("name", "payload", "message"), [
    ("a.jsonl", b"", "0 bytes"), ("a.jsonl", b'{"body": "x"}\n', "text_field='text', fields are body"),
    ("a.jsonl.gz", b"no gzip at all", "broken"), ("a.parquet", b"no parquet at all", "broken"),
    ("a.txt", b"Too short.", "1 too_short"), ("a.txt", "Text in another encoding.".encode("utf-16"), "not UTF-8"),
    ("a.csv", b"text\nx\n", "no .parquet"),
])  # fmt: skip
def test_a_source_without_anything_usable_is_an_error_that_names_it(tmp_path, tokenizer, name, payload, message):
    (tmp_path / name).write_bytes(payload)
    with pytest.raises(DataError, match=f"{name}(.|\n)*{message}"):
        build_index(make_config(tmp_path / name), tokenizer, tmp_path / "index")
    assert not list((tmp_path / "index").glob("*"))


# ---- the index
def test_files_take_turns_so_that_a_capped_index_has_a_part_of_each(tmp_path, index, monkeypatch):
    monkeypatch.setattr(files, "TURN", 3)
    monkeypatch.setattr(files, "OPEN_AT_ONCE", 2)
    (tmp_path / "wiki").mkdir()
    for name in "abc":
        lines = [json.dumps({"text": sentence(10 * "abc".index(name) + n), "id": f"{name}{n}"}) for n in range(4)]
        (tmp_path / "wiki" / f"{name}.jsonl").write_text("\n".join(lines))
    ids = [row["id"].split("#")[0] for row in index(tmp_path / "wiki")[0]]
    first, second, third = (ids[n][0] for n in (0, 3, 8))  # in an order of the seed
    expected = [(first, "012"), (second, "012"), (first, "3"), (second, "3"), (third, "0123")]
    assert ids == [f"{name}{n}" for name, numbers in expected for n in numbers]


def test_no_passage_holds_a_special_token_of_the_tokenizer_named_or_not(tokenizer, tmp_path):
    """transformers names two of SmolLM3's 256."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken("<|tool|>", special=True), AddedToken("plainword", special=False)])
    assert "<|tool|>" not in tokenizer.all_special_tokens
    marks = data.reserved_marks(tokenizer)
    assert {"[mask]", "\\boxed{", "<|tool|>", *tokenizer.all_special_tokens} <= set(marks) and "plainword" not in marks


def test_row_groups_and_their_rows_come_in_seeded_order_under_their_own_numbers(tmp_path, index):
    rows = [{"text": sentence(i)} for i in range(1, 2501)]
    source, orders = write_parquet(tmp_path / "a.parquet", rows, row_group_size=1250), []
    for seed, most in ((0, 20), (1, 20), (2, 20), (3, 20), (4, 9999), (5, 9999)):
        rows, counts, logged = index(source, f"{seed}", seed=seed, max_passages=most)
        orders.append([int(row["id"].split(":")[1].split("#")[0]) for row in rows])
        assert [row["text"] for row in rows] == [sentence(number) for number in orders[-1]]
        assert counts["passages"] == min(most, 2500)
        assert any("max_passages=20 reached" in entry for entry in logged) == (most == 20)
    assert len({tuple(order) for order in orders}) == 6 and len(set(orders[4])) == len(set(orders[5])) == 2500
    assert len({order[0] > 1250 for order in orders}) == 2  # either group first


def test_an_index_is_reused_until_something_it_was_made_from_changes(tmp_path, tokenizer):
    source, folder = write_jsonl(tmp_path / "a.jsonl", records(10)), tmp_path / "cache"

    def rebuilt(**changes) -> bool:
        before = (folder / "index.json").stat().st_ino, (folder / "passages.jsonl").stat().st_mtime_ns
        build(make_config(source, **changes), tokenizer, folder)
        return before != ((folder / "index.json").stat().st_ino, (folder / "passages.jsonl").stat().st_mtime_ns)

    build(make_config(source), tokenizer, folder)
    assert not rebuilt()
    assert not rebuilt(heldout=0.1, steps=3, passages_per_step=2)  # used when it is loaded, not when it is made
    for changes in ({"seed": 1}, {"max_passages": 5}, {"min_passage_tokens": 4}, {"max_passage_tokens": 50}):
        assert rebuilt(**changes) and not rebuilt(**changes)
    assert rebuilt()
    source = source.rename(tmp_path / "moved=here.jsonl")  # the same bytes elsewhere
    assert not rebuilt()
    fingerprint = data.data_fingerprint(make_config(source))
    for other in (records(10, first=1), records(11)):
        write_jsonl(source, other)
        assert rebuilt() and not rebuilt() and data.data_fingerprint(make_config(source)) != fingerprint
    tokenizer_size = len(tokenizer)
    tokenizer.add_tokens(["another"])
    assert len(tokenizer) == tokenizer_size + 1 and rebuilt()
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", "passages.jsonl"]


def test_a_crash_while_building_leaves_the_old_index_or_none(tmp_path, index, monkeypatch):
    source, folder = write_jsonl(tmp_path / "a.jsonl", records(10)), tmp_path / "index"
    index(source)
    old, replace, crash = (folder / "passages.jsonl").read_bytes(), Path.replace, Mock(side_effect=KeyboardInterrupt)
    for owner, name, broken, left in (
        (data, "token_counts", crash, True),
        # between the two renames: new passages must not be found under the old key
        (Path, "replace", lambda path, to: (crash if to.name == "index.json" else replace)(path, to), False),
    ):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, broken)
            index(source, max_passages=5)
        assert ((folder / "passages.jsonl").read_bytes() == old) == left
    with pytest.raises(DataError, match="no index"):
        load_corpus(folder, make_config(source))


def test_the_index_is_the_same_in_every_process(tmp_path, index, tokenizer):
    source = tmp_path / "src"
    for part in range(5):
        write_parquet(source / f"{part}.parquet", records(20, first=20 * part), row_group_size=4)
    write_jsonl(source / "long.jsonl", [{"id": "x", "text": long_text(200)}])
    index(source, "here", max_passages=90)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    script = (
        "import sys, test_data; from pathlib import Path; from transformers import PreTrainedTokenizerFast as Fast\n"
        "source, top = map(Path, sys.argv[1:])\n"
        "config = test_data.make_config(source, max_passages=90)\n"
        "test_data.build(config, Fast.from_pretrained(top / 'tokenizer'), top / 'there')\n"
    )
    path = os.pathsep.join([str(Path(data.__file__).parent), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", script, str(source), str(tmp_path)], env=environment, check=True)
    for name in ("passages.jsonl", "index.json"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


# ---- held out
def test_heldout_is_the_sha256_of_the_key_as_a_share():
    key = "https://en.wikipedia.org/wiki/Bell_Rock_Lighthouse"
    share = int(hashlib.sha256(key.encode()).hexdigest()[:16], 16) / 16**16
    assert not data.is_heldout(key, share) and data.is_heldout(key, share + 1e-9)
    keys = [f"article {i}" for i in range(20_000)]
    small, large = ({k for k in keys if data.is_heldout(k, x)} for x in (0.01, 0.1))
    assert 150 < len(small) < 250 and 1850 < len(large) < 2150 and small < large


def test_whole_articles_are_held_out_and_never_trained_on(tmp_path, index):
    long = [{"id": f"n{i}", "url": f"https://example.org/n{i}", "text": f"{sentence(i, 20)}\n{long_text(30)}"}
            for i in range(40)]  # fmt: skip
    # one article split over records by its corpus: the url, else the title, keeps them together
    by_url = [{"id": f"u{i}", "url": f"https://example.org/u{i // 5}", "text": sentence(i)} for i in range(100)]
    by_title = [{"id": f"t{i}", "title": f"Title {i // 5}", "text": sentence(200 + i)} for i in range(100)]
    source = write_jsonl(tmp_path / "a.jsonl", long + by_url + by_title)
    index(source)
    config = make_config(source)
    corpus = load_corpus(tmp_path / "index", config)
    train, heldout = ({p.url or p.title for p in part} for part in (corpus.train, corpus.heldout))
    assert train.isdisjoint(heldout) and len(train | heldout) == 40 + 20 + 20 and 0.15 < len(heldout) / 80 < 0.45
    assert all(data.is_heldout(key, config.heldout) for key in heldout)
    assert corpus.counts["train"] == len(corpus.train) and corpus.counts["heldout"] == len(corpus.heldout)
    assert corpus.counts["train"] + corpus.counts["heldout"] == corpus.counts["passages"]
    seen = {p.id for step in range(400) for p in step_passages(corpus, config, step)}
    assert seen == {p.id for p in corpus.train}


def test_of_a_single_article_the_last_passages_are_held_out_and_an_empty_side_is_an_error_with_advice(tmp_path, index):
    (tmp_path / "a.txt").write_text(long_text(20, words=12))
    index(tmp_path / "a.txt", max_passage_tokens=12)
    corpus = load_corpus(tmp_path / "index", make_config(tmp_path / "a.txt", heldout=0.1))
    assert [p.text for p in corpus.train + corpus.heldout] == [sentence(i, 12) for i in range(20)]
    assert len(corpus.heldout) == 2
    for side, message in ((False, "nothing is held out.*raise heldout"), (True, "nothing is left.*lower heldout")):
        urls = [f"u{i}" for i in range(99) if data.is_heldout(f"u{i}", 0.3) is side][:2]
        source = write_jsonl(tmp_path / f"{side}.jsonl", [{"url": url, "text": sentence(1)} for url in urls])
        index(source)
        with pytest.raises(DataError, match=message):
            load_corpus(tmp_path / "index", make_config(source))


# ---- the cursor
def ids_of(step: int, articles: int = 10, **changes) -> list[str]:
    """The passages of a step of a corpus of this size."""
    corpus = Corpus([Passage(f"p{i}", "", "", f"text {i}") for i in range(articles)], [], {})
    return [passage.id for passage in step_passages(corpus, make_config("x", **changes), step)]


def test_an_epoch_repeats_nothing_and_batches_may_straddle_its_border():
    stream = [one for step in range(15) for one in ids_of(step)]  # 60 passages: six epochs
    epochs = [stream[i : i + 10] for i in range(0, 60, 10)]
    assert all(len(set(epoch)) == 10 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6  # each in an order of its own
    assert ids_of(2) == epochs[0][8:] + epochs[1][:2]  # places 8 to 11


def test_a_step_is_a_function_of_seed_and_step():
    eight = {"articles": 50, "passages_per_step": 8}
    forward = [ids_of(step, **eight) for step in range(20)]
    backward = [ids_of(step, **eight) for step in reversed(range(20))]
    assert forward == backward[::-1]  # no state is carried from call to call, so a resumed run goes on exactly
    for size in (1, 4, 16, 80):  # the size of a step changes nothing, not even where it spans several epochs
        parts = [one for step in range(160 // size) for one in ids_of(step, 50, passages_per_step=size)]
        assert parts == [one for batch in forward for one in batch]
    assert ids_of(0, seed=1, **eight) != forward[0]


# ---- questions
GSM8K = {"question": "48 clips, then half as many: how many?", "answer": "48/2 = <<48/2=24>>24, so 72.\n#### 72"}
VERL = {
    "data_source": "deepscaler", "ability": "math", "extra_info": {"index": 0, "split": "train"},
    "prompt": [{"content": "How likely is abc? Think, then answer within \\boxed{}.", "role": "user"}],
    "reward_model": {"ground_truth": "\\frac{3}{7}", "style": "rule"},
}  # fmt: skip


def asked(path: Path, **changes) -> tuple[list[Passage], dict[str, int], list[str]]:
    log: list[str] = []
    return *load_questions(Config(data=str(path), **changes), log.append), log


@pytest.mark.parametrize(("record", "answer"), [
    (GSM8K, "72"), (GSM8K | {"answer": "Much.\n#### $109,200,000 "}, "109200000"), (VERL, "\\frac{3}{7}"),
    ({"problem": "p", "answer": r"\frac{1}{2}", "solution": r"\boxed{9}"}, r"\frac{1}{2}"),
    ({"prompt": "p", "answer": " 5 "}, "5"), ({"question": "p", "answer": 27.0}, "27"),
    ({"question": "p", "answer": 0.5}, "0.5"), ({"question": "p", "answer": 12}, "12"),
    ({"question": "p", "answer": 0}, "0"), (GSM8K | {"answer": "#### 1,2"}, "1,2"),
    ({"question": "p", "final_answer": [r"$\frac{1}{2 n+2}$"]}, r"$\frac{1}{2 n+2}$"),
    ({"question": "p", "final_answer": ["1", 3.0]}, "1, 3"), ({"question": "p", "final_answer": "8"}, "8"),
    ({"problem": "p", "solution": r"Not \boxed{1} but \boxed{\{2\}}."}, r"\{2\}"),
    ({"problem": "p", "answer": None, "solution": r"\boxed{1}"}, "1"),
    ({"problem": "p", "answer": r"So $\boxed{12,345}$."}, "12345"),
])  # fmt: skip
def test_every_layout_gives_its_text_and_answer(record, answer, tmp_path):
    [question] = asked(write_jsonl(tmp_path / "one.jsonl", [record]))[0]
    assert question == Passage("one.jsonl:1", "", "", rlvr.question_text(record), answer=answer)
    system = {"role": "system", "content": "Be brief."}
    verl = VERL | {"question": "the bare one", "prompt": [system, *VERL["prompt"]]}  # its prompt goes before others
    assert rlvr.question_text(verl) == VERL["prompt"][0]["content"]


@pytest.mark.parametrize(("record", "cause"), [
    *((record, "no_question") for record in (
        {"answer": "5"}, {"question": "  ", "answer": "5"}, {"question": 7, "answer": "5"},
        {"prompt": [], "answer": "5"}, {"prompt": ["a"], "answer": "5"},
        {"prompt": [{"role": "user", "content": None}], "answer": "5"},
        {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    )),
    *(({"question": "p"} | record, "no_answer") for record in (
        {}, {"answer": ""}, {"answer": "none\n####"}, {"answer": True}, *({"answer": float(n)} for n in ("nan", "inf")),
        {"answer": ["1", "2"]}, {"answer": {"value": 5}}, {"answer": "5" * 2001}, {"solution": "By symmetry, 7."},
        {"final_answer": []}, {"final_answer": ["1", None]}, {"reward_model": {"ground_truth": None}, "answer": "5"},
    )),
    ({"question": "p", "options": ["1", "2"], "answer": "B"}, "choices"),
    ({"question": "p \ud800", "answer": "5"}, "bad_utf8"),
])  # fmt: skip
def test_a_record_that_is_no_question_is_counted_with_file_and_line(record, cause, tmp_path):
    questions, counts, log = asked(write_jsonl(tmp_path / "mixed.jsonl", [GSM8K, record]))
    assert [question.id for question in questions] == ["mixed.jsonl:1"]
    assert counts == {"records": 2, "questions": 1, cause: 1}
    assert any(f"{tmp_path / 'mixed.jsonl'}:2: skipped" in line for line in log)


def test_questions_are_read_in_the_order_of_file_names_up_to_max_passages_and_none_is_an_error(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.json"):
        write_jsonl(tmp_path / "src" / name, [GSM8K])
    write_parquet(tmp_path / "src/d.parquet", [GSM8K])
    for seed in (0, 1, 2):
        questions, _, log = asked(tmp_path / "src", seed=seed)
        assert [one.id for one in questions] == ["a.jsonl.gz:1", "b.jsonl:1", "d.parquet:1", "sub/c.json:1"]
    assert log[-1].startswith("data: 4 questions") and log[-1].endswith("skipped: nothing")
    questions, _, log = asked(tmp_path / "src", max_passages=2)
    assert len(questions) == 2 and "max_passages=2 reached" in log[0]
    with pytest.raises(DataError, match=r"no usable question in .*a\.jsonl: skipped 5 no_answer; first.*a\.jsonl:1"):
        asked(write_jsonl(tmp_path / "a.jsonl", [{"question": "p"}] * 5))
