"""Passages: Wikipedia (or any text) -> an index of passages on disk -> the passages of each step.

    articles --drop headings, lists, references--> paragraphs --join up to a drawn length--> passages.jsonl
    passages.jsonl --hash of the article--> train | heldout --permutation of (seed, epoch)--> passages of a step

`config.data` is a hub name, or a local parquet, jsonl, json (a record per line), txt file (the last three also .gz), or
a folder of them; sources.py reads them. One process builds the index; every process loads it. A record that cannot be
used is counted under a cause of CAUSES, never dropped in silence; an index is reused while what it was made from stays
the same.

The paper says "Wikipedia" and lengths, no more, so the following is ours.
Prose: a text of one line is taken as it is. In a longer one, blocks end at blank lines; hard-wrapped blocks are joined
again; then each line is a paragraph. It is kept when it has MIN_PROSE_CHARS characters, ends like a sentence and is no
list item (a mark in front, or indented); everything from a heading of END_SECTION on is dropped. A record with `labels`
(one per word) is taken whole and untouched.
Lengths: each passage draws a target, log-uniform between min_passage_tokens and max_passage_tokens, and takes
paragraphs until it is reached, never exceeding the maximum. A paragraph longer than the maximum is skipped, not cut.
Order: hub shards and local files come in seeded order, so do the row groups of a parquet file and the rows in them (a
thousand at a time); lines of a jsonl or txt file come as they stand. An index capped by max_passages is thus a seeded
sample of files and row groups, but only the first part of one big jsonl: shuffle such a file beforehand.
Left out: near-duplicates, language and quality filters; languages that end sentences without punctuation (Thai).

Alone:  python data.py configs/tiny.yaml   builds the index in RUN_DIR/cache and shows the passages of step 0.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from config import Config, parse_command_line
from sources import CAUSES, RESERVED, Article, DataError, Skip, hub_records, local_files, local_records, read_articles
from words import one_line

INDEX_VERSION = 1  # raise it with any edit that changes passages, or an old index would be reused
MIN_PROSE_CHARS = 40
SENTENCE_END = re.compile(r"""[.!?…。！？।۔։።؟]["'”’»›)\]」』]*$""")
LIST_MARK = re.compile(r"[*•·|;:]|\{\||[-–—!#]+\s|\(?\d{1,3}[.)]\s")
END_SECTION = re.compile(
    r"^[=#: \t]*(references|external links|see also|further reading|notes|footnotes|citations|sources|bibliography"
    r"|notes and references|references and notes|notes and citations|works cited)[=#: \t]*$",
    re.IGNORECASE | re.MULTILINE,
)
QUIET = ("no_prose", "too_short", "too_long", "reserved")  # normal; the others are logged with file and line
BATCH_ARTICLES, BATCH_CHARS = 512, 4 << 20
CHARS_PER_TOKEN = 32  # a paragraph with more than this on average is too long without asking the tokenizer


@dataclass
class Passage:
    id: str  # "<article id>#<k>", unique in the corpus
    title: str
    url: str
    text: str
    labels: list[str] | None = None  # one per white-space separated word, where the corpus has them
    answer: str = ""  # the gold answer, where the text is a question (rlvr)


@dataclass
class Corpus:
    train: list[Passage]
    heldout: list[Passage]
    counts: dict[str, int]  # articles, passages, train, heldout, dropped_lines, and each cause that occurred


# ---------------------------------------------------------------------------------------------- what a run uses


def build_index(config: Config, tokenizer, folder: Path, log: Callable[[str], None] = print) -> None:
    """Reads config.data and writes folder/passages.jsonl and folder/index.json (key, counts). For ONE process.

    Does nothing when the index is there and was made from the same config keys, tokenizer size and files (path, size,
    time). Both files are written beside and renamed, so a crash leaves no half index. Raises DataError when the source
    cannot be read or yields no passage.
    """
    folder, start = Path(folder), time.time()
    passages_file, index_file = folder / "passages.jsonl", folder / "index.json"
    files = local_files(config, log)
    key = _index_key(config, tokenizer, files)
    if index_file.is_file() and passages_file.is_file() and _read_index(index_file).get("key") == key:
        log(f"data: index in {folder} is reused")
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
        for passage, article in _cut(read_articles(records, config, skip), tokenizer, config, counts, skip):
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


