"""Broken sources: what is good in them is kept, the rest is counted, and nothing but a DataError of one line comes out.

The default suite runs a seeded share; the tests marked `faults` run the same functions on all of it.
"""

import gzip
import json
import os
import random
import zlib
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_data
from test_fuzz import share_and_all

from config import Config
from data import build_index, load_corpus, step_passages
from text import files as sources
from text.files import CAUSES, DataError
from relatives.rlvr import load_questions

tokenizer = test_data.tokenizer  # the fixture
GOOD = "A sentence of at least eight words, number {}, stands here."


def record(number: int) -> dict:
    """An article and a question in one."""
    text = GOOD.format(number)
    return {
        "id": f"a{number}", "title": f"T{number}", "url": f"u/{number}", "text": text, "question": text,
        "answer": "7",
    }  # fmt: skip


def lines_of(records: list) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def one_line(text: str) -> bool:
    return text.isprintable() and 0 < len(text) < 2500


def read(source: Path, tokenizer, folder: Path, **changes) -> tuple[list[str], dict, list[str], dict]:
    """Texts of the passages, counts of the index, texts of the questions, their counts; nothing after a DataError.

    Every line that is logged, and the error, is short and printable.
    """
    values = {"min_passage_tokens": 5, "max_passage_tokens": 40, "heldout": 0.4, **changes}
    config, logged = Config(data=str(source), **values), []
    kept, counts, asked, question_counts = [], {}, [], {}
    folder.mkdir(exist_ok=True)
    for index in folder.glob("*"):
        index.unlink()
    try:
        build_index(config, tokenizer, folder, log=logged.append)
        rows = [json.loads(line) for line in (folder / "passages.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
        kept, counts = [row["text"] for row in rows], json.loads((folder / "index.json").read_text())["counts"]
        step_passages(load_corpus(folder, config), config, 0)
    except DataError as error:
        logged.append(str(error))
    try:
        questions, question_counts = load_questions(config, log=logged.append)
        asked = [question.text for question in questions]
        json.dumps([question.id for question in questions], ensure_ascii=False).encode()
    except DataError as error:
        logged.append(str(error))
    assert logged and all(map(one_line, logged)), [line for line in logged if not one_line(line)]
    return kept, counts, asked, question_counts


@share_and_all(30, 4_000)
def test_a_gzip_cut_anywhere_gives_every_line_before_the_cut(count, tmp_path, tokenizer):
    rng = random.Random(5)
    records = [record(number) | {"note": rng.random()} for number in range(60)]
    payload = gzip.compress(lines_of(records[:30])) + gzip.compress(lines_of(records[30:]))  # two members
    source = tmp_path / "a.jsonl.gz"
    for cut in sorted(rng.sample(range(len(payload)), min(count, len(payload)))):
        source.write_bytes(payload[:cut])
        text, rest = b"", payload[:cut]
        while rest:
            part = zlib.decompressobj(31)
            try:
                text += part.decompress(rest)
            except zlib.error:
                break
            rest = part.unused_data
        whole = text.count(b"\n")
        kept, counts, asked, question_counts = read(source, tokenizer, tmp_path / "index")
        expected = [record["text"] for record in records[:whole]]
        assert kept == expected and asked == expected, cut
        if whole:
            broken = int(cut not in (len(gzip.compress(lines_of(records[:30]))), len(payload)))
            assert counts.get("unreadable", 0) == question_counts.get("unreadable", 0) == broken


# ------------------------------------------------------------------------------------------------------ parquet
def odd_columns() -> dict[str, pa.Array]:
    """Columns of one row in types that a text column may turn out to have."""
    return {
        "int": pa.array([7]), "bool": pa.array([True]), "null": pa.nulls(1), "binary": pa.array([b"caf\xe9"]),
        "large": pa.array([GOOD], pa.large_string()), "view": pa.array([GOOD], pa.string_view()),
        "dictionary": pa.array([GOOD]).dictionary_encode(), "list": pa.array([[GOOD]]),
        "struct": pa.array([{"role": GOOD}]),
        "twins": pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"]),
        "map": pa.array([[("a", GOOD)]], pa.map_(pa.string(), pa.string())), "decimal": pa.array([Decimal("1.5")]),
        "year 30000": pa.array([900_000_000_000], pa.timestamp("s")), "nanoseconds": pa.array([1], pa.timestamp("ns")),
        "no zone": pa.array([1], pa.timestamp("us", tz="Nowhere/Land")), "date": pa.array([10**8], pa.date32()),
        "duration": pa.array([2**62], pa.duration("s")), "latin": pa.array([b"caf\xe9 " * 8]).view(pa.utf8()),
        "nul": pa.array(["\0" + GOOD]),
    }  # fmt: skip


@pytest.mark.parametrize("column", [
    "text", "answer",
    *(pytest.param(n, marks=pytest.mark.faults) for n in "id title labels question prompt reward_model".split()),
])  # fmt: skip
@pytest.mark.parametrize("kind", odd_columns())
def test_a_parquet_column_of_any_type(kind, column, tmp_path, tokenizer):
    rows = pa.Table.from_pylist([record(0)])
    table = rows.drop_columns([column] if column in rows.column_names else []).append_column(
        column, odd_columns()[kind]
    )
    try:
        pq.write_table(table, tmp_path / "a.parquet")
    except (pa.ArrowException, ValueError):
        pytest.skip("parquet has no such type")
    (tmp_path / "b.jsonl").write_bytes(lines_of([record(number) for number in range(1, 7)]))
    kept, counts, asked, _ = read(tmp_path, tokenizer, tmp_path / ".index")
    assert {GOOD.format(number) for number in range(1, 7)} <= set(kept) & set(asked)


@share_and_all(25, 2_000)
def test_a_parquet_file_cut_or_flipped_anywhere(count, tmp_path, tokenizer):
    rows = pa.Table.from_pylist([record(number) for number in range(1, 60)])
    pq.write_table(rows, tmp_path / "whole.parquet", row_group_size=20, use_dictionary=False)
    payload = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "whole.parquet").unlink()
    (tmp_path / "good.jsonl").write_bytes(lines_of([record(0)] + [record(number) for number in range(100, 106)]))
    for number in range(count):
        rng = random.Random(number)
        broken = bytearray(payload)
        if rng.random() < 0.3:
            broken = broken[: rng.randrange(len(broken))]
        else:
            for _ in range(rng.choice([1, 3])):
                broken[rng.randrange(len(broken))] ^= rng.randrange(1, 256)
        (tmp_path / "a.parquet").write_bytes(broken)
        kept, counts, asked, question_counts = read(tmp_path, tokenizer, tmp_path / ".index")
        assert {GOOD.format(0), GOOD.format(105)} <= set(kept) & set(asked), number
        # nothing is lost in silence: all there, or a problem counted
        assert len(kept) == 66 or sum(counts.get(cause, 0) for cause in CAUSES), number


# ------------------------------------------------------------------------------------------------------ folders
def test_a_folder_of_odd_names_links_and_pipes(tmp_path, tokenizer):
    top = tmp_path / "src"
    top.mkdir()
    names = [
        "a\nb", "\x1b[2J", "\u202edesrever", "-rf", "'", '"', "a b", "é北", "x" * 240, "%s{}", "~", "$HOME", "\\",
        "\u2028",
    ]  # fmt: skip
    names += [os.fsdecode(b"caf\xe9"), "a#b", "a:1"]
    for number, name in enumerate(names):
        folder = top / f"{name[:20]}.d"
        folder.mkdir()
        (folder / f"{name}.jsonl").write_bytes(
            lines_of([record(number), {"text": f"{GOOD} {number}", "question": f"q{number}", "answer": "7"}])
            + b"{torn\n"
        )
    (top / "loop.jsonl").symlink_to("loop.jsonl")
    (top / "gone.jsonl").symlink_to("nowhere")
    (top / "again").symlink_to(".")
    (top / "folder.jsonl").mkdir()
    os.mkfifo(top / "pipe.jsonl")
    kept, counts, asked, question_counts = read(top, tokenizer, tmp_path / "index")
    assert len(kept) == len(asked) == 2 * len(names)
    assert counts["bad_json"] == question_counts["bad_json"] == len(names)
    for name in names:  # and each by itself
        [file] = (top / f"{name[:20]}.d").iterdir()
        kept, _, asked, _ = read(file, tokenizer, tmp_path / "index", max_passages=2)
        assert len(kept) == len(asked) == 2
    file.write_bytes(b"")
    assert read(file, tokenizer, tmp_path / "index")[0] == []


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error"), FileNotFoundError(2, "gone")]
)
def test_an_unreadable_file_is_counted_and_the_others_are_read(error, tmp_path, tokenizer, monkeypatch):
    for name in ("a.jsonl", "b.txt", "c.jsonl.gz", "d.parquet"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "good.jsonl").write_bytes(lines_of([record(number) for number in range(6)]))

    def refuse(path, *mode):
        if Path(path).name != "good.jsonl":
            raise error
        return open(path, *mode)

    monkeypatch.setattr(sources, "open", refuse, raising=False)
    monkeypatch.setattr(gzip, "open", refuse)
    monkeypatch.setattr(pq, "ParquetFile", refuse)
    kept, counts, asked, question_counts = read(tmp_path, tokenizer, tmp_path / ".index")
    assert len(kept) == len(asked) == 6
    assert counts["unreadable"] == question_counts["unreadable"] == 4


