"""data.py: what becomes a passage, what is skipped and counted, who is held out, and which passages a step gets.

The tokenizer of these tests makes one token of each white-space separated word, so lengths can be counted by eye.
"""

import doctest
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
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

# in the hub's layout: headings on lines of their own, list items indented, references at the end
LIGHTHOUSE = """The Bell Rock Lighthouse, off the coast of Angus, is the oldest sea-washed lighthouse that survives.

Construction

The structure was built between 1807 and 1810 by Robert Stevenson on the Bell Rock (also known as Inchcape).
Standing 35 metres tall, its light is visible from 56 kilometres inland.

Workers
 Peter Logan, foreman builder
 Francis Watt, foreman joiner, who built the beacon on the rock and slept in it.

Year
Height
1810
35 m

Robert Southey wrote “The Inchcape Rock” about it, and the set {granite, oak} occurs in Stevenson's notes.

See also
 List of lighthouses in Scotland

References

Stevenson, Robert. An Account of the Bell Rock Light-House. Edinburgh: Archibald Constable, 1824.
"""
LIGHTHOUSE_PROSE = [
    "The Bell Rock Lighthouse, off the coast of Angus, is the oldest sea-washed lighthouse that survives.",
    "The structure was built between 1807 and 1810 by Robert Stevenson on the Bell Rock (also known as Inchcape).",
    "Standing 35 metres tall, its light is visible from 56 kilometres inland.",
    "Robert Southey wrote “The Inchcape Rock” about it, and the set {granite, oak} occurs in Stevenson's notes.",
]


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
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    payload = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(payload) if path.suffix == ".gz" else payload)
    return path


def sentence(number: int, words: int = 8) -> str:
    return " ".join(f"w{number}x{i}" for i in range(words - 1)) + f" end{number}."


def records(count: int, first: int = 0) -> list[dict]:
    return [
        {"id": f"a{i}", "title": f"T{i}", "url": f"https://example.org/{i}", "text": sentence(i)}
        for i in range(first, first + count)
    ]


def build(config: Config, tokenizer, folder: Path) -> tuple[list[dict], dict, list[str]]:
    """Rows of the index, its counts, and what was logged."""
    logged: list[str] = []
    build_index(config, tokenizer, folder, log=logged.append)
    rows = [json.loads(line) for line in (folder / "passages.jsonl").read_text(encoding="utf-8").splitlines()]
    return rows, json.loads((folder / "index.json").read_text())["counts"], logged


# ---- articles to paragraphs
def test_prose_stays_and_headings_lists_tables_and_references_go():
    kept, dropped = paragraphs(LIGHTHOUSE)
    assert kept == LIGHTHOUSE_PROSE
    assert dropped == 1 + 3 + 4 + 4  # Construction; Workers and 2; table; See also, its item, References, its entry


@pytest.mark.parametrize("heading", ["References", "== External links ==", "See also:", "FURTHER READING", "Notes "])
def test_everything_after_a_reference_heading_is_dropped(heading):
    text = f"{sentence(1, 12)}\n\n{heading}\n\nA full sentence, such as a reference may well contain, ends like this."
    assert paragraphs(text) == ([sentence(1, 12)], 2)
    inside = (
        f"{sentence(1, 12)}\n\nThe word {heading.strip()} inside a long sentence is no heading and stays in the text."
    )
    assert len(paragraphs(inside)[0]) == 2


def test_hard_wrapped_text_is_joined_again():
    wrapped = (
        "The tower stands on a reef that lies eleven miles\nsoutheast of Arbroath, where Mr.\n"
        "Stevenson landed in 1807 with\nsixty men.\n\nHeading\n\n"
        "It was lit for the first time in February of 1811 by\r\nJohn Reid and his assistants."
    )
    kept, dropped = paragraphs(wrapped)
    assert kept == [
        "The tower stands on a reef that lies eleven miles southeast of Arbroath, "
        "where Mr. Stevenson landed in 1807 with sixty men.",
        "It was lit for the first time in February of 1811 by John Reid and his assistants.",
    ]
    assert dropped == 1
    a_list = " An item of a list that is long and has no full stop at its end\n Another item that happens to have one."
    assert paragraphs(f"{sentence(1, 12)}\n\n{a_list}") == ([sentence(1, 12)], 2)


def test_a_text_of_one_line_is_taken_as_it_is():
    assert paragraphs("  no capital,  two spaces, no stop ") == (["no capital,  two spaces, no stop"], 0)


@pytest.mark.parametrize("line", [
    "* A bullet stays a bullet, even if it reads like a whole sentence.",
    "12. So does a number in front of what reads like a whole sentence.",
    "| cell of a table || another cell, with a full stop at the very end.", "Too short to be prose.",
    "Long enough to be a paragraph of prose but without a final stop",
])  # fmt: skip
def test_what_is_no_prose(line):
    assert paragraphs(f"{sentence(1, 12)}\n\n{line}\n\n{sentence(2, 12)}") == ([sentence(1, 12), sentence(2, 12)], 1)
    assert (
        paragraphs(f"{line}\n{sentence(2, 12).capitalize()}") == ([sentence(2, 12).capitalize()], 1) or line[0] == "L"
    )


