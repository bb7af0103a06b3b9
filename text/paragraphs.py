"""An article -> its paragraphs of prose -> pieces that fit a passage.

A text of one line is taken as it is. Else hard-wrapped blocks are joined and each line is a paragraph; it is kept when
it has MIN_PROSE_CHARS characters, ends like a sentence, does not go on with one of the line before and is no list item;
fenced code and all from END_SECTION on goes. Thai, Lao and Tibetan mark no end of a sentence: any line counts as
ended and may be cut at a space.
"""

import re
from collections.abc import Callable
from itertools import pairwise

import regex

MIN_PROSE_CHARS = 40  # letters; a character of WIDE says as much as three
SCRIPTS = r"\p{scx=Han}\p{scx=Hira}\p{scx=Kana}\p{scx=Bopo}\p{scx=Thai}\p{scx=Laoo}\p{scx=Khmr}\p{scx=Mymr}\p{scx=Tibt}"
UNSPACED = rf"[[[{SCRIPTS}]&&[\p{{L}}\p{{M}}]]--[\0-\u036f]]"
"""A letter of a script that puts no space between words. For `regex`, in version 1 of its syntax (?V1)."""
WIDE = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}]")
UNMARKED = r"[[\p{Thai}\p{Lao}\p{Tibetan}]--[་༌]]"  # scripts whose sentences end without a mark
CLOSERS = r"""(?:["'*_\p{Pe}\p{Pf}\p{Cf}]|\[[^\s\[\]]{1,9}\])*"""  # quotes, brackets, marks of footnotes
LAST_CLOSERS = rf"{CLOSERS}[“‘]?\p{{Cf}}*"  # at an end, German quotes too
STOP = r"(?:[[\p{Sentence_Terminal}…]--[.၊]]|፡፡|(?<=\p{Greek})[;;]|(?<=\p{Devanagari}\s?)\|)"
UNMARKED_END = regex.compile(rf"(?V1){UNMARKED}\P{{L}}*(?:[A-Za-z]+\P{{L}}*)?$")
SENTENCE_END = regex.compile(rf"(?V1)(?:\.|{STOP}){LAST_CLOSERS}$|{UNMARKED_END.pattern[5:]}")
ABBREVIATION = (
    r"\p{L}|\p{L}\.\p{L}|[A-Z][a-z]{1,2}|[\p{Cyrillic}\p{Greek}]{2,3}|Prof|Capt|Dept|Sept|Univ|Lieut|Messrs|etc|vs|cf|ca"
    r"|no|vol|pp|al|eds?|figs?|approx|bzw"
)
ORDINAL = r"(?<=\d\.)\s+(?:Jan|Feb|Mär|Apr|Mai|Jun|Jul|Aug|Sep|Okt|Nov|Dez|Jahrh|Jh)"  # "am 12. März"
SENTENCE_BREAK = regex.compile(  # where a paragraph may be cut; a full stop after "Mr", an initial or "12" is no end
    rf"(?V1)(?:(?<!\b(?:{ABBREVIATION})|{UNMARKED})\.(?!{ORDINAL})|\.(?=[”“»])|{STOP}){LAST_CLOSERS}\s+(?!\p{{Ll}})"
    rf"|(?:[\p{{Sentence_Terminal}}--[.!?၊．]]|．(?!\p{{N}})){CLOSERS}(?![\s\p{{P}}\p{{M}}]|$)"
    rf"|(?<={UNMARKED})\s+(?={UNMARKED})"
)
BESIDE = rf"[{UNSPACED}\u3001-\u303f\uff01-\uff60]"
WRAP_WITHOUT_SPACE = regex.compile(rf"(?V1)(?<={BESIDE}[\p{{P}}\p{{N}}]{{,9}})\n(?=[\p{{P}}\p{{N}}]{{,9}}{BESIDE})")
INVISIBLE = regex.compile(  # and joiners that join nothing
    r"[\u00ad\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff]"
    r"|(?<![\p{L}\p{M}\p{S}])[\u200c\u200d]+|[\u200c\u200d]+(?![\p{L}\p{M}\p{S}])"
)
INDENT = r"(?:\u3000|\t| {2,})"  # of a paragraph; the hub's Wikipedia indents list items by one space
BLOCK_END = re.compile(rf"\n\s*\n|\n(?=\u3000|{INDENT}\s*\S.*\n\S)")
LIST_MARK = re.compile(r"\*+(?!\S[^*\n]*\*)|[•·|;:]|\{\||[-–—!#]+\s|\(?\d{1,3}[.)]\s")
FENCED = re.compile(r"^[ \t]*(```|~~~).*?^[ \t]*\1", re.MULTILINE | re.DOTALL)
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
    text = "\n".join(text.splitlines()).rstrip()  # also U+2028, U+0085 and a carriage return
    if "\n" not in text.strip():
        return [text.strip()], 0
    kept, used, ended = [], 0, True
    end = END_SECTION.search(text)
    for block in BLOCK_END.split(FENCED.sub("", text[: end.start()] if end else text)):
        block = re.sub(rf"(?m)^{INDENT}\s*", "", block) if re.match(INDENT, block) else block
        lines = [line.rstrip() for line in block.split("\n") if line.strip()]
        count = len(lines)
        if _is_hard_wrapped(lines):
            lines = [" ".join(WRAP_WITHOUT_SPACE.sub("", "\n".join(lines)).split("\n"))]
        for line in lines:
            listed = len(lines) > 1 and line[0].isspace()
            line = line.strip()
            goes_on = not ended and line[0].islower()
            ended = SENTENCE_END.search(line) is not None
            if ended and not listed and not goes_on and _long_enough(line) and not LIST_MARK.match(line):
                kept.append(" ".join(line.split()))
                used += count if len(lines) == 1 else 1
    return kept, sum(1 for line in text.split("\n") if line.strip()) - used


def _long_enough(line: str) -> bool:
    return len(line) >= MIN_PROSE_CHARS or len(line) + 2 * len(WIDE.findall(line)) >= MIN_PROSE_CHARS


def _is_hard_wrapped(lines: list[str]) -> bool:
    """Most line ends fall inside a sentence: the next line starts in lower case, or a long line ends without a stop."""
    if len(lines) < 2 or any(line[0].isspace() or LIST_MARK.match(line) for line in lines[1:]):
        return False
    longest = max(map(len, lines))  # wrapped lines of Thai have about one length, of no more than 120
    inside = sum(
        after[0].islower() or (line[-1] != ":" and _long_enough(line) and not SENTENCE_END.search(line))
        or (0.7 * longest <= len(line) and longest <= 120 and UNMARKED_END.search(line) is not None)
        for line, after in pairwise(lines)
    )  # fmt: skip
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
