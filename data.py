"""Files -> articles -> passages -> the passages of a step.

    articles --drop headings, lists, references--> paragraphs --join up to a drawn length--> passages.jsonl
    passages.jsonl --hash of the article--> train | heldout --permutation of (seed, epoch)--> passages of a step

`config.data` is a hub name, or a local parquet, jsonl, json or txt file (the last three also .gz), or a folder of them.
A json file holds records a line, one array, {"examples": [...]} or one record. `file_records` reads all of them, for
passages, questions and benchmarks. A record that cannot be used is counted under a cause of CAUSES, with file and line.
The hub is read through `datasets`; files are not, because it neither names a bad line nor goes on after it.

Order: files, row groups and rows of parquet files come in seeded order, lines of other files as they stand. An index
capped by max_passages is thus a sample of a parquet file, but the first part of a jsonl: shuffle it beforehand.
Prose: a text of one line is taken as it is. Else hard-wrapped blocks are joined and each line is a paragraph; it is
kept when it has MIN_PROSE_CHARS characters, ends like a sentence and is no list item; all from END_SECTION on goes.
Thai, Lao and Tibetan mark no end of a sentence: any line counts as ended and may be cut at a space.
A record with `labels`, a short name of its kind for each word, is taken whole; other labels are ignored.
Lengths: a passage draws a target, log-uniform between min_passage_tokens and max_passage_tokens, and takes paragraphs
until it is reached. A paragraph over the maximum is cut at the last sentence end that fits, again and again. Ours: the
paper says "Wikipedia" and lengths, no more.

Alone:  python data.py configs/tiny.yaml   builds the index in RUN_DIR/cache and shows the passages of step 0.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import random
import re
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import regex

from config import Config, one_line, parse_command_line

LABEL = re.compile(r"\w{1,20}", re.ASCII)
RESERVED = ("[mask]", "\\mask{", "\\boxed{")  # they would be taken for the prompts' own marks
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell half of a pair, UTF-8 cannot write it
CAUSES = {
    "unreadable": "file broken or cut off; what came before the break is kept",
    "long_line": "line over 64 MiB",
    "bad_utf8": "not UTF-8",
    "bad_json": "not a JSON object",
    "no_text": "no text field, or not a string",
    "duplicate": "the same record was read before",
    "empty": "no text",
    "no_prose": "article with headings, lists or references only",
    "too_short": "passage or rest of an article under min_passage_tokens",
    "too_long": "sentence over max_passage_tokens",
    "reserved": "passage contains " + " or ".join(RESERVED) + " or a special token of the tokenizer",
    "no_question": "no text in question, problem, prompt, or a chat that is not one user turn",
    "no_answer": "no answer that can be checked",
    "choices": "multiple choice",
}
QUIET = ("no_prose", "too_short", "too_long", "reserved")  # normal; the others are logged with file and line
LINE_LIMIT = 64 << 20  # bytes; a file without line ends must not fill the memory
ARRAY_LIMIT = 1 << 30  # bytes; a longer file is not parsed as one JSON value
TXT_PIECE = 1 << 18  # characters; a longer text file is cut at blank lines into pieces, not held whole
Skip = Callable[..., None]  # skip(cause, where, detail="")
Record = tuple[str, str, dict]  # where, for messages; "file:line", the id of a record that has none; fields


class DataError(ValueError):
    """One line: the source, what is wrong with it, what to do."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


class Tally:
    """Counts what is skipped; the first three of a cause are logged with file and line, the QUIET ones are not."""

    def __init__(self, log: Callable[[str], None]):
        self.counts: Counter[str] = Counter()
        self.log, self.first_problem = log, ""

    def skip(self, cause: str, where: str, detail: str = "") -> None:
        self.counts[cause] += 1
        if cause not in QUIET and self.counts[cause] <= 3:
            line = one_line(f"{where}: skipped, {CAUSES[cause]}" + (f" ({detail})" if detail else ""))
            self.first_problem = self.first_problem or f"; first problem: {line}"
            self.log(f"data: {line}" + ("; more of these are only counted" if self.counts[cause] == 3 else ""))

    def skipped(self) -> str:
        return ", ".join(f"{self.counts[cause]:,} {cause}" for cause in CAUSES if self.counts[cause]) or "nothing"


# ---------------------------------------------------------------------------------------------- where records come from


