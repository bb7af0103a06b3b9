"""Whatever a model writes and whatever a source holds: properties of parsers, rewards and masks on generated input;
of broken files the good part is kept, the rest counted, and nothing but a DataError of one line comes out.

The default suite runs a seeded share; the marked tests (`-m faults`) run the same functions on all of it.
"""

import gzip
import json
import os
import random
import re
import shutil
import time
import zlib
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import regex
import test_data
from test_data import make_config, write_jsonl

from config import Config
from data import build_index, load_corpus, step_passages
from masking import MASK, make_mask, mask_at, random_span
from prompts import BOXED_OPENING, CLOSED, MASK_OPENING, START, last_answer, scan
from relatives.next_token import next_token_mask
from relatives.rlp import THINK_CLOSE
from relatives.rlvr import extract_gold, gold_answer, load_questions, question_text, strip_instruction
from rewards import FINAL_STOPS, QUOTES, answerable, caseless_match, exact_match, normalise, prefix_match
from text import files
from text.files import CAUSES, DataError
from text.paragraphs import paragraphs

tokenizer = test_data.tokenizer  # the fixture


def share_and_all(share: int, everything: int):
    """Two runs of a test: a share in the default suite, everything under the mark `faults`."""
    return pytest.mark.parametrize("count", [share, pytest.param(everything, marks=pytest.mark.faults)])


# ------------------------------------------------------------------------------------------- what a model may write
PIECES = (
    [r"\boxed{", r"\mask{", r"\bo", "boxed{", r"\boxed", r"\\boxed{", "{", "}", "\\", r"\\", r"\{", r"\}"]
    + ["{}", r"\text{", r"\mathbf {", r"\text", r"\frac{1}{2}", r"\%", r"\,", "\\ ", "~", "$", "####", "1,024"]
    + ["</think>", "</", *"abZ059.,;:?-–\"'`“”«»’。、()[]", " ", "  ", "\n", "\r\n", "\t", "\v", "\x1f"]
    + ["\x85", "\u2028", "\u3000", "\0", "\x7f", "\ufeff", "\ufffe", "\ud800", "\udc00"]
    + ["\U0001f468\u200d\U0001f469", "\U0010ffff", "é", "e\u0301", "\u0301\u0323", "\u0345", "ﬁ", "Ａ", "½"]
    + ["ﷺ", "İ", "ß", "ǅ", "北", "か\u3099", "각", "\u1100\u1161", "א", "שלום", "ا", "لا", "\u202e", "\u200f"]
    + ["\u2067", "٣", "๓", "[mask]", "{passage}", "{answer}"]
)  # fmt: skip
ANSWER = [r"\boxed{", r"\mask{", "a", "}", "}"]


def texts(count: int, seed: int):
    """(rng, text): mostly short, one in a hundred with a long run; a third begins or ends in the middle of a piece."""
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        some = rng.sample(PIECES, rng.randrange(1, 9)) + rng.choice([[], ANSWER, ANSWER])
        parts = rng.choices(some if rng.random() < 0.8 else PIECES, k=rng.randrange(14))
        if rng.random() < 0.01:
            parts.insert(rng.randrange(len(parts) + 1), rng.choice(PIECES) * rng.randrange(200, 700))
        text = "".join(parts)
        if rng.random() < 0.33:
            text = text[rng.randrange(4) : len(text) - rng.randrange(4)]
        yield rng, text


def balanced_by_counting(text: str, command: str) -> str | None:
    """The last balanced answer by the plain definition: try the openings from the last, counting braces. Quadratic."""
    opening = re.compile(rf"\\{command}[ \t\n]*{{")
    for start in reversed([found.end() for found in opening.finditer(text)]):
        depth, position = 1, start
        while position < len(text):
            if text[position] == "\\" and not opening.match(text, position):
                position += not opening.match(text, position + 1)  # skips the escaped character, but for an opening
            else:
                depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start:position]
            position += 1
    return None


