r"""Answers that are no maths: the letter of an option, a text by BBEH's matching rules; and the last number of a text.

Every function but last_number gets what stands in the box (prompts.last_answer). Needs no torch.
"""

from __future__ import annotations

import hashlib
import re

from rewards import normalise, undo_latex

PLAIN_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?")
NUMBER_IN_TEXT = re.compile(r"(?:(?<![\w)}\]])[-−])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:/\d+|\.\d+)?|\.\d+)")
ANSWER_PHRASE = re.compile(r"The (?:final )?answer is[: ]\s*")
LETTER = re.compile(
    r"(?i:(?:the )?(?:correct |right |final )?(?:answer|option|choice)(?: is)?:? ?)*"
    r"[(\[【]? ?([A-Za-z])"
    r"(?: ?[)\].:、;】]+ ?|,? *[—–]+ *| +- *| *(?=\(.*\)$)| is (?=(?:the )?(?:correct|right|answer))|$)(.*)"
)
# in the words behind the letter: an alternative at once, a letter alone, or another letter set off as the first is
ANOTHER = (
    r"(?i:and|or|&|,|/)(?!\w)|[(\[]?[{0}][)\].:]*$"
    r"|(?:.*(?:[,;/&]|\b(?:and|or)) ?)?[(\[]?[{0}][)\].:](?!\w)|.* [(\[]?[{0}][)\]]"
)


def option_letter(box: str, letters: str) -> str | None:
    r"""The one option that a box names, as a capital of `letters`; None if it names none, several, or one beyond them.

    Words may follow the letter behind a bracket, a stop, a colon or a dash, and may name other options: "E. A and B
    only" is E. Not read: words without a letter; "A dog", whose A may be the article; "A. 3, B. 4".

    >>> [option_letter(box, "ABCD") for box in ("C", r"\textbf{(c)}", "C. nitrogen", "Answer: C.", "$C$")]
    ['C', 'C', 'C', 'C', 'C']
    >>> [option_letter(box, "ABCD") for box in ("nitrogen", "A dog", "A, C", "A) and B)", "AC", "E", "")]
    [None, None, None, None, None, None, None]
    """
    box = re.sub(r"\n(?=[(\[]?[A-Z][)\].:])", ", ", re.sub(r"\\(?:left|right)(?![a-z])", "", box))
    text = normalise(box).replace("**", "").replace("__", "").strip("$*{} ")
    found = LETTER.fullmatch(text)
    letter = found[1].upper() if found else ""
    return None if not letter or letter not in letters or re.match(ANOTHER.format(letters), found[2]) else letter


def guessed_letter(id_: str, letters: str) -> str:
    """A letter drawn from a hash of the item's id: the same in every run, and about even over the options.

    >>> guessed_letter("item 7", "ABCD")
    'B'
    """
    return letters[int(hashlib.sha256(f"guess {id_}".encode()).hexdigest(), 16) % len(letters)]


def fuzzy_match(answer: str, target: str) -> bool:
    r"""BBEH's published rules (google-deepmind/bbeh, evaluate.py), in our words, applied to what stands in the box.

    Only the answer's first line counts, without case, bold marks, a final full stop and the space after a comma. It
    equals the target as text, as a number, without apostrophes, or but for square brackets around one of them, round
    brackets around a single character, or a question mark at the answer's end.

    Differences: the answer comes from the box, not from behind "The answer is:" (cut off inside the box); LaTeX text
    wrappers and white space inside $ or ** go wherever they stand; numbers are decimal, without Python's inf, nan and
    1_000; an answer with nothing left is wrong, where theirs equals [].

    >>> fuzzy_match("(A)", "a"), fuzzy_match(r"\text{Yes, no}.", "yes,no"), fuzzy_match("17", "17.0")
    (True, True, True)
    >>> fuzzy_match("friday", "[friday]"), fuzzy_match("(A) Sam", "(A)"), fuzzy_match("1,000", "1000")
    (True, False, False)
    """
    answer = ANSWER_PHRASE.split(answer.strip())[-1].strip().removesuffix(".")
    if len(answer) > 1 and answer[0] == answer[-1] == "$":
        answer = answer[1:-1]
    answer = _plain(undo_latex(answer).strip()).replace("**", "").split("\n")[0].removesuffix(".").strip()
    target = _plain(target.strip())
    if not answer:
        return False
    if answer == target:
        return True
    for bracketed, other in ((answer, target), (target, answer)):
        if len(bracketed) == 3 and bracketed[0] == "(" and bracketed[2] == ")":
            return bracketed[1] == other
    if PLAIN_NUMBER.fullmatch(answer) and PLAIN_NUMBER.fullmatch(target) and float(answer) == float(target):
        return True
    same = answer.replace("'", "") == target.replace("'", "")
    return same or answer in (f"[{target}]", f"{target}?") or target == f"[{answer}]"


def _plain(text: str) -> str:
    return text.lower().replace(", ", ",")


def last_number(text: str) -> str | None:
    """The last number of a text, without the commas of its thousands: integer, decimal or fraction.

    >>> last_number("So 3 boxes cost $1,234.50."), last_number("It is 10-7 = 3/4"), last_number("None.")
    ('1234.50', '3/4', None)
    """
    found = NUMBER_IN_TEXT.findall(text)
    return found[-1].replace(",", "").replace("−", "-") if found else None