def source_path(config: Config) -> Path:
    """config.data as a path, links followed. Uses os.path, which never raises: a link loop, an overlong name or an
    unknown user gives a path that does not exist."""
    return Path(os.path.realpath(os.path.expanduser(config.data)))


def local_files(config: Config, log: Callable[[str], None]) -> list[Path] | None:
    """Files of a local source, sorted; None when config.data is no path, which makes it a hub name."""
    root = source_path(config)
    if not os.path.exists(root):
        return None
    if root.is_file():
        if not _kind(root):
            raise DataError(f"{root}: unknown kind of file; .parquet, .jsonl, .json, .txt, the last three also .gz")
        return [root]
    part = root / config.data_config
    if config.data_config and os.path.isdir(part):  # a download in the hub's layout: that part only
        root = part
    found = sorted(p for p in root.rglob("*") if p.is_file())
    found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(root).parts)]
    files = [p for p in found if _kind(p)]
    if len(files) < len(found):
        log(one_line(f"data: {len(found) - len(files)} files of other kinds in {root} are ignored"))
    if not files:
        raise DataError(f"{root}: no .parquet, .jsonl, .json or .txt file in this folder")
    return files


def _kind(path: Path) -> str:
    if path.suffix.lower() == ".parquet":
        return "parquet"
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    return {".jsonl": "json", ".json": "json", ".txt": "txt"}.get(suffix, "")


def file_records(
    files: list[Path],
    config: Config,
    skip: Skip,
    columns: tuple = (),
    needed: tuple[str, tuple] = ("no_text", ()),
    shuffled: bool = False,
) -> Iterator[Record]:
    """The records of files of any kind, one reader for passages, questions and benchmarks.

    Of a parquet file the `columns` (all, if none is named). needed: a cause and columns; a parquet file with none of
    these is skipped for that cause.
    A txt file is one article, under config.text_field. shuffled: files and parquet rows come in an order of the seed.
    """
    top, files = source_path(config), list(files)
    if shuffled:
        random.Random(config.seed).shuffle(files)
    for path in files:
        name = one_line(path.name if path == top else path.relative_to(top).as_posix())  # it becomes part of ids
        kind = _kind(path)
        if path.stat().st_size == 0:
            skip("empty", str(path), "0 bytes")
        elif kind == "parquet":
            order = random.Random(f"{config.seed} {name}") if shuffled else None
            yield from _parquet_records((path, name), columns, needed, skip, order)
        elif kind == "txt":
            yield from _txt_records(path, name, config.text_field, skip)
        else:
            yield from _json_records(path, name, skip)


def hub_records(
    name: str, part: str, split: str = "train", seed: int | None = None, field: str = ""
) -> Iterator[Record]:
    """The records of a hub dataset; raises DataError in one line, also if the first record lacks `field`.

    With a seed they are streamed, row groups in an order of the seed, so that only those that are needed are fetched.
    """
    from datasets import load_dataset  # here alone: local files need neither the import nor a network

    try:
        if seed is None:
            records = load_dataset(name, part or None, split=split)
        else:
            stream = load_dataset(name, part or None, split=split, streaming=True)
            records = stream.reshard().shuffle(seed=seed, buffer_size=1000)
        for number, record in enumerate(records):
            if number == 0 and field and field not in record:
                raise DataError(f"{name}: no column text_field={field!r}; columns are {', '.join(record)}")
            yield f"{name} record {number}", f"{name}:{number}", record
    except DataError:
        raise
    except Exception as error:  # network, hub and parser each raise their own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DataError(
            f"hub dataset {name!r}, configuration {part!r}, split {split!r}, cannot be read ({reason}); check the name "
            "and the network, or give the path of a local copy"
        ) from None