@share_and_all(2_000, 40_000)
def test_parsers_agree_with_their_plain_definitions(count):
    found = closed = 0
    for rng, text in texts(count, seed=1):
        for command, opening in (("boxed", BOXED_OPENING), ("mask", MASK_OPENING)):
            answer = last_answer(text, command)
            assert answer == balanced_by_counting(text, command), repr(text)
            found += answer is not None
            # a scan of pieces, empty ones included, is closed exactly when the text so far has an answer
            state, position = START, 0
            while position < len(text):
                piece = text[position : position + (rng.randrange(6) if len(text) < 60 else rng.randrange(200))]
                state, position = scan(state, piece, opening), position + len(piece)
                assert (state == CLOSED) == (last_answer(text[:position], command) is not None), (text, position)
            closed += state == CLOSED
        state = START
        for position, char in enumerate(text[:200], 1):
            state = scan(state, char, THINK_CLOSE)
            assert (state == CLOSED) == (THINK_CLOSE in text[:position]), repr(text)
    assert found > count / 20 and closed == found  # the sample tells both cases apart


@share_and_all(2_000, 40_000)
def test_matches_are_an_equivalence_of_clean_forms(count):
    right, stable, earlier = 0, 0, ""
    for rng, text in texts(count, seed=2):
        form, other = normalise(text), rng.choice([earlier, f"{text}.", f"“{text}”", text.upper()])
        assert form == " ".join(form.split()), repr(text)
        assert exact_match(text, text) == float(form != "") and exact_match(form or None, text) in (0.0, 1.0)
        assert exact_match(text, other) == exact_match(other, text) <= caseless_match(text, other)
        assert exact_match(None, text) == exact_match("", text) == caseless_match(None, text) == 0.0
        if answerable(text):
            assert exact_match(f" {text}\n", text) == 1.0, repr(text)
        plain = not set(form) & {"\\", "{", "}", "~"} and not (form and (form[-1] in FINAL_STOPS or form[0] in QUOTES))
        if plain and max(map(len, form.split()), default=0) < 128:
            assert normalise(form) == form, repr(text)
            stable += form != ""
            assert exact_match(rf"\text{{{form}}}.", form) == exact_match(f"“{form}”", form) == float(form != "")
        prefixes = tuple(text[:end] for end in sorted(rng.sample(range(len(text) + 1), min(3, len(text)))))
        expected = any(text[:4].strip() == prefix.strip() != "" for prefix in prefixes)
        assert prefix_match(text[:4], prefixes) == float(expected) and prefix_match(None, prefixes) == 0.0
        right, earlier = right + exact_match(text, other), text
    assert right > count / 4 and stable > count / 8


@share_and_all(1_000, 20_000)
def test_a_mask_put_back_gives_the_passage_again(count):
    causes = set()
    for rng, text in texts(count, seed=3):
        passage = SimpleNamespace(text=(text * rng.randrange(1, 4)).replace(MASK, "mask"), labels=None)
        text, start = passage.text, rng.randrange(len(passage.text) + 1)
        end = rng.randrange(start, min(len(text), start + 12) + 1)
        words = rng.choice([text[start:end], text[start:end], text[start:end] + "x", last_answer(text, "boxed")])
        rules = ["main", "one_mask", "words", "one_mask_words"]
        config = Config(mask_rule=rng.choice(rules), max_occurrences=rng.randrange(1, 9))
        made = [make_mask(words, passage, config, rng), mask_at(passage, start, end, config)]
        if rng.random() < 0.2:
            made.append(random_span(passage, config, rng))
        for mask in made:
            causes.add(mask.invalid)
            assert (mask.masked == "") == (mask.invalid != ""), repr(text)
            if mask.invalid:
                continue
            back = mask.masked.replace(MASK, mask.target)
            # other occurrences may be spaced in another way, or have other invisible characters
            same = [regex.sub(r"\p{Cf}", "", one).split() for one in (back, text)]
            assert back == text if mask.masked.count(MASK) == 1 else same[0] == same[1], (text, words)
            assert text[mask.start :].startswith(mask.target) and mask.masked[mask.start :].startswith(MASK)
            assert answerable(mask.target) and len(mask.words.split()) <= config.max_span_words
        assert 1 <= made[0].occurrences <= config.max_occurrences or made[0].invalid
        borders = sorted({0, len(text), *(rng.randrange(len(text) + 1) for _ in range(5))})
        tokens = list(zip(borders, borders[1:], strict=False))
        for number in range(len(tokens)):
            mask = next_token_mask(passage, tokens, number, Config())
            if not mask.invalid:
                assert mask.masked.removesuffix(MASK) + mask.prefixes[-1] == text[: tokens[-1][1]]
                assert prefix_match(mask.target, mask.prefixes) == 1.0
    found = {"", "no_answer", "empty", "not_answerable", "not_in_passage", "too_many_occurrences"}
    assert found <= causes <= found | {"too_many_words", "too_long"}