def _index_key(config: Config, tokenizer, files: list[Path] | None) -> str:
    names = "data data_config text_field seed max_passages min_passage_tokens max_passage_tokens".split()
    made_from = [INDEX_VERSION, len(tokenizer), [getattr(config, name) for name in names]]
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


# ---------------------------------------------------------------------------------------------- articles -> passages


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
            lines = [" ".join(lines)]
        for line in lines:
            listed = len(lines) > 1 and line[0].isspace()  # the hub's Wikipedia indents list items
            if not listed and _is_prose(line.strip()):
                kept.append(" ".join(line.split()))
                used += 1
    return kept, sum(1 for line in text.split("\n") if line.strip()) - used


def _is_prose(line: str) -> bool:
    return len(line) >= MIN_PROSE_CHARS and bool(SENTENCE_END.search(line)) and not LIST_MARK.match(line)


def _is_hard_wrapped(lines: list[str]) -> bool:
    """Most line ends fall inside a sentence: the next line starts in lower case, or a long line ends without a stop."""
    if len(lines) < 2 or any(line[0].isspace() or LIST_MARK.match(line) for line in lines[1:]):
        return False
    inside = sum(
        after[0].islower() or (len(line) >= MIN_PROSE_CHARS and not SENTENCE_END.search(line) and line[-1] != ":")
        for line, after in zip(lines, lines[1:], strict=False)
    )
    return 2 * inside >= len(lines) - 1


def group_paragraphs(lengths: list[int], joint: int, longest: int, draw_target: Callable[[], float]) -> list[list[int]]:
    """Consecutive paragraphs -> groups of their numbers, one group a passage. lengths, joint, longest in tokens.

    A group is closed when it reaches its target or when the next paragraph would take it over `longest`; `joint` is
    the length of the blank line between two. Lengths 50, 60, 90, 30 with joint 1, longest 120 and targets of 100:
    [[0, 1], [2], [3]], where 50 + 1 + 60 reaches 100, and 90 + 1 + 30 would exceed 120.
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


def _cut(
    articles: Iterable[Article], tokenizer, config: Config, counts: Counter, skip: Skip
) -> Iterator[tuple[Passage, Article]]:
    """Articles -> passages that fit, with the article each comes from; two tokenizer calls per batch of articles."""
    low, high = config.min_passage_tokens, config.max_passage_tokens
    joint = _token_counts(["\n\n"], tokenizer, high)[0]
    reserved = (*RESERVED, *tokenizer.all_special_tokens)  # a special token in a text would become one in the prompt
    for batch in _batches(articles):
        parts = [([a.text], 0) if a.labels is not None else paragraphs(a.text) for a in batch]
        lengths = iter(_token_counts([text for kept, _ in parts for text in kept], tokenizer, high))
        pieces = []  # per article: (text, tokens), the latter None where it is to be counted
        for article, (kept, _) in zip(batch, parts, strict=True):
            sizes = [next(lengths) for _ in kept]
            # a generator of its own, so that an article's passages do not depend on what was read before it
            generator = random.Random(f"{config.seed} {article.id}")
            groups = group_paragraphs(
                sizes, joint, high, lambda g=generator: math.exp(g.uniform(math.log(low), math.log(high)))
            )
            pieces.append([("\n\n".join(kept[i] for i in g), sizes[g[0]] if len(g) == 1 else None) for g in groups])
        # tokens of joined paragraphs need not add up: count the joined text
        joined = iter(_token_counts([t for some in pieces for t, size in some if size is None], tokenizer, high))
        for article, (kept, dropped), some in zip(batch, parts, pieces, strict=True):
            counts["articles"] += 1
            counts["dropped_lines"] += dropped
            if not kept:
                skip("no_prose", article.where)
            for number, (text, size) in enumerate(some):
                size = next(joined) if size is None else size
                if size < low or size > high:
                    skip("too_short" if size < low else "too_long", article.where)
                elif any(mark in text for mark in reserved):
                    skip("reserved", article.where)
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