def _parquet_records(
    file_name: tuple[Path, str], wanted: tuple, needed: tuple[str, tuple], skip: Skip, order: random.Random | None
) -> Iterator[Record]:
    """A broken row group loses that group; a broken footer (as in a truncated file) loses the whole file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (path, name), (cause, needed) = file_name, needed
    broken = (OSError, ValueError, OverflowError, pa.ArrowException)
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        columns = [column for column in names if column in wanted or not wanted]
        if len(set(columns)) < len(columns):
            raise ValueError(f"two columns of one name among {', '.join(columns)}")
        starts = np.cumsum([0] + [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)])
    except broken as error:
        return skip("unreadable", str(path), str(error).split("\n")[0])
    if needed and not set(columns) & set(needed):
        return skip(cause, str(path), f"no column {' or '.join(needed)} among {', '.join(names)}")
    groups = list(range(file.num_row_groups))
    if order:
        order.shuffle(groups)
    for group in groups:
        first = int(starts[group]) + 1
        try:
            for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=columns):
                for i in order.sample(range(batch.num_rows), batch.num_rows) if order else range(batch.num_rows):
                    row = first + i
                    try:
                        record = {column: _value(batch.column(column)[i]) for column in columns}
                    except UnicodeDecodeError as error:
                        skip("bad_utf8", f"{path}: row {row}", error.reason)
                    else:
                        yield f"{path}: row {row}", f"{name}:{row}", record
                first += batch.num_rows
            if first <= starts[group + 1]:  # pyarrow may take a broken page for the end
                raise ValueError(f"{starts[group + 1] + 1 - first} rows are missing")
        except broken as error:
            skip("unreadable", f"{path}: row group {group} from row {first}", str(error).split("\n")[0])


def _value(scalar):
    """None where Python has no such value (a date in the year 30000, a struct with one name twice)."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        raise
    except (ValueError, LookupError, OverflowError):
        return None


def _json_records(path: Path, name: str, skip: Skip) -> Iterator[Record]:
    values = _whole_json(path, skip)
    for number, value in _lines(path, skip) if values is None else enumerate(values, 1):
        where = f"{path}:{number}" if values is None else f"{path}: record {number}"
        if values is None:
            if not (value or "").strip():
                continue
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                skip("bad_json", where, str(error))
                continue
        if isinstance(value, dict):
            yield where, f"{name}:{number}", value
        else:
            skip("bad_json", where, f"a {type(value).__name__}")


def _whole_json(path: Path, skip: Skip) -> list | None:
    """The records of a file that is one JSON value over one line or many; None for a file to be read line by line."""
    try:
        with _open(path) as file:
            first = next((line for line in iter(lambda: file.readline(LINE_LIMIT), b"") if line.strip()), b"")
            array = first.lstrip(b"\xef\xbb\xbf \t").startswith(b"[")
            if not array and not path.name.lower().removesuffix(".gz").endswith(".json"):
                return None
            text = (first + file.read(ARRAY_LIMIT)).decode("utf-8-sig")
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if not array:
            return None
        skip("bad_json", f"{path}:{error.lineno}", error.msg)
        return []
    except (OSError, EOFError, zlib.error, ValueError, RecursionError):
        return None  # the reader of lines reports it
    if isinstance(value, dict):
        examples = value.get("examples")
        return examples if isinstance(examples, list) else [value]
    return value if isinstance(value, list) else [value]


def _txt_records(path: Path, name: str, text_field: str, skip: Skip) -> Iterator[Record]:
    """One article per file, titled by the file's name. A long file is cut at blank lines into pieces, which share the
    title and so the side of the split; a piece with an unreadable line is dropped whole."""
    title = one_line(Path(path.name.removesuffix(".gz")).stem)
    piece, size, first, broken = [], 0, 1, False  # lines, characters, number of the first line, holds a bad line
    for number, line in chain(_lines(path, skip), [(0, "")]):
        piece.append((line or "").rstrip())
        size += len(piece[-1])
        broken = broken or line is None
        if number == 0 or (line is not None and not piece[-1] and size > TXT_PIECE):
            if not broken and (size or first == 1):
                yield f"{path}:{first}", f"{name}:{first}", {text_field: "\n".join(piece), "title": title}
            piece, size, first, broken = [], 0, number + 1, False


