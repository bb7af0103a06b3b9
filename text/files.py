"""Files and the hub -> records, one reader for passages, questions and benchmarks.

Local parquet, jsonl, json or txt files (the last three also .gz), or a folder of them. A .json file holds records a
line, an array, an object with an array under one of ARRAY_KEYS, or one record; a .jsonl file may be an array, too. A
record that cannot be used is counted under a cause of CAUSES, with file and line. The hub is read through `datasets`;
files are not, because it neither names a bad line nor goes on after it. Files, row groups and rows of parquet files
come in seeded order, lines of other files as they stand: shuffle a long jsonl before max_passages takes its first part.
"""

import gzip
import json
import os
import random
import re
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path

from config import Config, ConfigError, one_line

RESERVED = ("[mask]", "\\mask{", "\\boxed{")  # they would be taken for the prompts' own marks
CAUSES = {
    "unreadable": "file broken or cut off; what came before the break is kept",
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
    "no_options": "not 2 to 26 options",
}
QUIET = ("no_prose", "too_short", "too_long", "reserved")  # normal; the others are logged with file and line
TURN, OPEN_AT_ONCE = 1000, 64  # records, files
ARRAY_KEYS = ("examples", "data", "rows", "records", "items", "articles")
ARRAY_LIMIT = 1 << 30  # bytes; a longer file is not parsed as one JSON value
TXT_PIECE = 1 << 18  # characters; a longer text file is cut at blank lines into pieces, not held whole
Skip = Callable[..., None]  # skip(cause, where, detail="")
Record = tuple[str, str, dict]  # where, for messages; "file:line", the id of a record that has none; fields


class DataError(ConfigError):
    """One line: the source, what is wrong with it, what to do."""

    kind = "data"


class Tally:
    """Counts what is skipped; the first three of a cause are logged with file and line, the QUIET ones are not."""

    def __init__(self, log: Callable[[str], None], name: str = "data"):
        self.counts: Counter[str] = Counter()
        self.log, self.name, self.first_problem = log, name, ""

    def skip(self, cause: str, where: str, detail: str = "") -> None:
        self.counts[cause] += 1
        if cause not in QUIET and self.counts[cause] <= 3:
            line = one_line(f"{where}: skipped, {CAUSES[cause]}" + (f" ({detail})" if detail else ""))
            self.first_problem = self.first_problem or f"; first problem: {line}"
            self.log(f"{self.name}: {line}" + ("; more of these are only counted" if self.counts[cause] == 3 else ""))

    def skipped(self) -> str:
        return ", ".join(f"{self.counts[cause]:,} {cause}" for cause in CAUSES if self.counts[cause]) or "nothing"


def source_path(config: Config) -> Path:
    """config.data as a path. Uses os.path, which never raises: a link loop, an overlong name or an unknown user gives
    a path that does not exist. Links keep their names, which say what kind of file they lead to."""
    return Path(os.path.abspath(os.path.expanduser(config.data)))


def local_files(config: Config, log: Callable[[str], None]) -> list[Path] | None:
    """Files of a local source, sorted; None when config.data is no path, which makes it a hub name."""
    root = source_path(config)
    if not os.path.exists(root):
        return None
    if os.path.isdir(root / config.data_config):  # of a download in the hub's layout that part only; "": the whole
        root /= config.data_config
    found = [root] if root.is_file() else [p for p in sorted(root.rglob("*")) if p.is_file() or p.is_symlink()]
    found = [path for path in found if "/." not in path.as_posix().removeprefix(root.as_posix())]  # none is hidden
    files = [path for path in found if _kind(path) and path.is_file()]
    if len(files) < len(found):
        log(one_line(f"data: {len(found) - len(files)} files of other kinds or linked folders in {root} are ignored"))
    if not files:
        raise DataError(f"{root}: no .parquet, .jsonl, .json or .txt file (the last three also .gz)")
    return files


def _kind(path: Path) -> str:
    found = re.search(r"\.(?:(parquet)|(jsonl|json|txt)(\.gz)?)$", path.name.lower())
    return (found[1] or found[2]) if found else ""


def file_records(
    files: list[Path], config: Config, skip: Skip, columns: tuple = (), needed: tuple[str, tuple] = ("no_text", ()),
    shuffled: bool = False,
) -> Iterator[Record]:  # fmt: skip
    """The records of files of any kind: of a parquet file the `columns` (all, if none is named), of a txt file one
    article, under config.text_field. needed: a cause and columns; a parquet file with none of these is skipped for that
    cause. shuffled: files and parquet rows come in an order of the seed, and files take turns, TURN records at a time:
    else a capped index would be made from the first one or two of them."""
    top, files = source_path(config), list(files)

    def records_of(path: Path) -> Iterator[Record]:
        name = one_line(path.name if path == top else path.relative_to(top).as_posix())  # it becomes part of ids
        kind = _kind(path)
        if path.stat().st_size == 0:
            skip("empty", str(path), "0 bytes")
        elif kind == "parquet":
            order = random.Random(f"{config.seed} {name}") if shuffled else None
            yield from _parquet_records(path, name, columns, needed, skip, order)
        elif kind == "txt":
            yield from _txt_records(path, name, config.text_field, skip)
        else:
            yield from _json_records(path, name, kind, skip)

    if shuffled:
        random.Random(config.seed).shuffle(files)
    for begin in range(0, len(files), OPEN_AT_ONCE):
        turns = deque((path, records_of(path)) for path in files[begin : begin + OPEN_AT_ONCE])
        while turns:
            path, records = turns.popleft()
            in_turn, got = shuffled and _kind(path) in ("parquet", "jsonl"), False  # others are held whole
            for record in islice(records, TURN if in_turn else None):
                got = True
                yield record
            if in_turn and got:
                turns.append((path, records))


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
            records = load_dataset(name, part or None, split=split, streaming=True).reshard()
            records = records.shuffle(seed=seed, buffer_size=1000)
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


