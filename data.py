"""Passages: Wikipedia (or any text) -> an index of passages on disk -> the passages of each step.

    articles --drop headings, lists, references--> paragraphs --join up to a drawn length--> passages.jsonl
    passages.jsonl --hash of the article--> train | heldout --permutation of (seed, epoch)--> passages of a step

`config.data` is a hub name, or a local parquet, jsonl, json (a record per line), txt file (the last three also .gz), or
a folder of them; sources.py reads them, passages.py cuts them. One process builds the index; every process loads it. A
record that cannot be used is counted under a cause of CAUSES, never dropped in silence; an index is reused while what
it was made from stays the same.

Order: files and the row groups of parquet files come in seeded order, the hub's ten row groups at a time, and so do the
rows in them (a thousand at a time); lines of a jsonl or txt file come as they stand. An index capped by max_passages is
thus a seeded sample of row groups, but only the first part of one big jsonl: shuffle such a file beforehand.
Left out: near-duplicates, language and quality filters; languages that end sentences without punctuation (Thai).

Alone:  python data.py configs/tiny.yaml   builds the index in RUN_DIR/cache and shows the passages of step 0.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from config import Config, parse_command_line
from passages import INDEX_VERSION, Passage, cut
from sources import CAUSES, DataError, hub_records, local_files, local_records, read_articles
from words import one_line

QUIET = ("no_prose", "too_short", "too_long", "reserved")  # normal; the others are logged with file and line


@dataclass
class Corpus:
    train: list[Passage]
    heldout: list[Passage]
    counts: dict[str, int]  # articles, passages, train, heldout, dropped_lines, and each cause that occurred


def build_index(
    config: Config, tokenizer, folder: Path, log: Callable[[str], None] = print, neighbours: Iterable[Path] = ()
) -> None:
    """Reads config.data and writes folder/passages.jsonl and folder/index.json (key, counts). For ONE process.

    Does nothing when the index is there and was made from the same config keys, tokenizer and files (path, size, time);
    copies it when one of the folders `neighbours` has it, so that a run and its controls stream the hub once.
    Both files are written beside and renamed, so a crash leaves no half index. Raises DataError when the source cannot
    be read or yields no passage.
    """
    folder, start = Path(folder), time.time()
    passages_file, index_file = folder / "passages.jsonl", folder / "index.json"
    files = local_files(config, log)
    key = _index_key(config, tokenizer, files)
    if index_file.is_file() and passages_file.is_file() and _read_index(index_file).get("key") == key:
        log(f"data: index in {folder} is reused")
        return
    for other in neighbours:
        if _take_over(other, folder, key):
            log(f"data: index taken over from {other}")
            return

    counts: Counter[str] = Counter()
    problems: list[str] = []

    def skip(cause: str, where: str, detail: str = "") -> None:
        counts[cause] += 1
        if cause in QUIET:
            return
        line = one_line(f"{where}: skipped, {CAUSES[cause]}" + (f" ({detail})" if detail else ""))
        if counts[cause] <= 3:
            problems.append(line)
            log(f"data: {line}" + ("; more of these are only counted" if counts[cause] == 3 else ""))

    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / "passages.jsonl.tmp"
    records = hub_records(config) if files is None else local_records(files, config, skip)
    with beside.open("w", encoding="utf-8") as out:
        for passage, article in cut(read_articles(records, config, skip), tokenizer, config, counts, skip):
            out.write(json.dumps({**asdict(passage), "key": article.key}, ensure_ascii=False) + "\n")
            counts["passages"] += 1
            if counts["passages"] % 20_000 == 0:
                log(f"data: {counts['passages']:,} passages, {time.time() - start:.0f} s")
            if counts["passages"] == config.max_passages:
                end = f"data: max_passages={config.max_passages} reached at {article.where}; nothing further is read"
                log(one_line(end))
                break
    skipped = ", ".join(f"{counts[cause]:,} {cause}" for cause in CAUSES if counts[cause]) or "nothing"
    if not counts["passages"]:
        beside.unlink()
        names = [config.data] if files is None else [str(path) for path in files]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        first = f"; first problem: {problems[0]}" if problems else ""
        raise DataError(
            f"no usable passage in {', '.join(names[:3])}{more}: {counts['articles']} articles read, skipped: {skipped}"
            f"; check text_field, min_passage_tokens, max_passage_tokens{first}"
        )
    index_file.unlink(missing_ok=True)  # else a crash between the renames would pair the old key with new passages
    beside.replace(passages_file)
    beside = folder / "index.json.tmp"
    beside.write_text(json.dumps({"key": key, "counts": counts}, indent=1))
    beside.replace(index_file)
    seconds = time.time() - start
    log(
        f"data: {counts['articles']:,} articles read, {counts['passages']:,} passages kept in {seconds:.1f} s; "
        f"{counts['dropped_lines']:,} lines dropped as heading, list or reference; skipped: {skipped}"
    )


def _take_over(other: Path, folder: Path, key: str) -> bool:
    """Copies the index of another folder if it has this key and is whole; then nothing else is touched."""
    names = ("passages.jsonl", "index.json")  # in this order: who builds anew takes the index away first
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


def _index_key(config: Config, tokenizer, files: list[Path] | None) -> str:
    names = "data data_config text_field seed max_passages min_passage_tokens max_passage_tokens".split()
    whole = getattr(tokenizer, "backend_tokenizer", None)
    known = hashlib.sha256(whole.to_str().encode()).hexdigest() if whole else len(tokenizer)
    made_from = [INDEX_VERSION, known, [getattr(config, name) for name in names]]
    for path in files or []:
        made_from.append([str(path), path.stat().st_size, path.stat().st_mtime_ns])
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


def load_corpus(folder: Path, config: Config) -> Corpus:
    """The index, split by article. Raises DataError when it is missing or incomplete, or one side is empty."""
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
    Five passages, two a step: steps 0 and 1 take four, step 2 the fifth and the first of the next epoch. Ranks share
    out this list, so the world size has no say in it.
    """
    size = len(corpus.train)
    first = step * config.passages_per_step
    places = range(first, first + config.passages_per_step)
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