def _open(path: Path):
    return (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb")


def _lines(path: Path, skip: Skip) -> Iterator[tuple[int, str | None]]:
    """(line number from 1, its text) of a text file; None for a line that was skipped. Ends early at a gzip's break."""
    number = 0
    try:
        with _open(path) as file:
            while line := file.readline(LINE_LIMIT):
                number += 1
                text = None
                if len(line) == LINE_LIMIT and not line.endswith(b"\n"):
                    while (rest := file.readline(LINE_LIMIT)) and not rest.endswith(b"\n"):
                        pass
                    skip("long_line", f"{path}:{number}")
                else:
                    try:
                        text = line.decode("utf-8-sig")  # some editors put a byte order mark first
                    except UnicodeDecodeError as error:
                        skip("bad_utf8", f"{path}:{number}", f"byte {error.start}: {error.reason}")
                yield number, text
    except (OSError, EOFError, zlib.error) as error:
        skip("unreadable", f"{path}:{number + 1}", str(error))


# ------------------------------------------------------------------------------------------------- articles to passages

INDEX_VERSION = 3  # raise it with any edit that changes passages, or an old index would be reused
MIN_PROSE_CHARS = 40  # letters; a character of WIDE says as much as three
SCRIPTS = r"\p{scx=Han}\p{scx=Hira}\p{scx=Kana}\p{scx=Bopo}\p{scx=Thai}\p{scx=Laoo}\p{scx=Khmr}\p{scx=Mymr}\p{scx=Tibt}"
UNSPACED = rf"[[{SCRIPTS}]&&[\p{{L}}\p{{M}}]]"
"""A letter of a script that puts no space between words. For `regex`, in version 1 of its syntax (?V1)."""
WIDE = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}]")
UNMARKED = r"[\p{Thai}\p{Lao}\p{Tibetan}]"  # scripts whose sentences end without a mark
CLOSERS = r"""["'”’»›)\]」』）】》]*"""
SENTENCE_END = regex.compile(rf"(?:[\p{{Sentence_Terminal}}…]{CLOSERS}|{UNMARKED})$")
STOP = r"[[\p{Sentence_Terminal}…]--[.]]"
SENTENCE_BREAK = regex.compile(  # where a paragraph may be cut; a full stop after "Mr" or an initial is no end
    rf"(?V1)(?:(?<!\b(?:\p{{L}}|\p{{L}}\.\p{{L}}|[A-Z][a-z]{{1,2}}|Prof|Capt|etc|vs|cf|ca|no|vol|pp))\.|{STOP}){CLOSERS}\s+(?!\p{{Ll}})"
    rf"|[。！？｡។៕။]{CLOSERS}(?![\s\p{{P}}]|$)|(?<={UNMARKED})\s+(?={UNMARKED})"
)
BESIDE_WRAP = rf"[{UNSPACED}\u3001-\u303f\uff01-\uff60]"
WRAP_WITHOUT_SPACE = regex.compile(rf"(?V1)(?<={BESIDE_WRAP})\n(?={BESIDE_WRAP})")
LIST_MARK = re.compile(r"[*•·|;:]|\{\||[-–—!#]+\s|\(?\d{1,3}[.)]\s")
END_SECTION = re.compile(
    r"^[=#: \t]*(references|external links|see also|further reading|notes|footnotes|citations|sources|bibliography"
    r"|notes and references|references and notes|notes and citations|works cited)[=#: \t]*$",
    re.IGNORECASE | re.MULTILINE,
)
BATCH_ARTICLES, BATCH_CHARS = 512, 4 << 20
CHARS_PER_TOKEN = 32  # a paragraph with more than this on average is too long without asking the tokenizer


@dataclass
class Article:
    """A usable record. `key` decides its side of the split: articles of one url (else title, else id) stay together."""

    id: str  # unique in the corpus
    title: str
    url: str
    text: str
    labels: list[str] | None
    where: str  # "file:line", for messages
    key: str


def read_articles(records: Iterable[Record], config: Config, tally: Tally) -> Iterator[Article]:
    """Usable articles. A record that repeats id, title, url and text is dropped; an id with another text gets the
    record's file and line added, since many corpora number the records of each file anew."""
    seen, ids = set(), set()
    for where, own_id, record in records:
        text, labels = record.get(config.text_field), record.get("labels")
        id_, title, url = (str(v) if isinstance(v := record.get(k), str | int) else "" for k in ("id", "title", "url"))
        named = "\0".join((id_, title, url, text if isinstance(text, str) else ""))
        digest = hashlib.sha256(named.encode("utf-8", "surrogatepass")).digest()[:16]
        if not isinstance(text, str):
            tally.skip("no_text", where, f"text_field={config.text_field!r}, fields are {', '.join(list(record)[:8])}")
        elif not text.strip():
            tally.skip("empty", where)
        elif SURROGATE.search(named):
            tally.skip("bad_utf8", where, "half of a surrogate pair")
        elif digest in seen:
            tally.skip("duplicate", where, id_)
        else:
            if labels is not None and not _label_words(labels, text):
                if not tally.counts["labels_ignored"]:
                    tally.log(one_line(f"data: {where}: labels are ignored, they are not one short name for each word"))
                tally.counts["labels_ignored"] += 1
                labels = None
            key = url or title or id_ or own_id
            id_ = id_ or own_id
            id_ = f"{id_} {own_id}" if id_ in ids else id_
            seen.add(digest)
            ids.add(id_)
            yield Article(id_, title, url, text, labels, where, key)


