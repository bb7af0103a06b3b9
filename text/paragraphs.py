"""An article -> its paragraphs of prose -> pieces that fit a passage.

A text of one line is taken as it is. Else hard-wrapped blocks are joined and each line is a paragraph; it is kept when
it has MIN_PROSE_CHARS characters, ends like a sentence and is no list item; all from END_SECTION on goes. Thai, Lao and
Tibetan mark no end of a sentence: any line counts as ended and may be cut at a space.
"""

import re
from collections.abc import Callable
from itertools import pairwise

import regex

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
CHARS_PER_TOKEN = 32  # a paragraph with more than this on average is too long without asking the tokenizer


def paragraphs(text: str) -> tuple[list[str], int]:
    """Prose paragraphs of an article, white space folded, and the number of lines dropped. Rules: see above.

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
            line = line.strip()
            if not listed and _long_enough(line) and SENTENCE_END.search(line) and not LIST_MARK.match(line):
                kept.append(" ".join(line.split()))
                used += 1
    return kept, sum(1 for line in text.split("\n") if line.strip()) - used


def _long_enough(line: str) -> bool:
    return len(line) >= MIN_PROSE_CHARS or len(line) + 2 * len(WIDE.findall(line)) >= MIN_PROSE_CHARS


def _is_hard_wrapped(lines: list[str]) -> bool:
    """Most line ends fall inside a sentence: the next line starts in lower case, or a long line ends without a stop."""
    if len(lines) < 2 or any(line[0].isspace() or LIST_MARK.match(line) for line in lines[1:]):
        return False
    inside = sum(
        after[0].islower() or (_long_enough(line) and not SENTENCE_END.search(line) and line[-1] != ":")
        for line, after in pairwise(lines)
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
    cut = []
    for text in texts:
        ends = [0, *(match.end() for match in SENTENCE_BREAK.finditer(text)), len(text)]
        sentences = [text[start:end] for start, end in pairwise(ends) if start < end]
        pieces, filled = [], 0
        for sentence, size in zip(sentences, token_counts(sentences, tokenizer, longest), strict=True):
            if pieces and filled + size <= longest:
                pieces[-1] += sentence
                filled += size
            else:
                pieces.append(sentence)
                filled = size
        cut.append([piece.strip() for piece in pieces])
    return cut


def token_counts(texts: list[str], tokenizer, longest: int) -> list[int]:
    """Tokens of each text, special ones not counted; over CHARS_PER_TOKEN * longest characters it is longest + 1."""
    counts = [longest + 1] * len(texts)
    short = [i for i, text in enumerate(texts) if len(text) <= CHARS_PER_TOKEN * longest]
    if short:  # a tokenizer refuses an empty list
        batch = [texts[i] for i in short]
        ids = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for i, row in zip(short, ids, strict=True):
            counts[i] = len(row)
    return counts