def value(rng: random.Random, text: str, depth: int = 0):
    """Anything that a JSON record may hold."""
    kinds = [text, text, text[:3], None, True, 7, -1.5, float("nan"), float("inf"), 1e300, 10**400, "", [], {}]
    if depth < 3 and rng.random() < 0.4:
        some = [value(rng, text, depth + 1) for _ in range(rng.randrange(3))]
        names = rng.choices(["role", "content", "ground_truth", text[:2]], k=len(some))
        return rng.choice([some, dict(zip(names, some, strict=True)), [dict(zip(names, some, strict=True))]])
    return rng.choice(kinds)


@share_and_all(1_000, 20_000)
def test_answers_questions_prompts_and_paragraphs_from_anything(count):
    golds = 0
    for rng, text in texts(count, seed=4):
        gold, after = extract_gold(text), text.strip().split("\n")[-1].partition("####")[2]
        expected = after.strip().removeprefix("$") if after else (last_answer(text, "boxed") or "").strip()
        assert (gold or "").replace(",", "") == expected.replace(",", ""), repr(text)
        golds += gold is not None
        fields = ["prompt", "question", "problem", "answer", "final_answer", "solution", "reward_model"]
        record = {name: value(rng, text) for name in rng.sample(fields, rng.randrange(len(fields)))}
        for found in (question_text(record), gold_answer(record)):
            assert isinstance(found, str) and (found == "" or found.strip()), repr(record)
        assert strip_instruction(strip_instruction(text)) == strip_instruction(text)
        kept, dropped = paragraphs(text)
        assert dropped >= 0 and all("\n" not in paragraph for paragraph in kept), repr(text)
        words = iter(text.split())
        assert all(word in words for paragraph in kept for word in paragraph.split()), repr(text)  # in order
    assert golds > count / 40


MEGABYTES = [*"{}\\ ", "\n", "\\boxed{", "\\boxed{}", "\\{", "\\\\boxed{{", "####\n", "#### ", "a ", "\u0301\u0323"]


