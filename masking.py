r"""Masks: words of a passage in, the passage with [mask] and the target out.

The generator chooses words, not positions; the rules here decide whether they make a task. Spans and labelled words
drawn by rule serve the probe, random_masks and the methods without a generator. Leaves out prompts and their length
(the caller's), and rewards.

Run alone: `python -m doctest -v masking.py`
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import regex

from config import Config
from rewards import answerable, undo_latex, unquote
from text.paragraphs import INVISIBLE, SENTENCE_END, UNSPACED

if TYPE_CHECKING:
    from data import Passage
MASK = "[mask]"
WORD_KINDS = ("number", "name", "content", "function")
"""Of words, where the corpus does not label them."""
GEOMETRIC, LONGEST, TRIES = 0.2, 10, 100
INNER = regex.compile(r"(?s)[^\s\x1c-\x1f\p{P}\p{Cf}](?:.*[^\s\x1c-\x1f\p{P}\p{Cf}])?")
HAS_UNSPACED = regex.compile(rf"(?V1){UNSPACED}")
SYMBOLS = rf"(?:(?![{UNSPACED}\p{{L}}\p{{N}}\p{{M}}])\X)*"  # and punctuation: both stay with the letter before them
UNSPACED_WORD = regex.compile(rf"(?V1){SYMBOLS}(?={UNSPACED})\X{SYMBOLS}|(?:(?!{UNSPACED})\X)+")
# A border of words: not between two letters or digits of a script with spaces, nor at a joiner or soft hyphen there.
PART, JOINER = r"[[\w\p{N}\p{M}]--[\u200c\u200d]]", r"[\u00ad\u200c\u200d]?"
WORD_START = rf"(?:(?<!{PART}{JOINER})|(?<={UNSPACED})|(?={UNSPACED}))"
WORD_END = rf"(?:(?!{JOINER}{PART})|(?={UNSPACED})|(?<={UNSPACED}))"


@dataclass
class Mask:
    """One task for the predictor, or the reason why there is none. Offsets are in characters of the passage."""

    words: str
    """The span as the generator wrote it, outer white space stripped."""
    invalid: str = ""
    """Why it cannot be used: no_answer, empty, not_answerable, function_words, too_many_words, too_long,
    not_in_passage, too_many_occurrences, and prompt_too_long, which the caller sets. Empty: valid."""
    masked: str = ""
    """The passage with [mask]; empty if invalid, as are the following."""
    target: str = ""
    """What the predictor must recover: the passage's own text of the span."""
    occurrences: int = 0
    """How often the words occur in the passage by the mask rule, replaced or not; known for too many, too."""
    start: int = -1
    """Where the first replaced occurrence starts."""
    label: str = ""
    """Kind of the words that were replaced (label_of)."""
    prefixes: tuple[str, ...] = ()
    """Of a next-token mask: the hidden text up to each token border, what `reward: prefix` accepts."""


def make_mask(words: str | None, passage: Passage, config: Config, rng: random.Random) -> Mask:
    r"""Applies the config's mask rule to the words that the generator chose; None if it chose none.

    The words must occur in the passage 1 to `max_occurrences` times, exactly as written, except that any white space
    matches any (a line break in the passage does not void a mask), and LaTeX, quotes and stars are undone if need be.
    Accents and vowel signs stay with their letter. Overlaps count once. `main` replaces every occurrence, parts of
    words included; `one_mask` one at random; `words` whole words only; `one_mask_words` both.
    Source: PretrainZero (arXiv 2512.03442), mask rule and its variants; caps on the length are ours.

    >>> from types import SimpleNamespace
    >>> passage = SimpleNamespace(text="The art of Bonn starts in art schools.", labels=None)
    >>> make_mask("art", passage, Config(), random.Random(0)).masked
    'The [mask] of Bonn st[mask]s in [mask] schools.'
    >>> make_mask("art", passage, Config(mask_rule="words"), random.Random(0)).masked
    'The [mask] of Bonn starts in [mask] schools.'
    >>> make_mask("art", passage, Config(mask_rule="one_mask"), random.Random(0)).masked
    'The art of Bonn st[mask]s in art schools.'
    >>> make_mask("Cologne", passage, Config(), random.Random(0)).invalid
    'not_in_passage'
    """
    if words is None:
        return Mask("", invalid="no_answer")
    words = strip_hidden(words)
    if fault := _fault(words, config):
        return Mask(words, invalid=fault)
    spans = _occurrences(words, passage.text, config.mask_rule)
    if not spans:  # as written; perhaps without the marks of LaTeX and markdown
        plain = strip_hidden(unquote(strip_hidden(undo_latex(words))))
        if plain != words and not _fault(plain, config):
            words, spans = plain, _occurrences(plain, passage.text, config.mask_rule)
    if not spans:
        return Mask(words, invalid="not_in_passage")
    if len(spans) > config.max_occurrences:
        return Mask(words, invalid="too_many_occurrences", occurrences=len(spans))
    replaced = [rng.choice(spans)] if config.mask_rule.startswith("one_mask") else spans
    return _replace(words, passage, replaced, len(spans), config)


