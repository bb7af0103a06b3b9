"""Files -> articles -> passages -> the passages of a step.

    articles --drop headings, lists, references--> paragraphs --join up to a drawn length--> passages.jsonl
    passages.jsonl --hash of the article--> train | heldout --permutation of (seed, epoch)--> passages of a step

`config.data` is a hub name, a file or a folder (text/files.py); an article's prose is what text/paragraphs.py keeps. A
record with `labels`, a short name of its kind for each word, is taken whole; other labels are ignored.
Lengths: a passage draws a target, log-uniform between min_passage_tokens and max_passage_tokens, and takes paragraphs
until it is reached. A paragraph over the maximum is cut at the last sentence end that fits, again and again. Ours: the
paper says "Wikipedia" and lengths, no more.

Alone:  python data.py configs/tiny.yaml   builds the index in RUN_DIR/cache and shows the passages of step 0.
"""

import hashlib
import json
import math
import random
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from config import Config, one_line, parse_command_line
from text.files import RESERVED, DataError, Record, Tally, file_records, hub_records, local_files
from text.paragraphs import INVISIBLE, cut_at_sentences, group_paragraphs, paragraphs, token_counts

LABEL = re.compile(r"\w{1,20}", re.ASCII)
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell half of a pair, UTF-8 cannot write it


# ------------------------------------------------------------------------------------------------- articles to passages

INDEX_VERSION = 5  # raise it with any edit that changes passages, or an old index would be reused
BATCH_ARTICLES, BATCH_CHARS = 512, 4 << 20


@dataclass
class Passage:
    id: str  # unique in the corpus: "<article id>#<k>"
    title: str
    url: str
    text: str
    labels: list[str] | None = None  # one per white-space separated word, where the corpus has them
    answer: str = ""  # the gold answer, where the text is a question (rlvr)


@dataclass
class Article(Passage):
    """A usable record. `key` decides its side of the split: articles of one url (else title, else id) stay together."""

    where: str = ""  # "file:line", for messages
    key: str = ""


def read_articles(records: Iterable[Record], config: Config, tally: Tally) -> Iterator[Article]:
    """Usable articles. A record that repeats a text is dropped, or it might be trained on and held out; an id with
    another text gets the record's file and line added, since many corpora number the records of each file anew."""
    seen, ids = set(), set()
    for where, own_id, record in records:
        text, labels = record.get(config.text_field), record.get("labels")
        text = INVISIBLE.sub("", text) if isinstance(text, str) else text
        id_, title, url = (str(v) if isinstance(v := record.get(k), str | int) else "" for k in ("id", "title", "url"))
        named = "\0".join((id_, title, url, text if isinstance(text, str) else ""))
        digest = hashlib.sha256(str(text).encode("utf-8", "surrogatepass")).digest()[:16]
        if not isinstance(text, str):
            kind, fields = f" is a {type(text).__name__}" if config.text_field in record else "", list(record)[:8]
            tally.skip("no_text", where, f"text_field={config.text_field!r}{kind}, fields are {', '.join(fields)}")
        elif not text.strip():
            tally.skip("empty", where)
        elif SURROGATE.search(named):
            tally.skip("bad_utf8", where, "half of a surrogate pair")
        elif digest in seen:
            tally.skip("duplicate", where, id_)
        else:
            named = isinstance(labels, list) and all(isinstance(one, str) and LABEL.fullmatch(one) for one in labels)
            if labels is not None and not (named and len(labels) == len(text.split())):
                if not tally.counts["labels_ignored"]:
                    tally.log(one_line(f"data: {where}: labels are ignored, they are not one short name for each word"))
                tally.counts["labels_ignored"] += 1
                labels = None
            key = url or title or id_ or own_id
            id_ = id_ or own_id
            id_ = f"{id_} {own_id}" if id_ in ids else id_
            seen.add(digest)
            ids.add(id_)
            yield Article(id_, title, url, text, labels, where=where, key=key)


def reserved_marks(tokenizer) -> list[str]:
    """What no passage may hold: the prompts' own marks, and special tokens, which would be such in the prompt, too."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return sorted({*RESERVED, *tokenizer.all_special_tokens, *added})


def cut(articles: Iterable[Article], tokenizer, config: Config, tally: Tally) -> Iterator[tuple[Passage, Article]]:
    """Articles -> passages that fit, with the article each comes from; few tokenizer calls per batch of articles."""
    low, high = config.min_passage_tokens, config.max_passage_tokens

    def measured(texts: list[list[str]]) -> list[list[int]]:
        counts = iter(token_counts([text for some in texts for text in some], tokenizer, high))
        return [[next(counts) for _ in some] for some in texts]

    joint = token_counts(["\n\n"], tokenizer, high)[0]
    reserved = re.compile("|".join(map(re.escape, reserved_marks(tokenizer))))
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
                elif reserved.search(text):
                    tally.skip("reserved", article.where)
                else:
                    yield Passage(f"{article.id}#{number}", article.title, article.url, text, article.labels), article


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
        log(f"data: streaming {config.data} from the hub; the other ranks wait")
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
    return fingerprint_of(files, 8)


def fingerprint_of(files: list[Path], blocks: int) -> str:
    """A hash of files' sizes and of so many blocks of 1 MiB spread over each (all of a small one)."""
    whole = hashlib.sha256()
    for path in files:
        try:
            size = path.stat().st_size
            whole.update(size.to_bytes(8, "big"))
            with path.open("rb") as file:
                for place in range(blocks):
                    file.seek(max(0, size - (1 << 20)) * place // (blocks - 1))
                    whole.update(file.read(1 << 20))
        except OSError as error:  # who reads it says so
            whole.update(str(error).encode("utf-8", "surrogateescape"))
    return whole.hexdigest()


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
        several, last = train + heldout, max(1, round(config.heldout * found))
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

    Takes no seed: runs with different seeds hold out the same articles, and a larger share holds out a superset.
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
    from model import load_tokenizer

    config = parse_command_line("usage: python data.py CONFIG.yaml [key=value ...]")
    folder = Path(config.run_dir) / "cache"
    try:
        build_index(config, load_tokenizer(config), folder)
        corpus = load_corpus(folder, config)
    except (DataError, OSError, ValueError) as error:  # the last two from the tokenizer
        raise SystemExit(f"data error: {one_line(str(error))}") from None
    print(corpus.counts)
    for passage in step_passages(corpus, config, 0):
        print(f"\n--- {passage.id}  {passage.title}  {passage.url}\n{passage.text}")


if __name__ == "__main__":
    main()