def hub_commits(config: Config) -> str:
    """A line for the run's model and for its data set, if they are the hub's: the commit of today. Else empty."""
    from huggingface_hub import resolve_revision

    lines = ""
    for kind, name in (("model", config.model), ("dataset", config.data)):
        if not Path(name).expanduser().exists():
            with suppress(Exception):  # whoever reads it says what is wrong
                lines += f"{kind} {name}: {resolve_revision(name, repo_type=kind).resolved}\n"
    return lines


def _parquet_records(
    path: Path, name: str, wanted: tuple, needed: tuple[str, tuple], skip: Skip, order: random.Random | None
) -> Iterator[Record]:
    """A broken row group loses that group; a broken footer (as in a truncated file) loses the whole file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    broken, (cause, needed) = (OSError, ValueError, OverflowError, pa.ArrowException), needed
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    except broken as error:
        return skip("unreadable", str(path), str(error).split("\n")[0])
    columns = [column for column in names if column in wanted or not wanted]
    if needed and not set(columns) & set(needed):
        return skip(cause, str(path), f"no column {' or '.join(needed)} among {', '.join(names)}")
    groups = list(range(len(sizes)))
    if order:
        order.shuffle(groups)
    for group in groups:
        first, end = sum(sizes[:group]) + 1, sum(sizes[: group + 1])
        try:
            for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=columns):
                for i in order.sample(range(batch.num_rows), batch.num_rows) if order else range(batch.num_rows):
                    where = f"{path}: row {first + i}"
                    try:
                        [record] = batch.slice(i, 1).to_pylist()
                        record = {key: v.decode() if isinstance(v, bytes) else v for key, v in record.items()}
                    except (ValueError, LookupError, OverflowError) as error:  # also a date that Python does not have
                        skip("bad_utf8" if isinstance(error, UnicodeDecodeError) else "unreadable", where, str(error))
                    else:
                        yield where, f"{name}:{first + i}", record
                first += batch.num_rows
            if first <= end:  # pyarrow may take a broken page for the end
                raise ValueError(f"{end + 1 - first} rows are missing")
        except broken as error:
            skip("unreadable", f"{path}: row group {group} from row {first}", str(error).split("\n")[0])


def _json_records(path: Path, name: str, kind: str, skip: Skip) -> Iterator[Record]:
    whole = _whole_json(path, kind, skip)
    lines = ((number, line) for number, line in _lines(path, skip) if line and line.strip())
    for number, value in lines if whole is None else whole:
        where = f"{path}:{number}" if whole is None else f"{path}: record {number}"
        try:
            value = json.loads(value) if whole is None else value
        except (ValueError, RecursionError) as error:
            skip("bad_json", where, str(error))
            continue
        if isinstance(value, dict):
            yield where, f"{name}:{number}", value
        else:
            skip("bad_json", where, f"a {type(value).__name__}")


def _whole_json(path: Path, kind: str, skip: Skip) -> Iterable[tuple[int, object]] | None:
    """(number from 1, record) of a file that is one JSON value, a .jsonl only if it begins with [; else None."""
    try:
        with _open(path) as file:
            head = file.read(99)
            if kind == "jsonl" and not head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                return None
            text = (head + file.read(ARRAY_LIMIT)).decode("utf-8-sig")
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if kind == "jsonl" or not text.lstrip().startswith("["):
            return None
        skip("bad_json", f"{path}:{error.lineno}", error.msg)
        return []
    except (OSError, EOFError, zlib.error, ValueError, RecursionError):
        return None  # the reader of lines reports it
    if isinstance(value, dict):
        value = next((value[key] for key in ARRAY_KEYS if isinstance(value.get(key), list)), [value])
    return enumerate(value if isinstance(value, list) else [value], 1)


def _txt_records(path: Path, name: str, text_field: str, skip: Skip) -> Iterator[Record]:
    """One article per file, titled by the file's path. A long file is cut at blank lines into pieces, which share the
    title and so the side of the split; a piece with an unreadable line is dropped whole."""
    title = re.sub(r"(\.txt)?(\.gz)?$", "", name, flags=re.IGNORECASE)
    piece, size, first, broken = [], 0, 1, False  # lines, characters, number of the first line, holds a bad line
    for number, line in chain(_lines(path, skip, "; the article around it is dropped"), [(0, "")]):
        piece.append((line or "").rstrip())
        size += len(piece[-1])
        broken = broken or line is None
        if number == 0 or (line is not None and not piece[-1] and size > TXT_PIECE):
            if not broken and (size or first == 1):
                yield f"{path}:{first}", f"{name}:{first}", {text_field: "\n".join(piece), "title": title}
            piece, size, first, broken = [], 0, number + 1, False


def _open(path: Path):
    return (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb")


def _lines(path: Path, skip: Skip, lost: str = "") -> Iterator[tuple[int, str | None]]:
    """(line number from 1, its text) of a text file; None for a line that was skipped. Ends early at a gzip's break."""
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                text = None
                try:
                    text = line.decode("utf-8-sig")  # some editors put a byte order mark first
                except UnicodeDecodeError as error:
                    skip("bad_utf8", f"{path}:{number}", f"byte {error.start}: {error.reason}{lost}")
                yield number, text
    except (OSError, EOFError, zlib.error) as error:
        skip("unreadable", f"{path}:{number + 1}", str(error))