# ------------------------------------------------------------------------------------------------------ the index
@share_and_all(30, 2_000)
def test_a_damaged_index_is_one_line_and_is_built_again(count, tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines_of([record(number) for number in range(20)]))
    config = Config(data=str(tmp_path / "a.jsonl"), min_passage_tokens=5, max_passage_tokens=40, heldout=0.4)
    folder = tmp_path / "index"
    build_index(config, tokenizer, folder, log=lambda _: None)
    whole = {name: (folder / name).read_bytes() for name in ("index.json", "passages.jsonl")}
    refused = again = 0
    for number in range(count):
        rng = random.Random(number)
        for name, payload in whole.items():
            (folder / name).write_bytes(payload)
        name = rng.choice(list(whole))
        broken = bytearray(whole[name])
        if rng.random() < 0.4:
            broken = broken[: rng.randrange(len(broken))]
        else:
            broken[rng.randrange(len(broken))] = rng.choice(b'\x00\xff{}[]"\n,:9a')
        (folder / name).write_bytes(broken)
        built = Counter()
        for _ in range(2):
            try:
                corpus = load_corpus(folder, config)
                assert len(corpus.train) + len(corpus.heldout) == 20
                built["whole"] += 1
            except DataError as error:
                assert one_line(str(error)) and f"delete {folder}" in str(error).replace(
                    "delete it", f"delete {folder}"
                )
                refused += 1
            build_index(config, tokenizer, folder, log=lambda _: None)  # does nothing where only passages are damaged
        again += built["whole"]
    assert refused > count / 4 and again > count / 4