def _label_words(labels, text: str) -> bool:
    return (
        isinstance(labels, list) and len(labels) == len(text.split())
        and all(isinstance(label, str) and LABEL.fullmatch(label) for label in labels)
    )  # fmt: skip


@dataclass
class Passage:
    id: str  # "<article id>#<k>", unique in the corpus
    title: str
    url: str
    text: str
    labels: list[str] | None = None  # one per white-space separated word, where the corpus has them
    answer: str = ""  # the gold answer, where the text is a question (rlvr)


def paragraphs(text: str) -> tuple[list[str], int]:
    """Prose paragraphs of an article, white space folded, and the number of lines dropped. Rules: see the module.

    "Ada Lovelace was an English mathematician.\\n\\nLife\\n\\nShe was born in London in the year 1815.\\n\\nNotes"
    keeps the two sentences.
    """
    text = text.replace("\r\n", "\n").strip()
    if "\n" not in text:
        return [text], 0
    kept, used = [], 0
    end = END_SECTION.search(text)
    for block in re.split(r"\n\s*\n", text[: end.start()] if end else text):
        lines = [line.rstrip() for line in block.split("\n") if line.strip()]
        if _is_hard_wrapped(lines):
            used += len(lines) - 1
            lines = [" ".join(WRAP_WITHOUT_SPACE.sub("", "\n".join(lines)).split("\n"))]
        for line in lines:
            listed = len(lines) > 1 and line[0].isspace()  # the hub's Wikipedia indents list items
            if not listed and _is_prose(line.strip()):
                kept.append(" ".join(line.split()))
                used += 1
    return kept, sum(1 for line in text.split("\n") if line.strip()) - used


def _is_prose(line: str) -> bool:
    return _long_enough(line) and bool(SENTENCE_END.search(line)) and not LIST_MARK.match(line)


def _long_enough(line: str) -> bool:
    return len(line) >= MIN_PROSE_CHARS or len(line) + 2 * len(WIDE.findall(line)) >= MIN_PROSE_CHARS


def _is_hard_wrapped(lines: list[str]) -> bool:
    """Most line ends fall inside a sentence: the next line starts in lower case, or a long line ends without a stop."""
    if len(lines) < 2 or any(line[0].isspace() or LIST_MARK.match(line) for line in lines[1:]):
        return False
    inside = sum(
        after[0].islower() or (_long_enough(line) and not SENTENCE_END.search(line) and line[-1] != ":")
        for line, after in zip(lines, lines[1:], strict=False)
    )
    return 2 * inside >= len(lines) - 1


def group_paragraphs(lengths: list[int], joint: int, longest: int, draw_target: Callable[[], float]) -> list[list[int]]:
    """Consecutive paragraphs -> groups of their numbers, one group a passage. lengths, joint, longest in tokens.

    A group is closed when it reaches its target or when the next paragraph would take it over `longest`; `joint` is
    the length of the blank line between two. Lengths 50, 60, 90, 30 with joint 1, longest 120 and targets of 100 give
    [[0, 1], [2], [3]].
    """
    groups: list[list[int]] = []
    size, target = 0, -1.0
    for number, length in enumerate(lengths):
        if not groups or size >= target or size + joint + length > longest:
            groups.append([])
            size, target = -joint, draw_target()
        groups[-1].append(number)
        size += joint + length
    return groups