@pytest.mark.parametrize("end", [".", "!", '."', ".)", "。", "؟", "…»"])
def test_sentences_end_in_many_scripts(end):
    line = "Ein Satz, lang genug, um ein Absatz zu sein, endet so" + end
    assert paragraphs(f"{line}\n\nx") == ([line], 1)


def test_scripts_without_spaces_and_without_full_stops():
    chinese = ["青石镇位于一条大河的北岸，距离白沙镇", "大约三十公里，四周都是低矮的山丘。"]
    thai = "เมืองนี้ตั้งอยู่ริมแม่น้ำสายใหญ่ทางเหนือของประเทศ มีตลาด"  # no mark ends a Thai sentence
    hindi = "यह नगर नदी के तट पर स्थित है और यहाँ के लोग खेती करते हैं।"
    text = "\n".join(chinese) + f"\n\n太短。\n\n{thai}\n\n{hindi}"
    assert paragraphs(text) == (["".join(chinese), thai, hindi], 1)


SENTENCES = [
    ["Mr. Fox ran to St. Ives. ", "J. R. Fox saw 3.5 km of it. ", "Why? ", "“Because.” ", "So he said, etc. and left."],
    ["石门镇位于北岸。", "这个镇很大！", "他说：「好。」", "好？"],
    ["यह नगर है। ", "नगर की स्थापना हुई।"], ["เมืองนี้ ", "มีตลาด ", "ใหญ่"], ["one sentence without an end"],
]  # fmt: skip


@pytest.mark.parametrize("sentences", SENTENCES)
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


def test_passages_are_consecutive_paragraphs_with_lengths_spread_over_the_whole_range(tmp_path, tokenizer):
    articles = [
        {"id": str(a), "url": f"u{a}", "text": "\n\n".join(sentence(1000 * a + p, 10) for p in range(40))}
        for a in range(30)
    ]
    config = make_config(write_jsonl(tmp_path / "a.jsonl", articles), min_passage_tokens=20, max_passage_tokens=160)
    rows, counts, _ = build(config, tokenizer, tmp_path / "index")
    texts = {article["id"]: article["text"] for article in articles}
    lengths = [len(row["text"].split()) for row in rows]
    assert all(row["text"] in texts[row["id"].split("#")[0]] for row in rows)
    assert 20 <= min(lengths) <= 30 and 120 < max(lengths) <= 160
    # log-uniform: as many targets in 20..56 (the geometric mean) as above; a whole paragraph may overshoot by 9 tokens
    assert 0.35 < sum(length < 60 for length in lengths) / len(lengths) < 0.65
    assert len(rows) == counts["passages"] and counts["articles"] == 30
    assert len({row["id"] for row in rows}) == len(rows)


def test_the_maximum_holds_for_joined_text_even_if_tokens_do_not_add_up(tmp_path):
    # one token per character: a blank line costs two tokens
    letters = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="[UNK]")
    line = "Fifty characters of prose, with a full stop here.."
    assert len(line) == 50 and len(tokenizer(line)["input_ids"]) == 50
    text = "\n\n".join([line] * 400)
    for longest, paragraphs_at_most in ((101, 1), (102, 2), (153, 2), (154, 3)):
        config = make_config(write_jsonl(tmp_path / "a.jsonl", [{"text": text}]), min_passage_tokens=50,
                             max_passage_tokens=longest)
        rows, _, _ = build(config, tokenizer, tmp_path / "index")
        assert max(len(row["text"]) for row in rows) == paragraphs_at_most * 52 - 2 <= longest


def test_an_articles_passages_do_not_depend_on_its_neighbours(tmp_path, tokenizer):
    articles = [{"id": str(a), "text": "\n\n".join(sentence(p, 10) for p in range(30))} for a in range(4)]
    both = make_config(write_jsonl(tmp_path / "both.jsonl", articles))
    last = make_config(write_jsonl(tmp_path / "last.jsonl", articles[3:]))
    cuts = {name: [r["text"] for r in build(c, tokenizer, tmp_path / name)[0] if r["id"].startswith("3#")]
            for name, c in (("both", both), ("last", last))}  # fmt: skip
    assert cuts["both"] == cuts["last"] and len(cuts["last"]) > 3


def test_labelled_records_are_taken_whole_and_untouched(tmp_path, tokenizer):
    text = " Rellin is a city .\n\nReferences\n\nRellin lies in Norland . "
    labels = "copy template template template template noise copy template template fact template".split()
    good = {"id": "r", "text": text, "labels": labels}
    bad = {"id": "s", "text": text, "labels": labels[1:]}
    source = write_jsonl(tmp_path / "mini.jsonl", [good, bad, {"text": sentence(1)}])
    rows, counts, _ = build(make_config(source), tokenizer, tmp_path / "index")
    assert (rows[0]["id"], rows[0]["text"], rows[0]["labels"]) == ("r#0", text, labels)
    assert rows[1]["labels"] is None and len(rows) == 2
    assert counts["labels_ignored"] == 1