@pytest.mark.parametrize("unit", [
    "\\boxed{{", "#", "\\text{", '"', "a ", *(pytest.param(unit, marks=pytest.mark.faults) for unit in MEGABYTES),
])  # fmt: skip
def test_a_megabyte_takes_each_parser_less_than_a_second(unit):
    text = unit * (1_000_000 // len(unit))
    passage = SimpleNamespace(text=text, labels=None)
    parsers = {
        "last_answer": lambda: last_answer("\\boxed{" + text, "boxed"),
        "scan": lambda: scan(START, "\\boxed{" + text, BOXED_OPENING), "exact_match": lambda: exact_match(text, "a"),
        "prefix_match": lambda: prefix_match(text, ("a", text)),
        "make_mask": lambda: make_mask(text, passage, Config(), random.Random(0)),
        "make_mask, no caps": lambda: make_mask(text[:20] + "a", passage, Config(max_span_words=0), random.Random(0)),
        "make_mask, words": lambda: make_mask("a a", passage, Config(mask_rule="words"), random.Random(0)),
        "extract_gold": lambda: extract_gold(text + "\nx"), "extract_gold, one line": lambda: extract_gold(text),
        "paragraphs": lambda: paragraphs(f"x{text}y\nz."),
    }
    for name, parse in parsers.items():
        started = time.process_time()
        parse()
        assert time.process_time() - started < 1, name


# ---------------------------------------------------------------------------------------------- what a file may hold
GOOD = "A sentence of at least eight words, number {}, stands here."


def record(number: int) -> dict:
    """An article and a question in one."""
    both = dict.fromkeys(("text", "question"), GOOD.format(number))
    return {"id": f"a{number}", "title": f"T{number}", "url": f"u/{number}", "answer": "7"} | both


def damaged(rng: random.Random, whole: bytes, values=range(256)) -> bytes:
    """Cut off at some place, or with another byte there."""
    place = rng.randrange(len(whole))
    return whole[:place] if rng.random() < 0.3 else whole[:place] + bytes([rng.choice(values)]) + whole[place + 1 :]


def one_line(text: str) -> bool:
    return text.isprintable() and 0 < len(text) < 2500


@pytest.fixture
def read(tmp_path, tokenizer):
    """(source, config keys) -> texts of the passages and of the questions, counts of both; nothing after a DataError.

    Every line that is logged, and the error, is short and printable.
    """

    def read_once(source: Path, **changes) -> tuple[list[str], list[str], dict, dict]:
        config, logged = make_config(source, heldout=0.4, **changes), []
        rows, counts, questions, question_counts, folder = [], {}, [], {}, tmp_path / ".index"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            rows, counts, _ = test_data.build(config, tokenizer, folder, logged=logged)
            step_passages(load_corpus(folder, config), config, 0)
        except DataError as error:
            logged.append(str(error))
        try:
            questions, question_counts = load_questions(config, log=logged.append)
            json.dumps([question.id for question in questions], ensure_ascii=False).encode()
        except DataError as error:
            logged.append(str(error))
        assert logged and all(map(one_line, logged)), [line for line in logged if not one_line(line)]
        return [row["text"] for row in rows], [question.text for question in questions], counts, question_counts

    return read_once


@share_and_all(30, 4_000)
def test_a_gzip_cut_anywhere_gives_every_line_before_the_cut(count, tmp_path, read):
    rng, source = random.Random(5), tmp_path / "a.jsonl.gz"
    records = [record(number) | {"note": rng.random()} for number in range(60)]
    members = [write_jsonl(source, half).read_bytes() for half in (records[:30], records[30:])]
    payload = b"".join(members)
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
        kept, asked, counts, question_counts = read(source)
        expected = [record["text"] for record in records[: text.count(b"\n")]]
        assert kept == asked == expected, cut
        if expected:
            broken = int(cut not in (len(members[0]), len(payload)))
            assert counts.get("unreadable", 0) == question_counts.get("unreadable", 0) == broken


def odd_columns() -> dict[str, pa.Array]:
    """Columns of one row in types that a text column may turn out to have."""
    return {
        "int": pa.array([7]), "bool": pa.array([True]), "null": pa.nulls(1), "binary": pa.array([b"caf\xe9"]),
        "large": pa.array([GOOD], pa.large_string()), "view": pa.array([GOOD], pa.string_view()),
        "dictionary": pa.array([GOOD]).dictionary_encode(), "list": pa.array([[GOOD]]),
        "struct": pa.array([{"role": GOOD}]), "nul": pa.array(["\0" + GOOD]), "decimal": pa.array([Decimal("1.5")]),
        "twins": pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"]),
        "map": pa.array([[("a", GOOD)]], pa.map_(pa.string(), pa.string())), "date": pa.array([10**8], pa.date32()),
        "year 30000": pa.array([900_000_000_000], pa.timestamp("s")), "nanoseconds": pa.array([1], pa.timestamp("ns")),
        "no zone": pa.array([1], pa.timestamp("us", tz="Nowhere/Land")),
        "duration": pa.array([2**62], pa.duration("s")), "latin": pa.array([b"caf\xe9 " * 8]).view(pa.utf8()),
    }  # fmt: skip


@pytest.mark.parametrize("column", [
    "text", "answer",
    *(pytest.param(n, marks=pytest.mark.faults) for n in "id title labels question prompt reward_model".split()),
])  # fmt: skip
@pytest.mark.parametrize("kind", odd_columns())
def test_a_parquet_column_of_any_type(kind, column, tmp_path, read):
    rows = pa.Table.from_pylist([record(0)])
    rows = rows.drop_columns([column] if column in rows.column_names else [])
    try:
        pq.write_table(rows.append_column(column, odd_columns()[kind]), tmp_path / "a.parquet")
    except (pa.ArrowException, ValueError):
        pytest.skip("parquet has no such type")
    write_jsonl(tmp_path / "b.jsonl", [record(number) for number in range(1, 7)])
    kept, asked, _, _ = read(tmp_path)
    assert {GOOD.format(number) for number in range(1, 7)} <= set(kept) & set(asked)


@share_and_all(25, 2_000)
def test_a_parquet_file_cut_or_flipped_anywhere(count, tmp_path, read):
    whole, source = tmp_path / "whole", tmp_path / "a.parquet"
    test_data.write_parquet(whole, [record(n) for n in range(1, 60)], row_group_size=20, use_dictionary=False)
    write_jsonl(tmp_path / "good.jsonl", [record(number) for number in (0, *range(100, 106))])
    for number in range(count):
        rng = random.Random(number)
        once = damaged(rng, whole.read_bytes())
        source.write_bytes(damaged(rng, once) if once and rng.random() < 0.5 else once)
        kept, asked, counts, _ = read(tmp_path)
        assert {GOOD.format(0), GOOD.format(105)} <= set(kept) & set(asked), number
        # nothing is lost in silence: all there, or a problem counted
        assert len(kept) == 66 or sum(counts.get(cause, 0) for cause in CAUSES), number


def test_a_folder_of_odd_names_links_and_pipes(tmp_path, read):
    names = ["a\nb", "\x1b[2J", "\u202edesrever", "-rf", "'", '"', "a b", "é北", "x" * 240, "%s{}", "~", "$HOME", "\\"]
    names += ["\u2028", os.fsdecode(b"caf\xe9"), "a#b", "a:1"]
    top, files = tmp_path / "src", []
    for number, name in enumerate(names):
        other = {"text": f"{GOOD} {number}", "question": f"q{number}", "answer": "7"}
        files.append(write_jsonl(top / f"{name[:20]}.d/{name}.jsonl", [record(number), other, b"{torn"]))
    (top / "loop.jsonl").symlink_to("loop.jsonl")
    (top / "gone.jsonl").symlink_to("nowhere")
    (top / "again").symlink_to(".")
    (top / "folder.jsonl").mkdir()
    os.mkfifo(top / "pipe.jsonl")
    kept, asked, counts, question_counts = read(top)
    assert len(kept) == len(asked) == 2 * len(names)
    assert counts["bad_json"] == question_counts["bad_json"] == len(names)
    for file in files:  # and each by itself
        kept, asked, _, _ = read(file, max_passages=2)
        assert len(kept) == len(asked) == 2
    file.write_bytes(b"")
    assert read(file)[0] == []


@pytest.mark.parametrize("error", [
    PermissionError(13, "Permission denied"), OSError(5, "Input/output error"), FileNotFoundError(2, "gone"),
])  # fmt: skip
def test_an_unreadable_file_is_counted_and_the_others_are_read(error, tmp_path, read, monkeypatch):
    for name in ("a.jsonl", "b.txt", "c.jsonl.gz", "d.parquet"):
        (tmp_path / name).write_bytes(b"x")
    write_jsonl(tmp_path / "good.jsonl", [record(number) for number in range(6)])

    def refuse(path, *mode):
        if Path(path).name != "good.jsonl":
            raise error
        return open(path, *mode)

    monkeypatch.setattr(files, "open", refuse, raising=False)
    monkeypatch.setattr(gzip, "open", refuse)
    monkeypatch.setattr(pq, "ParquetFile", refuse)
    kept, asked, counts, question_counts = read(tmp_path)
    assert len(kept) == len(asked) == 6
    assert counts["unreadable"] == question_counts["unreadable"] == 4


@share_and_all(30, 2_000)
def test_a_damaged_index_is_one_line_and_is_built_again(count, tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", [record(number) for number in range(20)])
    config, folder = make_config(source, heldout=0.4), tmp_path / "index"
    build_index(config, tokenizer, folder, log=lambda _: None)
    whole = {name: (folder / name).read_bytes() for name in ("index.json", "passages.jsonl")}
    refused = again = 0
    for number in range(count):
        rng = random.Random(number)
        for name, payload in whole.items():
            (folder / name).write_bytes(payload)
        name = rng.choice(list(whole))
        (folder / name).write_bytes(damaged(rng, whole[name], b'\x00\xff{}[]"\n,:9a'))
        for _ in range(2):
            try:
                corpus = load_corpus(folder, config)
                assert len(corpus.train) + len(corpus.heldout) == 20
                again += 1
            except DataError as error:
                message = str(error)
                assert one_line(message) and (f"delete {folder}" in message or "delete it" in message)
                refused += 1
            build_index(config, tokenizer, folder, log=lambda _: None)  # does nothing where only passages are damaged
    assert refused > count / 4 and again > count / 4