def cut_at_sentences(texts: list[str], tokenizer, longest: int) -> list[list[str]]:
    """Each text in pieces of whole sentences, as many as fit `longest` tokens; a sentence that does not fit is a piece
    of its own. With longest=6 and a token a word, "It is old. It fell in 1810. Why?" gives "It is old.", "It fell in
    1810. Why?"."""
    sentences = []
    for text in texts:
        ends = [0, *(match.end() for match in SENTENCE_BREAK.finditer(text)), len(text)]
        sentences.append([text[start:end] for start, end in zip(ends, ends[1:], strict=False) if start < end])
    sizes = iter(_token_counts([sentence for some in sentences for sentence in some], tokenizer, longest))
    pieces: list[list[str]] = []
    for some in sentences:
        pieces.append([])
        filled = longest
        for sentence in some:
            size = next(sizes)
            if filled + size <= longest:
                pieces[-1][-1] += sentence
                filled += size
            else:
                pieces[-1].append(sentence)
                filled = size
    return [[piece.strip() for piece in some] for some in pieces]


def cut(articles: Iterable[Article], tokenizer, config: Config, tally: Tally) -> Iterator[tuple[Passage, Article]]:
    """Articles -> passages that fit, with the article each comes from; few tokenizer calls per batch of articles."""
    low, high = config.min_passage_tokens, config.max_passage_tokens

    def measured(texts: list[list[str]]) -> list[list[int]]:
        counts = iter(_token_counts([text for some in texts for text in some], tokenizer, high))
        return [[next(counts) for _ in some] for some in texts]

    joint = _token_counts(["\n\n"], tokenizer, high)[0]
    reserved = (*RESERVED, *tokenizer.all_special_tokens)  # a special token in a text would become one in the prompt
    for batch in _batches(articles):
        parts = [([a.text], 0) if a.labels is not None else paragraphs(a.text) for a in batch]
        kept = [some for some, _ in parts]
        sizes = measured(kept)
        long = [(a, i) for a, row in enumerate(sizes) for i, n in enumerate(row) if n > high and not batch[a].labels]
        pieces = cut_at_sentences([kept[a][i] for a, i in long], tokenizer, high)
        for (a, i), some, lengths in reversed(list(zip(long, pieces, measured(pieces), strict=True))):
            kept[a][i : i + 1], sizes[a][i : i + 1] = some, lengths
            if min(lengths) <= high:
                tally.counts["cut"] += 1
        joined = []  # tokens of joined paragraphs need not add up: count the joined text
        for article, some, lengths in zip(batch, kept, sizes, strict=True):
            # a generator of its own, so that an article's passages do not depend on what was read before it
            draw = random.Random(f"{config.seed} {article.id}").uniform
            groups = group_paragraphs(lengths, joint, high, lambda d=draw: math.exp(d(math.log(low), math.log(high))))
            joined.append(["\n\n".join(some[i] for i in group) for group in groups])
        for article, texts, lengths, (some, dropped) in zip(batch, joined, measured(joined), parts, strict=True):
            tally.counts["articles"] += 1
            tally.counts["dropped_lines"] += dropped
            if not some:
                tally.skip("no_prose", article.where)
            for number, (text, size) in enumerate(zip(texts, lengths, strict=True)):
                if size < low or size > high:
                    tally.skip("too_short" if size < low else "too_long", article.where)
                elif any(mark in text for mark in reserved):
                    tally.skip("reserved", article.where)
                else:
                    yield Passage(f"{article.id}#{number}", article.title, article.url, text, article.labels), article


def _token_counts(texts: list[str], tokenizer, longest: int) -> list[int]:
    """Tokens of each text, special ones not counted; over CHARS_PER_TOKEN * longest characters it is longest + 1."""
    counts = [longest + 1] * len(texts)
    short = [i for i, text in enumerate(texts) if len(text) <= CHARS_PER_TOKEN * longest]
    if short:  # a tokenizer refuses an empty list
        batch = [texts[i] for i in short]
        ids = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for i, row in zip(short, ids, strict=True):
            counts[i] = len(row)
    return counts


def _batches(articles: Iterable[Article]) -> Iterator[list[Article]]:
    batch, size = [], 0
    for article in articles:
        batch.append(article)
        size += len(article.text)
        if len(batch) == BATCH_ARTICLES or size > BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass
class Corpus:
    train: list[Passage]
    heldout: list[Passage]
    counts: dict[str, int]  # articles, passages, train, heldout, dropped_lines, cut, and each cause that occurred