# ---- what is skipped
def test_every_skipped_record_is_counted_by_cause_and_logged_with_its_line(tmp_path, tokenizer):
    source = write_jsonl(
        tmp_path / "mixed.jsonl",
        [
            {"id": "good", "text": sentence(1)}, b'{"id": "torn", "text": "The line ends in the mid',
            b'["a", "list"]', b"[" * 100_000, b'{"id": "latin", "text": "caf\xe9 au lait, not UTF-8 at all."}',
            b'{"id": "half", "text": "half of a surrogate pair \\ud800 cannot be written as UTF-8."}',
            {"id": "body", "body": "the field has another name"}, {"id": "number", "text": 7},
            {"id": "good", "text": sentence(1)}, {"id": "blank", "text": " \n "},
            {"id": "short", "text": "Four words are few."}, {"id": "long", "text": sentence(3, 41)},
            {"id": "heads", "text": "Heading\n\nAnother heading\n\nReferences\n\nSome."},
            {"id": "m1", "text": "The token [mask] would be taken for ours."},
            {"id": "m2", "text": "Here \\mask{word} would be taken for ours."},
            {"id": "m3", "text": "Here \\boxed{7} would be taken for ours."}, b"",
            {"id": "fits", "text": sentence(4, 40)},
            {"id": "braces", "text": "Braces {like these} and a \\mathbb{R} do no harm 🗼."},
        ],
    )  # fmt: skip
    rows, counts, logged = build(make_config(source), tokenizer, tmp_path / "index")
    assert [row["id"] for row in rows] == ["good#0", "fits#0", "braces#0"]
    assert counts == {
        "articles": 9, "passages": 3, "dropped_lines": 4, "bad_json": 3, "bad_utf8": 2, "no_text": 2, "duplicate": 1,
        "empty": 1, "too_short": 1, "too_long": 1, "no_prose": 1, "reserved": 3,
    }  # fmt: skip
    for line, cause in ((2, "bad_json"), (5, "bad_utf8"), (6, "bad_utf8"), (7, "no_text"), (9, "duplicate")):
        assert any(f"mixed.jsonl:{line}: " in entry and files.CAUSES[cause] in entry for entry in logged)
    assert all(f"{counts[cause]} {cause}" in logged[-1] for cause in files.CAUSES if cause in counts)


def write_parquet(path: Path, rows: list[dict], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def test_broken_parquet_files_and_rows_are_named_and_the_rest_is_read(tmp_path, tokenizer):
    write_parquet(tmp_path / "src/good.parquet", records(3))
    cut = write_parquet(tmp_path / "src/cut.parquet", records(200, first=50))
    cut.write_bytes(cut.read_bytes()[:-100])
    write_parquet(tmp_path / "src/columns.parquet", [{"body": "x"}])
    latin = pa.array([b"caf\xe9 " * 8, sentence(9).encode()], pa.binary()).view(pa.utf8())
    pq.write_table(pa.table({"text": latin}), tmp_path / "src/latin.parquet")
    write_parquet(tmp_path / "src/null.parquet", [{"text": sentence(10)}, {"text": None}], row_group_size=1)
    # two row groups, of which the first has its pages overwritten
    torn = write_parquet(tmp_path / "src/torn.parquet", records(200, first=300), row_group_size=100,
                         use_dictionary=False)
    payload = bytearray(torn.read_bytes())
    payload[4:2000] = bytes(1996)
    torn.write_bytes(payload)
    rows, counts, logged = build(make_config(tmp_path / "src"), tokenizer, tmp_path / "index")
    numbers = {row["id"] for row in rows}
    assert {"a0#0", "a1#0", "a2#0", "latin.parquet:2#0", "null.parquet:1#0"} <= numbers
    assert {f"a{i}#0" for i in range(400, 500)} <= numbers and len(rows) == 105
    assert (counts["unreadable"], counts["no_text"], counts["bad_utf8"]) == (2, 2, 1)
    for name in ("cut.parquet", "columns.parquet", "latin.parquet: row 1:", "null.parquet: row 2:",
                 "torn.parquet: row group 0"):  # fmt: skip
        assert any(name in entry for entry in logged)


def test_lines_of_ten_megabytes_and_lines_beyond_the_limit(tmp_path, tokenizer, monkeypatch):
    long_line = {"id": "long", "text": "word " * 2_000_000}
    article = {"id": "article", "text": (sentence(1, 20) + "\n\n") * 1000 + "x" * 10_000_000}
    source = write_jsonl(tmp_path / "a.jsonl", [long_line, article, *records(2)])
    rows, counts, _ = build(make_config(source), tokenizer, tmp_path / "index")
    assert counts["too_long"] == 1 and rows[-1]["id"] == "a1#0"
    assert {row["id"].split("#")[0] for row in rows} == {"article", "a0", "a1"}
    assert paragraphs_module.token_counts(["x" * 2000], None, longest=40) == [41]  # it costs the tokenizer nothing
    monkeypatch.setattr(files, "LINE_LIMIT", 1 << 20)
    rows, counts, logged = build(make_config(source, seed=1), tokenizer, tmp_path / "index")
    assert [row["id"] for row in rows] == ["a0#0", "a1#0"] and counts["long_line"] == 2
    assert any("a.jsonl:2: " in entry for entry in logged)


def test_long_paragraphs_go_on_in_further_passages_and_lose_only_sentences_that_do_not_fit(tmp_path, tokenizer):
    long = [sentence(i).capitalize() for i in range(12)]
    text = " ".join([*long[:7], sentence(77, 50).capitalize(), *long[7:]])
    rows, counts, logged = build(make_config(write_jsonl(tmp_path / "a.jsonl", [{"text": text}])), tokenizer, tmp_path)
    assert [row["text"] for row in rows] == [" ".join(long[:5]), " ".join(long[5:7]), " ".join(long[7:])]
    assert (counts["cut"], counts["too_long"]) == (1, 1) and "1 paragraphs cut" in logged[-1]


def test_ids_that_begin_anew_in_each_file_cost_no_article(tmp_path, tokenizer):
    (tmp_path / "src").mkdir()
    for part in "abc":
        rows = [{"id": i, "text": f"{part} {sentence(i)}"} for i in range(10)]
        write_jsonl(tmp_path / f"src/{part}.jsonl", [*rows, rows[3], {"text": sentence(99)}])
    rows, counts, _ = build(make_config(tmp_path / "src"), tokenizer, tmp_path / "index")
    assert len(rows) == len({row["id"] for row in rows}) == 31 and counts["duplicate"] == 3 + 2
    assert {row["key"] for row in rows if row["text"][1] == " "} == set("0123456789")  # whatever the seed


def test_labels_that_mean_something_else_are_ignored_and_said_once(tmp_path, tokenizer):
    labels = ([0], ["sports"], "topic", 7, [])
    source = write_jsonl(tmp_path / "a.jsonl", [r | {"labels": x} for r, x in zip(records(5), labels, strict=True)])
    rows, counts, logged = build(make_config(source), tokenizer, tmp_path / "index")
    assert len(rows) == counts["labels_ignored"] == 5 and sum("labels are ignored" in line for line in logged) == 1


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("layout", [list, lambda rows: {"examples": rows}])
def test_one_json_value_holds_records_as_lines_do(layout, indent, tmp_path, tokenizer):
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(layout([*records(6), 7]), indent=indent))
    rows, counts, logged = build(make_config(tmp_path / "a.json"), tokenizer, tmp_path / "index")
    assert [row["id"] for row in rows] == [f"a{i}#0" for i in range(6)] and counts["bad_json"] == 1
    assert "a.json: record 7: skipped, not a JSON object (a int)" in logged[0]