def random_span(passage: Passage, config: Config, rng: random.Random) -> Mask:
    """A span drawn by SpanBERT's law and masked by the config's rule; drawn anew until valid.

    Length in words from Geo(0.2), redrawn above 10 (mean 3.8), start uniform over the places where it fits. The
    caps on length and occurrences, where they bind, tilt this law. Returns an invalid Mask if 100 draws give none.
    Source: SpanBERT (arXiv 1907.10529), as in PretrainZero's Random RLPT. SpanBERT "clips" at 10;
    its mean of 3.8 says that it redraws.
    """
    words = word_spans(passage.text)
    mask = Mask("", invalid="empty")
    for _ in range(TRIES):
        # Geo(p) redrawn above 10 has these weights, up to a factor
        length = rng.choices(range(1, LONGEST + 1), [(1 - GEOMETRIC) ** k for k in range(LONGEST)])[0]
        if length > len(words):
            continue
        first = rng.randrange(len(words) - length + 1)
        start, end = _trim(passage.text, words[first][0], words[first + length - 1][1])
        mask = make_mask(passage.text[start:end], passage, config, rng)
        if not mask.invalid:
            break
    return mask


def mask_at(passage: Passage, start: int, end: int, config: Config) -> Mask:
    """The mask of passage.text[start:end] at this one place, whatever the rule says of its other occurrences.

    They stay visible and are counted but not capped; the caps on length and the need of a letter or digit hold.

    >>> from types import SimpleNamespace
    >>> mask = mask_at(SimpleNamespace(text="red or red", labels=["copy", "template", "copy"]), 7, 10, Config())
    >>> mask.masked, mask.target, mask.occurrences, mask.start, mask.label
    ('red or [mask]', 'red', 2, 7, 'copy')
    """
    assert 0 <= start <= end <= len(passage.text), f"span {start}:{end} is outside of the passage"
    words = strip_hidden(passage.text[start:end])
    if fault := _fault(words, config):
        return Mask(words, invalid=fault)
    start = passage.text.index(words, start)
    occurrences = len(_occurrences(words, passage.text, config.mask_rule))
    return _replace(words, passage, [(start, start + len(words))], occurrences, config)


def labelled_mask(passage: Passage, label: str, config: Config, rng: random.Random) -> Mask | None:
    """mask_at for a random word of this label, without its outer punctuation; None where none can be masked."""
    if not passage.labels:
        return None
    words = zip(_space_spans(passage.text), passage.labels, strict=True)
    spans = [_trim(passage.text, *span) for span, word_label in words if word_label == label]
    spans = [(start, end) for start, end in spans if not _fault(passage.text[start:end], config)]
    return mask_at(passage, *rng.choice(spans), config) if spans else None


def _fault(words: str, config: Config) -> str:
    """Why these words cannot be a mask in any passage; "" if they can."""
    if not words:
        return "empty"
    if not answerable(words):
        return "not_answerable"
    if config.mask_content and set(words.lower().split()) <= set(config.function_words.split()):
        return "function_words"
    if config.max_span_words and len(word_spans(words)) > config.max_span_words:
        return "too_many_words"
    if config.max_span_chars and len(words) > config.max_span_chars:
        return "too_long"
    return ""


