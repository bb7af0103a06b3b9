"""Where text comes from: hub datasets, parquet, jsonl and text files -> articles, one record at a time.

Nothing is held whole: a source may be larger than memory. A record that cannot be used is handed to `skip` with a
cause of CAUSES, a file and a line; what came before a break in a file is kept. Leaves out what becomes of an article
(passages.py).
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from config import Config
from words import one_line

LABELS = ("noise", "fact", "shown", "unseen", "copy", "template")  # kinds of words, in a corpus that labels them
RESERVED = ("[mask]", "\\mask{", "\\boxed{")  # they would be taken for the prompts' own marks
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell half of a pair, UTF-8 cannot write it
CAUSES = {
    "unreadable": "file broken or cut off; what came before the break is kept",
    "long_line": "line over 64 MiB",
    "bad_utf8": "not UTF-8",
    "bad_json": "not a JSON object on one line",
    "no_text": "no text field, or not a string",
    "bad_labels": f"labels are not one of {', '.join(LABELS)} per word",
    "duplicate_id": "id seen before",
    "empty": "no text",
    "no_prose": "article with headings, lists or references only",
    "too_short": "passage or rest of an article under min_passage_tokens",
    "too_long": "paragraph over max_passage_tokens",
    "reserved": "passage contains " + " or ".join(RESERVED) + " or a special token of the tokenizer",
}
LINE_LIMIT = 64 << 20  # bytes; a file without line ends must not fill the memory
TXT_PIECE = 1 << 18  # characters; a longer text file is cut at blank lines into pieces, not held whole

Skip = Callable[..., None]  # skip(cause, where, detail="")


class DataError(ValueError):
    """One line: the source, what is wrong with it, what to do."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


@dataclass
class Article:
    """A usable record. `key` decides its side of the split: articles of one url (else title, else id) stay together."""

    id: str
    title: str
    url: str
    text: str
    labels: list[str] | None
    where: str  # "file:line", for messages

    @property
    def key(self) -> str:
        return self.url or self.title or self.id


def read_articles(records: Iterable[tuple[str, str, dict]], config: Config, skip: Skip) -> Iterator[Article]:
    """(where, id to use if it has none, record) -> usable articles."""
    seen = set()
    for where, own_id, record in records:
        text, labels = record.get(config.text_field), record.get("labels")
        id_, title, url = (str(v) if isinstance(v := record.get(k), str | int) else "" for k in ("id", "title", "url"))
        id_ = id_ or own_id
        if not isinstance(text, str):
            skip("no_text", where, f"text_field={config.text_field!r}, fields are {', '.join(list(record)[:8])}")
        elif not text.strip():
            skip("empty", where)
        elif any(SURROGATE.search(value) for value in (text, id_, title, url)):
            skip("bad_utf8", where, "half of a surrogate pair")
        elif labels is not None and not (
            isinstance(labels, list) and all(label in LABELS for label in labels) and len(labels) == len(text.split())
        ):
            skip("bad_labels", where)
        elif id_ in seen:
            skip("duplicate_id", where, id_)
        else:
            seen.add(id_)
            yield Article(id_, title, url, text, labels, where)


def hub_records(config: Config) -> Iterator[tuple[str, str, dict]]:
    """Streams a hub dataset, row groups in seeded order, so that only those that are needed are fetched."""
    from datasets import load_dataset  # here alone: local files need neither the import nor a network

    name = config.data
    try:
        stream = load_dataset(name, config.data_config or None, split="train", streaming=True)
        for number, record in enumerate(stream.reshard().shuffle(seed=config.seed, buffer_size=1000)):
            if number == 0 and config.text_field not in record:
                raise DataError(f"{name}: no column text_field={config.text_field!r}; columns are {', '.join(record)}")
            yield f"{name} record {number}", f"{name}:{number}", record
    except DataError:
        raise
    except Exception as error:  # network, hub and parser each raise their own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DataError(
            f"hub dataset {name!r}, data_config={config.data_config!r}, cannot be read ({reason}); check the name and "
            "the network, or give data= the path of a local copy"
        ) from None


def source_path(config: Config) -> Path:
    """config.data as a path, links followed as far as they lead. By os.path, which raises at no name: a loop of links,
    a name too long or a user who does not exist is a path to nothing."""
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


def local_records(files: list[Path], config: Config, skip: Skip) -> Iterator[tuple[str, str, dict]]:
    top = source_path(config)
    files = list(files)
    random.Random(config.seed).shuffle(files)
    readers = {"parquet": _parquet_records, "json": _json_records, "txt": _txt_records}
    for path in files:
        name = one_line(path.name if path == top else path.relative_to(top).as_posix())  # it becomes part of ids
        if path.stat().st_size == 0:
            skip("empty", str(path), "0 bytes")
        else:
            yield from readers[_kind(path)](path, name, config, skip)


def _parquet_records(path: Path, name: str, config: Config, skip: Skip) -> Iterator[tuple[str, str, dict]]:
    wanted = (config.text_field, "id", "title", "url", "labels")
    order = random.Random(f"{config.seed} {name}")
    return parquet_rows(path, name, wanted, (config.text_field,), "no_text", skip, order)


def parquet_rows(
    path: Path, name: str, wanted: tuple, needed: tuple, cause: str, skip: Skip, order: random.Random | None = None
) -> Iterator[tuple[str, str, dict]]:
    """The wanted columns of each row (all, if none is named); skip(cause, ...) if none of the needed ones is there.

    As they stand, or with `order` row groups and rows shuffled. A broken row group costs that group, a broken table of
    contents (it is at the end: a file that was cut) the file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

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
    """A cell as a Python value; None where Python has none (a date in the year 30000, a struct with one name twice).
    Raises UnicodeDecodeError."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        raise
    except (ValueError, LookupError, OverflowError):
        return None


def _json_records(path: Path, name: str, config: Config, skip: Skip) -> Iterator[tuple[str, str, dict]]:
    for number, line in _lines(path, skip):
        where = f"{path}:{number}"
        if line is None or not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            skip("bad_json", where, str(error))
            continue
        if isinstance(record, dict):
            yield where, f"{name}:{number}", record
        else:
            skip("bad_json", where, f"a {type(record).__name__}")


def _txt_records(path: Path, name: str, config: Config, skip: Skip) -> Iterator[tuple[str, str, dict]]:
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
                values = {config.text_field: "\n".join(piece), "title": title}
                yield f"{path}:{first}", f"{name}:{first}", values
            piece, size, first, broken = [], 0, number + 1, False


def _lines(path: Path, skip: Skip) -> Iterator[tuple[int, str | None]]:
    """(line number from 1, its text) of a text file; None for a line that was skipped. Ends early at a gzip's break."""
    number = 0
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
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