# ---- sources
def test_missing_ids_come_from_file_and_line(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": sentence(0)}, {"id": 17, "text": sentence(1), "title": None}])
    rows, _, _ = build(make_config(source), tokenizer, tmp_path / "index")
    assert [(row["id"], row["title"], row["url"]) for row in rows] == [("a.jsonl:1#0", "", ""), ("17#0", "", "")]


def test_another_text_field_and_a_byte_order_mark(tmp_path, tokenizer):
    line = b"\xef\xbb\xbf" + json.dumps({"body": sentence(1), "text": 3}).encode()
    source = write_jsonl(tmp_path / "a.jsonl", [line])
    rows, _, _ = build(make_config(source, text_field="body"), tokenizer, tmp_path / "index")
    assert [row["text"] for row in rows] == [sentence(1)]


def test_a_folder_of_all_kinds(tmp_path, tokenizer):
    source = tmp_path / "src"
    write_parquet(source / "deep/er/p.parquet", records(2))
    write_jsonl(source / "j.jsonl", records(2, first=10))
    write_jsonl(source / "g.jsonl.gz", records(2, first=20))
    (source / "Bell Rock.txt").write_text(LIGHTHOUSE, encoding="utf-8")
    (source / "z.txt.gz").write_bytes(gzip.compress(sentence(5).encode()))
    good_line = b"A good line of some length makes a paragraph."
    (source / "latin.txt").write_bytes(good_line + b"\n\nUn caf\xe9 noir.\n\n" + good_line)
    (source / "empty.txt").write_bytes(b"")
    (source / "README.md").write_text("no data")
    write_jsonl(source / ".hidden.jsonl", records(1, first=30))
    rows, counts, logged = build(make_config(source), tokenizer, tmp_path / "index")
    ids = {row["id"].split("#")[0] for row in rows}
    assert ids == {"a0", "a1", "a10", "a11", "a20", "a21", "Bell Rock.txt:1", "z.txt.gz:1"}
    assert {row["title"] for row in rows if ".txt" in row["id"]} == {"Bell Rock", "z"}
    tower = [row for row in rows if row["title"] == "Bell Rock"]
    assert "\n\n".join(row["text"] for row in tower) == "\n\n".join(LIGHTHOUSE_PROSE)
    assert (counts["bad_utf8"], counts["empty"]) == (1, 1)
    assert any("latin.txt:3: " in entry for entry in logged) and any("empty.txt: " in entry for entry in logged)
    assert any("1 files of other kinds" in entry for entry in logged)  # README.md; hidden files do not count


def test_a_long_text_file_is_cut_into_pieces_that_stay_on_one_side(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(files, "TXT_PIECE", 1000)
    (tmp_path / "src").mkdir()
    for book in "ABCDEFGHIJKLMNOPQRST":
        # the last line ends a piece, after which there is nothing left
        lines = [book + sentence(i, 12) + "\n\n" for i in range(99)] + [book + " ".join([sentence(99, 12)] * 12)]
        (tmp_path / f"src/{book}.txt").write_text("".join(lines) + "\n\n")
    config = make_config(tmp_path / "src", max_passage_tokens=12)
    rows, counts, _ = build(config, tokenizer, tmp_path / "index")
    assert Counter(row["title"] for row in rows) == dict.fromkeys("ABCDEFGHIJKLMNOPQRST", 99)
    assert len({row["id"] for row in rows}) == 20 * 99
    assert counts["too_long"] == 20 and "empty" not in counts
    assert len({row["id"].split("#")[0] for row in rows}) > 100  # pieces
    corpus = load_corpus(tmp_path / "index", config)
    assert not {p.title for p in corpus.train} & {p.title for p in corpus.heldout}


def hub_folder(folder: Path) -> Path:
    """The layout of wikimedia/wikipedia: one folder per config, shards in it, and a card that names them."""
    for shard in range(2):
        name = f"20231101.en/train-{shard:05d}-of-00002.parquet"
        write_parquet(folder / name, records(30, first=30 * shard))
    write_parquet(folder / "20231101.de/train-00000-of-00001.parquet", records(5, first=900))
    card = "---\nconfigs:\n"
    for language in ("en", "de"):
        card += (
            f"- config_name: 20231101.{language}\n  data_files:\n  - split: train\n    path: 20231101.{language}/*\n"
        )
    (folder / "README.md").write_text(card + "---\n")
    return folder


def test_a_capped_hub_dataset_is_a_sample_of_row_groups_not_of_the_heads_of_files(tmp_path, tokenizer, monkeypatch):
    """datasets reads ten shards at a time from their beginning; one file of 40 row groups must not count as one."""
    monkeypatch.setattr(data, "local_files", lambda config, log: None)
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)
    write_parquet(tmp_path / "hub/train.parquet", records(8000), row_group_size=20)
    config = make_config(tmp_path / "hub", data_config="", max_passages=40)
    rows, _, _ = build(config, tokenizer, tmp_path / "index")
    groups = {int(row["id"][1:].split("#")[0]) // 20 for row in rows}
    assert len(groups) > 5 and max(groups) > 100


def test_an_index_is_taken_over_from_a_neighbour_that_has_the_same(tmp_path, tokenizer, monkeypatch):
    """A run, its dry run and its controls read the hub once, and the same text even if the hub has changed since."""
    source = write_parquet(tmp_path / "a.parquet", records(30))
    first = build(make_config(source), tokenizer, tmp_path / "one/cache")
    build(make_config(source, seed=1), tokenizer, tmp_path / "other/cache")
    for name in ("half", "damaged", "empty"):
        (tmp_path / name / "cache").mkdir(parents=True)
    (tmp_path / "half/cache/passages.jsonl").touch()
    (tmp_path / "damaged/cache/index.json").write_text("no json")
    (tmp_path / "empty/cache/index.json").write_bytes((tmp_path / "one/cache/index.json").read_bytes())
    monkeypatch.setattr(data, "file_records", None)  # whoever reads the source fails
    logged, folder = [], tmp_path / "two/cache"
    neighbours = sorted(tmp_path.glob("*/cache"))
    build_index(make_config(source), tokenizer, folder, logged.append, neighbours)
    assert logged == [f"data: index taken over from {tmp_path / 'one/cache'}"]
    assert build(make_config(source), tokenizer, folder)[:2] == first[:2]
    lines = (tmp_path / "one/cache/passages.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "one/cache/passages.jsonl").write_bytes(b"".join(lines[1:]))  # not whole: not for others
    with pytest.raises(TypeError):
        build_index(make_config(source), tokenizer, tmp_path / "four/cache", logged.append, [tmp_path / "one/cache"])
    with pytest.raises(TypeError):
        build_index(make_config(source, seed=2), tokenizer, tmp_path / "three/cache", logged.append, neighbours)


def test_an_index_that_is_built_anew_while_it_is_copied_is_not_taken(tmp_path, tokenizer, monkeypatch):
    source, other = write_jsonl(tmp_path / "a.jsonl", records(30)), tmp_path / "one/cache"
    build(make_config(source), tokenizer, other)
    own, _, _ = build(make_config(source, seed=3), tokenizer, tmp_path / "two/cache")
    copy = shutil.copy

    def slow_copy(file, target):
        done = copy(file, target)
        build(make_config(source, seed=7, max_passages=10), tokenizer, other)  # meanwhile
        return done

    monkeypatch.setattr(data.shutil, "copy", slow_copy)
    logged = []
    build_index(make_config(source), tokenizer, tmp_path / "two/cache", logged.append, [other])
    assert "taken over" not in " ".join(logged) and "30 passages kept" in logged[-1]
    config = make_config(source, seed=3)
    assert build(config, tokenizer, tmp_path / "two/cache")[0] == own


def test_a_hub_dataset_is_streamed_in_seeded_order(tmp_path, tokenizer, monkeypatch):
    # load_dataset takes a folder for a hub name; only the look-up of local paths is switched off
    monkeypatch.setattr(data, "local_files", lambda config, log: None)
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)  # each stream ends with a pause of 5 s
    source = hub_folder(tmp_path / "hub")
    orders = []
    for seed in (0, 0, 1):
        config = make_config(source, data_config="20231101.en", seed=seed)
        rows, _, _ = build(config, tokenizer, tmp_path / f"index{len(orders)}")
        orders.append([row["id"] for row in rows])
    assert sorted(orders[0]) == sorted(f"a{i}#0" for i in range(60))
    assert orders[0] == orders[1] != orders[2]
    capped, counts, _ = build(make_config(source, max_passages=7), tokenizer, tmp_path / "capped")
    assert [row["id"] for row in capped] == orders[0][:7]
    with pytest.raises(DataError, match="20231101.xx.*Available"):
        build(make_config(source, data_config="20231101.xx"), tokenizer, tmp_path / "i")
    with pytest.raises(DataError, match="text_field='body'; columns are .*text"):
        build(make_config(source, text_field="body"), tokenizer, tmp_path / "i")


def test_a_download_in_the_hubs_layout_reads_the_chosen_config_alone(tmp_path, tokenizer):
    rows, _, _ = build(make_config(hub_folder(tmp_path / "hub")), tokenizer, tmp_path / "index")
    assert {row["id"] for row in rows} == {f"a{i}#0" for i in range(60)}
    rows, _, _ = build(make_config(tmp_path / "hub", data_config="20231101.de"), tokenizer, tmp_path / "index")
    assert {row["id"] for row in rows} == {f"a{i}#0" for i in range(900, 905)}


def test_an_unreachable_hub_is_one_line(tmp_path, tokenizer, monkeypatch):
    import datasets

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nafter five tries")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    for read in (lambda config: build_index(config, tokenizer, tmp_path / "index"), load_questions):
        with pytest.raises(DataError, match="'someone/some-text'.*Couldn't reach the Hub after.*local copy") as error:
            read(make_config("someone/some-text"))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "index/index.json").exists()


@pytest.mark.parametrize(("name", "payload", "message"), [
    ("a.jsonl", b"", "0 bytes"), ("a.jsonl", b'{"body": "x"}\n', "text_field='text', fields are body"),
    ("a.jsonl.gz", b"no gzip at all", "broken"), ("a.parquet", b"no parquet at all", "broken"),
    ("a.txt", b"Too short.", "1 too_short"), ("a.txt", "Text in another encoding.".encode("utf-16"), "not UTF-8"),
    ("a.csv", b"text\nx\n", "unknown kind"),
])  # fmt: skip
def test_a_source_without_anything_usable_is_an_error_that_names_it(tmp_path, tokenizer, name, payload, message):
    (tmp_path / name).write_bytes(payload)
    with pytest.raises(DataError, match=f"{name}(.|\n)*{message}"):
        build_index(make_config(tmp_path / name), tokenizer, tmp_path / "index")
    assert not list((tmp_path / "index").glob("*"))


# ---- the index
def test_row_groups_and_their_rows_come_in_seeded_order_under_their_own_numbers(tmp_path, tokenizer):
    rows = [{"text": sentence(i)} for i in range(1, 2501)]
    source, orders = write_parquet(tmp_path / "a.parquet", rows, row_group_size=1250), []
    for seed, most in ((0, 20), (1, 20), (2, 20), (3, 20), (4, 9999), (5, 9999)):
        config = make_config(source, seed=seed, max_passages=most)
        rows, counts, logged = build(config, tokenizer, tmp_path / f"{seed}")
        assert all(row["text"] == sentence(int(row["id"].split(":")[1].split("#")[0])) for row in rows)
        assert counts["passages"] == min(most, 2500)
        assert any("max_passages=20 reached" in entry for entry in logged) == (most == 20)
        orders.append([row["id"] for row in rows])
    assert len({tuple(order) for order in orders}) == 6 and len(set(orders[4])) == len(set(orders[5])) == 2500
    assert len({int(order[0].split(":")[1].split("#")[0]) > 1250 for order in orders}) == 2  # either group first


def test_an_index_is_reused_until_something_it_was_made_from_changes(tmp_path, tokenizer):
    source, folder = write_jsonl(tmp_path / "a.jsonl", records(10)), tmp_path / "index"

    def rebuilt(**changes) -> bool:
        before = (folder / "index.json").stat().st_ino, (folder / "passages.jsonl").stat().st_mtime_ns
        build_index(make_config(source, **changes), tokenizer, folder, log=lambda line: None)
        return before != ((folder / "index.json").stat().st_ino, (folder / "passages.jsonl").stat().st_mtime_ns)

    build_index(make_config(source), tokenizer, folder, log=lambda line: None)
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
    folder.rename(tmp_path / "cache")
    (tmp_path / "cache").rename(folder)
    tokenizer_size = len(tokenizer)
    tokenizer.add_tokens(["another"])
    assert len(tokenizer) == tokenizer_size + 1 and rebuilt()
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", "passages.jsonl"]


def test_a_crash_while_building_leaves_the_old_index_or_none(tmp_path, tokenizer, monkeypatch):
    source, folder = write_jsonl(tmp_path / "a.jsonl", records(10)), tmp_path / "index"
    build_index(make_config(source), tokenizer, folder, log=lambda line: None)
    old = (folder / "passages.jsonl").read_bytes()

    def broken_counts(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, "token_counts", broken_counts)
        with pytest.raises(KeyboardInterrupt):
            build_index(make_config(source, seed=1), tokenizer, folder, log=lambda line: None)
    assert (folder / "passages.jsonl").read_bytes() == old
    # between the two renames: new passages must not be found under the old key
    replace = Path.replace

    def broken_replace(self, target):
        if Path(target).name == "index.json":
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", broken_replace)
        with pytest.raises(KeyboardInterrupt):
            build_index(make_config(source, seed=1), tokenizer, folder, log=lambda line: None)
    with pytest.raises(DataError, match="no index"):
        load_corpus(folder, make_config(source))


def test_the_index_is_the_same_in_every_process(tmp_path, tokenizer):
    source = tmp_path / "src"
    for part in range(5):
        write_parquet(source / f"{part}.parquet", records(20, first=20 * part), row_group_size=4)
    write_jsonl(source / "long.jsonl", [{"id": "x", "text": "\n\n".join(sentence(p, 10) for p in range(200))}])
    build(make_config(source, max_passages=90), tokenizer, tmp_path / "here")
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
    assert 150 < len(small) < 250 and 1850 < len(large) < 2150
    assert small < large


def test_whole_articles_are_held_out_and_never_trained_on(tmp_path, tokenizer):
    long_articles = [
        {"id": f"n{i}", "url": f"https://example.org/n{i}", "text": "\n\n".join(sentence(p, 10) for p in range(30))}
        for i in range(40)
    ]
    # one article split over records by its corpus: the url, else the title, keeps them together
    by_url = [{"id": f"u{i}", "url": f"https://example.org/u{i // 5}", "text": sentence(i)} for i in range(100)]
    by_title = [{"id": f"t{i}", "title": f"Title {i // 5}", "text": sentence(i)} for i in range(100)]
    config = make_config(write_jsonl(tmp_path / "a.jsonl", long_articles + by_url + by_title))
    build_index(config, tokenizer, tmp_path / "index", log=lambda line: None)
    corpus = load_corpus(tmp_path / "index", config)

    def articles(passages: list[Passage]) -> set[str]:
        return {passage.url or passage.title for passage in passages}

    assert articles(corpus.train).isdisjoint(articles(corpus.heldout))
    assert len(articles(corpus.train)) + len(articles(corpus.heldout)) == 40 + 20 + 20
    assert 0.15 < len(articles(corpus.heldout)) / 80 < 0.45
    for passage in corpus.heldout:
        assert data.is_heldout(passage.url or passage.title, config.heldout)
    assert corpus.counts["train"] == len(corpus.train) and corpus.counts["heldout"] == len(corpus.heldout)
    assert corpus.counts["train"] + corpus.counts["heldout"] == corpus.counts["passages"]
    seen = {p.id for step in range(400) for p in step_passages(corpus, config, step)}
    assert seen == {p.id for p in corpus.train}


def test_an_empty_side_of_the_split_is_an_error_with_advice(tmp_path, tokenizer):
    sides = {side: [f"u{i}" for i in range(99) if data.is_heldout(f"u{i}", 0.3) is side] for side in (True, False)}
    for side, message in ((False, "nothing is held out.*raise heldout"), (True, "nothing is left.*lower heldout")):
        source = write_jsonl(tmp_path / f"{side}.jsonl", [{"url": u, "text": sentence(1)} for u in sides[side][:2]])
        build_index(make_config(source), tokenizer, tmp_path / f"{side}", log=lambda line: None)
        with pytest.raises(DataError, match=message):
            load_corpus(tmp_path / f"{side}", make_config(source))


def test_of_a_single_article_the_last_passages_are_held_out(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("\n\n".join(sentence(i, 12) for i in range(20)))
    config = make_config(tmp_path / "a.txt", max_passage_tokens=12, heldout=0.1)
    build_index(config, tokenizer, tmp_path / "index")
    corpus = load_corpus(tmp_path / "index", config)
    assert [p.text for p in corpus.train + corpus.heldout] == [sentence(i, 12) for i in range(20)]
    assert len(corpus.heldout) == 2


# ---- the cursor
def corpus_of(size: int) -> Corpus:
    return Corpus([Passage(f"p{i}", "", "", f"text {i}") for i in range(size)], [], {})


def test_an_epoch_repeats_nothing_and_batches_may_straddle_its_border():
    corpus, config = corpus_of(10), make_config("x", passages_per_step=4)
    stream = [p.id for step in range(15) for p in step_passages(corpus, config, step)]  # 60 passages: six epochs
    epochs = [stream[i : i + 10] for i in range(0, 60, 10)]
    assert all(len(set(epoch)) == 10 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6  # each in an order of its own
    third = [p.id for p in step_passages(corpus, config, 2)]  # places 8 to 11
    assert third == epochs[0][8:] + epochs[1][:2]


def test_a_step_is_a_function_of_seed_and_step():
    corpus, config = corpus_of(50), make_config("x", passages_per_step=8)
    forward = [[p.id for p in step_passages(corpus, config, step)] for step in range(20)]
    backward = [[p.id for p in step_passages(corpus, config, step)] for step in reversed(range(20))]
    assert forward == backward[::-1]  # no state is carried from call to call, so a resumed run goes on exactly
    for size in (1, 4, 16, 80):  # the size of a step changes nothing, not even where it spans several epochs
        steps = range(160 // size)
        parts = [p.id for step in steps for p in step_passages(corpus, make_config("x", passages_per_step=size), step)]
        assert parts == [id_ for batch in forward for id_ in batch]
    other = make_config("x", passages_per_step=8, seed=1)
    assert [p.id for p in step_passages(corpus, other, 0)] != forward[0]


# ---- questions

GSM8K = {"question": "48 clips, then half as many: how many?", "answer": "48/2 = <<48/2=24>>24, so 72.\n#### 72"}
VERL = {
    "data_source": "deepscaler",
    "prompt": [{"content": "How likely is abc? Think, then answer within \\boxed{}.", "role": "user"}],
    "ability": "math", "reward_model": {"ground_truth": "\\frac{3}{7}", "style": "rule"},
    "extra_info": {"index": 0, "split": "train"},
}  # fmt: skip


def asked(path: Path, **changes) -> tuple[list[Passage], dict[str, int], list[str]]:
    log: list[str] = []
    questions, counts = load_questions(Config(data=str(path), **changes), log.append)
    return questions, counts, log


def test_examples_in_the_docstrings():
    assert doctest.testmod(rlvr).attempted >= 3 and doctest.testmod(rlvr).failed == 0


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


NO_QUESTION = [
    {"answer": "5"}, {"question": "  ", "answer": "5"}, {"question": 7, "answer": "5"}, {"prompt": [], "answer": "5"},
    {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"prompt": [{"role": "user", "content": None}], "answer": "5"}, {"prompt": ["a"], "answer": "5"},
]  # fmt: skip
NO_ANSWER = [
    {}, {"answer": ""}, {"answer": True}, {"answer": float("nan")}, {"answer": float("inf")}, {"answer": ["1", "2"]},
    {"final_answer": []}, {"final_answer": ["1", None]}, {"answer": {"value": 5}}, {"answer": "5" * 2001},
    {"solution": "By symmetry, 7."}, {"reward_model": {"ground_truth": None}, "answer": "5"},
]  # fmt: skip


@pytest.mark.parametrize(("record", "cause"), [
    *((record, "no_question") for record in NO_QUESTION),
    *(({"question": "p"} | record, "no_answer") for record in NO_ANSWER),
    ({"question": "p", "options": ["1", "2"], "answer": "B"}, "choices"),
    ({"question": "p \ud800", "answer": "5"}, "bad_utf8"),
])  # fmt: skip
def test_a_record_that_is_no_question_is_counted_with_file_and_line(record, cause, tmp_path):
    questions, counts, log = asked(write_jsonl(tmp_path / "mixed.jsonl", [GSM8K, record]))
    assert [question.id for question in questions] == ["mixed.jsonl:1"]
    assert counts == {"records": 2, "questions": 1, cause: 1}
    assert any(f"{tmp_path / 'mixed.jsonl'}:2: skipped" in line for line in log)


def test_a_folder_is_read_in_the_order_of_its_names_whatever_the_seed(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.json"):
        write_jsonl(tmp_path / name, [GSM8K])
    pq.write_table(pa.Table.from_pylist([GSM8K]), tmp_path / "d.parquet")
    expected = ["a.jsonl.gz:1", "b.jsonl:1", "d.parquet:1", "sub/c.json:1"]
    for seed in (0, 1, 2):
        questions, _, log = asked(tmp_path, seed=seed)
        assert [question.id for question in questions] == expected
    assert log[-1].startswith("data: 4 questions") and log[-1].endswith("skipped: nothing")


def test_questions_end_at_max_passages_and_a_source_without_any_says_why(tmp_path):
    questions, _, log = asked(write_jsonl(tmp_path / "a.jsonl", [GSM8K] * 5), max_passages=2)
    assert len(questions) == 2 and "max_passages=2 reached" in log[0]
    with pytest.raises(DataError, match=r"no usable question in .*a\.jsonl: skipped 5 no_answer; first.*a\.jsonl:1"):
        asked(write_jsonl(tmp_path / "a.jsonl", [{"question": "p"}] * 5))