def _occurrences(words: str, text: str, mask_rule: str) -> list[tuple[int, int]]:
    """(start, end) of the words in the text, from left to right, without overlaps. Invisible characters match nothing
    and anything; a letter keeps its accents and vowel signs, an emoji its parts."""
    hidden = "" if text.isascii() else r"\p{Cf}*"
    words = words if words.isascii() else "".join(char for char in words if unicodedata.category(char) != "Cf")
    pattern = rf"{hidden}\s+{hidden}".join(hidden.join(map(re.escape, word)) for word in words.split())
    if mask_rule.endswith("words"):
        pattern = rf"(?V1){WORD_START}{pattern}{WORD_END}"
    spans = [match.span() for match in regex.finditer(pattern, text)]
    if not spans or text.isascii():
        return spans
    visible = INVISIBLE.sub(lambda found: " " * len(found[0]), text)
    borders = {len(text), *(letter.start() for letter in regex.finditer(r"\X", visible))}
    return [span for span in spans if borders.issuperset(span)]


def strip_hidden(text: str) -> str:
    """Without outer white space and invisible characters."""
    return text.strip("".join({char for char in text if char.isspace() or unicodedata.category(char) == "Cf"}))


def _replace(words: str, passage: Passage, spans: list[tuple[int, int]], occurrences: int, config: Config) -> Mask:
    """The valid Mask with these spans, in order and without overlaps, replaced."""
    parts, position = [], 0
    for start, end in spans:
        parts += [passage.text[position:start], MASK]
        position = end
    masked = "".join(parts) + passage.text[position:]
    start, end = spans[0]
    return Mask(words, "", masked, passage.text[start:end], occurrences, start, label_of(passage, spans, config))


def label_of(passage: Passage, spans: list[tuple[int, int]], config: Config) -> str:
    """The label of the words that the spans touch: the passage's own, or their kind by form; of several, the first in
    config.labels (or WORD_KINDS)."""
    places, touched, before = _space_spans(passage.text), set(), "."
    for (first, last), label in zip(places, passage.labels or [""] * len(places), strict=True):
        word = passage.text[first:last]
        if any(start < last and first < end for start, end in spans):
            touched.add(label or kind_of_word(word, before, config))
        before = word
    return min(touched, key=rank_of(config))


def rank_of(config: Config) -> Callable[[str], tuple]:
    """Sorts labels: those that config.labels names, in its order, then others by the alphabet."""
    order = config.labels.split() or WORD_KINDS
    return lambda label: (order.index(label) if label in order else len(order), label)


def kind_of_word(word: str, before: str, config: Config) -> str:
    """One of WORD_KINDS, by form: a digit makes a number, config.function_words are known, a capital letter makes a
    name unless the word before it ends a sentence.

    >>> [kind_of_word(word, before, Config()) for word, before in (("Bonn,", "in"), ("Bonn", "old."), ("1810", "in"))]
    ['name', 'content', 'number']
    """
    word = word[slice(*_trim(word, 0, len(word)))]
    if any(char.isdigit() for char in word):
        return "number"
    if word.lower() in config.function_words.split():
        return "function"
    return "name" if word[:1].isupper() and not SENTENCE_END.search(before) else "content"


def word_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of the words: what stands between white space, and in scripts without spaces (Chinese, Japanese,
    Thai, Lao, Khmer, Burmese, Tibetan) each character with its marks and the punctuation behind it.

    >>> text = "in 北京，1949年 and"
    >>> [text[start:end] for start, end in word_spans(text)]
    ['in', '北', '京，', '1949', '年', 'and']
    """
    spans = _space_spans(text)
    if not HAS_UNSPACED.search(text):
        return spans
    found = (UNSPACED_WORD.finditer(text, start, end) for start, end in spans)
    return [match.span() for matches in found for match in matches]


def _space_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of the white-space separated words, which are what labels count."""
    return [match.span() for match in re.finditer(r"\S+", text)]


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    """The span without outer punctuation: a bracket or a comma is no word and could not be guessed."""
    inner = INNER.search(text, start, end)
    return inner.span() if inner else (end, end)