def build_index(
    config: Config, tokenizer, folder: Path, log: Callable[[str], None] = print, neighbours: Iterable[Path] = ()
) -> None:
    """Reads config.data and writes folder/passages.jsonl and folder/index.json (key, counts). For ONE process.

    Does nothing when the index is there and was made from the same config keys, tokenizer and data, wherever they are
    now; copies it when one of the folders `neighbours` has it, so that a run and its controls stream the hub once.
    Both files are written beside and renamed, so a crash leaves no half index. Raises DataError when the source cannot
    be read or yields no passage.
    """
    folder, start = Path(folder), time.time()
    passages_file, index_file = folder / "passages.jsonl", folder / "index.json"
    files = local_files(config, log)
    fingerprint = data_fingerprint(config, files)
    key = _index_key(config, tokenizer, fingerprint)
    if index_file.is_file() and passages_file.is_file() and _read_index(index_file).get("key") == key:
        log(f"data: index in {folder} is reused")
        return
    for other in neighbours:
        if _take_over(other, folder, key):
            log(f"data: index taken over from {other}")
            return

    tally = Tally(log)
    counts = tally.counts
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / "passages.jsonl.tmp"
    if files is None:
        records = hub_records(config.data, config.data_config, seed=config.seed, field=config.text_field)
    else:
        columns = (config.text_field, "id", "title", "url", "labels")
        records = file_records(files, config, tally.skip, columns, ("no_text", columns[:1]), shuffled=True)
    with beside.open("w", encoding="utf-8") as out:
        for passage, article in cut(read_articles(records, config, tally), tokenizer, config, tally):
            out.write(json.dumps({**asdict(passage), "key": article.key}, ensure_ascii=False) + "\n")
            counts["passages"] += 1
            if counts["passages"] % 20_000 == 0:
                log(f"data: {counts['passages']:,} passages, {time.time() - start:.0f} s")
            if counts["passages"] == config.max_passages:
                end = f"data: max_passages={config.max_passages} reached at {article.where}; nothing further is read"
                log(one_line(end))
                break
    if not counts["passages"]:
        beside.unlink()
        raise DataError(
            f"no usable passage in {config.data}: {counts['articles']} articles read, skipped: {tally.skipped()}"
            f"; check text_field, min_passage_tokens, max_passage_tokens{tally.first_problem}"
        )
    index_file.unlink(missing_ok=True)  # else a crash between the renames would pair the old key with new passages
    beside.replace(passages_file)
    beside = folder / "index.json.tmp"
    beside.write_text(json.dumps({"key": key, "data_fingerprint": fingerprint, "counts": counts}, indent=1))
    beside.replace(index_file)
    log(
        f"data: {counts['articles']:,} articles read, {counts['passages']:,} passages kept in "
        f"{time.time() - start:.1f} s; {counts['dropped_lines']:,} lines dropped as heading, list or reference; "
        f"{counts['cut']:,} paragraphs cut at sentence ends; skipped: {tally.skipped()}"
    )


def _take_over(other: Path, folder: Path, key: str) -> bool:
    """Copies the index of another folder if it has this key and is whole; then nothing else is touched."""
    names = ("passages.jsonl", "index.json")  # in this order: a rebuild deletes the index first
    with suppress(OSError):
        if _read_index(other / names[1]).get("key") != key:
            return False
        folder.mkdir(parents=True, exist_ok=True)
        copies = [Path(shutil.copy(other / name, folder / f"{name}.tmp")) for name in names]
        index = _read_index(copies[1])  # it may have been built anew meanwhile
        with copies[0].open("rb") as lines:
            if index.get("key") == key and index["counts"]["passages"] == sum(1 for _ in lines):
                (folder / names[1]).unlink(missing_ok=True)
                for copy, name in zip(copies, names, strict=True):
                    copy.replace(folder / name)
                return True
    return False


