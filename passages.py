"""Articles -> passages: which lines are prose, and how paragraphs become texts of a drawn length.

The paper says "Wikipedia" and lengths, no more, so the following is ours.
Prose: a text of one line is taken as it is. In a longer one, blocks end at blank lines; hard-wrapped blocks are joined
again; then each line is a paragraph. It is kept when it has MIN_PROSE_CHARS characters, ends like a sentence and is no
list item (a mark in front, or indented); everything from a heading of END_SECTION on is dropped. A record with `labels`
(one per word) is taken whole and untouched.
Lengths: each passage draws a target, log-uniform between min_passage_tokens and max_passage_tokens, and takes
paragraphs until it is reached, never exceeding the maximum. A paragraph longer than the maximum is skipped, not cut.
Leaves out where articles come from (sources.py) and the index of passages (data.py).
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from config import Config
from sources import RESERVED, Article, Skip

INDEX_VERSION = 2  # raise it with any edit that changes passages, or an old index would be reused
MIN_PROSE_CHARS = 40
SENTENCE_END = re.compile(r"""[.!?…。！？।۔։።؟]["'”’»›)\]」』]*$""")
LIST_MARK = re.compile(r"[*•·|;:]|\{\||[-–—!#]+\s|\(?\d{1,3}[.)]\s")
END_SECTION = re.compile(
    r"^[=#: \t]*(references|external links|see also|further reading|notes|footnotes|citations|sources|bibliography"
    r"|notes and references|references and notes|notes and citations|works cited)[=#: \t]*$",
    re.IGNORECASE | re.MULTILINE,
)
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


def cut(
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