def data_fingerprint(config: Config, files: list[Path] | None = None) -> str:
    """A hash of what config.data holds: for files their sizes and eight blocks of 1 MiB spread over each, wherever they
    lie; for the hub the dataset's name and configuration."""
    files = files or local_files(config, lambda line: None)
    if files is None:
        return hashlib.sha256(json.dumps([config.data, config.data_config]).encode()).hexdigest()
    whole = hashlib.sha256()
    for path in files:
        try:
            size = path.stat().st_size
            whole.update(size.to_bytes(8, "big"))
            with open(path, "rb") as file:
                for place in range(8):
                    file.seek(max(0, size - (1 << 20)) * place // 7)
                    whole.update(file.read(1 << 20))
        except OSError as error:
            whole.update(str(error).encode("utf-8", "surrogateescape"))
    return whole.hexdigest()


def corpus_key(run_dir: Path) -> str:
    """data_fingerprint of the text that the index of a run was made from; "" if the run has no index."""
    with suppress(OSError):
        return str(_read_index(Path(run_dir) / "cache/index.json").get("data_fingerprint", ""))
    return ""


def _index_key(config: Config, tokenizer, fingerprint: str) -> str:
    names = "text_field seed max_passages min_passage_tokens max_passage_tokens".split()
    whole = getattr(tokenizer, "backend_tokenizer", None)
    known = hashlib.sha256(whole.to_str().encode()).hexdigest() if whole else len(tokenizer)
    made_from = [INDEX_VERSION, known, fingerprint, [getattr(config, name) for name in names]]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


def load_corpus(folder: Path, config: Config) -> Corpus:
    """The index, split by article; of one article alone the last passages are held out. Raises DataError when the index
    is missing or incomplete, or one side is empty."""
    passages_file, index_file = Path(folder) / "passages.jsonl", Path(folder) / "index.json"
    if not (passages_file.is_file() and index_file.is_file()):
        raise DataError(f"{folder}: no index; build_index comes first")
    train, heldout, keys = [], [], set()
    try:
        counts = _read_index(index_file)["counts"]
        with passages_file.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                key = row.pop("key")
                keys.add(key)
                (heldout if is_heldout(key, config.heldout) else train).append(Passage(**row))
        found, expected = len(train) + len(heldout), counts["passages"]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{folder}: damaged ({type(error).__name__}); delete it to build it again") from None
    if found != expected:
        raise DataError(f"{passages_file}: {expected} passages expected; delete {folder} to build it again")
    if len(keys) == 1 and found > 1:  # its last passages stand for a held-out article
        several = train + heldout
        last = max(1, round(config.heldout * found))
        train, heldout = several[:-last], several[-last:]
    for side, passages, advice in (("held out", heldout, "raise"), ("left to train on", train, "lower")):
        if not passages:
            raise DataError(
                f"{config.data}: nothing is {side}, with heldout={config.heldout} of {len(keys)} articles; {advice} "
                "heldout or give more articles (the split goes by url, else title, else id; a text file is one article)"
            )
    return Corpus(train, heldout, {**counts, "train": len(train), "heldout": len(heldout)})


def _read_index(path: Path) -> dict:
    """What index.json says; nothing if it is damaged."""
    try:
        index = json.loads(path.read_bytes())
    except ValueError:
        return {}
    return index if isinstance(index, dict) else {}


def is_heldout(key: str, share: float) -> bool:
    """Whether an article is never trained on: SHA-256 of its key, as a number in [0, 1), is under `share`.

    Takes no seed: runs with different seeds are probed on the same articles, and a larger share holds out a superset.
    """
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64 < share


def step_passages(corpus: Corpus, config: Config, step: int) -> list[Passage]:
    """The passages of a step (from 0): `passages_per_step` many, a function of (seed, step) and of nothing else.

    All steps laid end to end run through one permutation of the training passages after another, a new one each epoch.
    """
    size = len(corpus.train)
    places = range(step * config.passages_per_step, (step + 1) * config.passages_per_step)
    orders = {
        epoch: np.random.default_rng((config.seed, epoch)).permutation(size)
        for epoch in range(places[0] // size, places[-1] // size + 1)
    }
    return [corpus.train[orders[place // size][place % size]] for place in places]


def main() -> None:
    """Builds the index of a config and shows what the first step would read."""
    from transformers import AutoTokenizer

    config = parse_command_line("usage: python data.py CONFIG.yaml [key=value ...]")
    folder = Path(config.run_dir) / "cache"
    try:
        build_index(config, AutoTokenizer.from_pretrained(config.model, trust_remote_code=False), folder)
        corpus = load_corpus(folder, config)
    except DataError as error:
        raise SystemExit(f"data error: {error}") from None
    print(corpus.counts)
    for passage in step_passages(corpus, config, 0):
        print(f"\n--- {passage.id}  {passage.title}  {passage.url}\n{passage.text}")


if __name__ == "__main__":
    main()
