"""Whatever a model writes: properties of parsers, rewards and masks on generated input.

The default suite runs a seeded share; the marked tests (`-m faults`) run the same functions on all of it: 120,000
strings. Broken files are in test_fuzz_files.py.
"""

import random
import re
import time
from types import SimpleNamespace

import pytest

from config import Config
from text.paragraphs import paragraphs
from masking import MASK, make_mask, mask_at, random_span
from prompts import BOXED_OPENING, CLOSED, MASK_OPENING, START, fill, last_answer, scan
from relatives.next_token import next_token_mask
from relatives.rlp import THINK_CLOSE
from relatives.rlvr import extract_gold, gold_answer, question_text, strip_instruction
from rewards import FINAL_STOPS, QUOTES, answerable, caseless_match, exact_match, normalise, prefix_match


def share_and_all(share: int, everything: int):
    """Two runs of a test: a share in the default suite, everything under the mark `faults`."""
    return pytest.mark.parametrize("count", [share, pytest.param(everything, marks=pytest.mark.faults)])


# ------------------------------------------------------------------------------------------- what a model may write
PIECES = (
    [r"\boxed{", r"\mask{", r"\bo", "boxed{", r"\boxed", r"\\boxed{", "{", "}", "\\", r"\\", r"\{", r"\}"]
    + ["{}", r"\text{", r"\mathbf {", r"\text", r"\frac{1}{2}", r"\%", r"\,", "\\ ", "~", "$", "####", "1,024"]
    + ["</think>", "</", *"abZ059.,;:?-–\"'`“”«»’。、()[]", " ", "  ", "\n", "\r\n", "\t", "\v", "\x1f"]
    + ["\x85", "\u2028", "\u3000", "\0", "\x7f", "\ufeff", "\ufffe", "\ud800", "\udc00"]
    + ["\U0001f468\u200d\U0001f469", "\U0010ffff", "é", "e\u0301", "\u0301\u0323", "\u0345", "ﬁ", "Ａ", "½"]
    + ["ﷺ", "İ", "ß", "ǅ", "北", "か\u3099", "각", "\u1100\u1161", "א", "שלום", "ا", "لا", "\u202e", "\u200f"]
    + ["\u2067", "٣", "๓", "[mask]", "{passage}", "{answer}"]
)  # fmt: skip
ANSWER = [r"\boxed{", r"\mask{", "a", "}", "}"]


def texts(count: int, seed: int):
    """(rng, text): mostly short, one in a hundred with a long run; a third begins or ends in the middle of a piece."""
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        some = rng.sample(PIECES, rng.randrange(1, 9)) + rng.choice([[], ANSWER, ANSWER])
        parts = rng.choices(some if rng.random() < 0.8 else PIECES, k=rng.randrange(14))
        if rng.random() < 0.01:
            parts.insert(rng.randrange(len(parts) + 1), rng.choice(PIECES) * rng.randrange(200, 700))
        text = "".join(parts)
        if rng.random() < 0.33:
            text = text[rng.randrange(4) : len(text) - rng.randrange(4)]
        yield rng, text


def balanced_by_counting(text: str, command: str) -> str | None:
    """The last balanced answer by the plain definition: try the openings from the last, counting braces. Quadratic."""
    opening = re.compile(rf"\\{command}[ \t\n]*{{")
    for start in reversed([found.end() for found in opening.finditer(text)]):
        depth, position = 1, start
        while position < len(text):
            if text[position] == "\\" and not opening.match(text, position):
                # skips the escaped character, unless that begins an opening
                position += 1 if opening.match(text, position + 1) else 2
                continue
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start:position]
            position += 1
    return None


@share_and_all(2_000, 40_000)
def test_parsers_agree_with_their_plain_definitions(count):
    found = closed = 0
    for rng, text in texts(count, seed=1):
        for command, opening in (("boxed", BOXED_OPENING), ("mask", MASK_OPENING)):
            answer = last_answer(text, command)
            assert answer == balanced_by_counting(text, command), repr(text)
            found += answer is not None
            # a scan of pieces, empty ones included, is closed exactly when the text so far has an answer
            state, position = START, 0
            while position < len(text):
                piece = text[position : position + (rng.randrange(6) if len(text) < 60 else rng.randrange(200))]
                state, position = scan(state, piece, opening), position + len(piece)
                assert (state == CLOSED) == (last_answer(text[:position], command) is not None), (text, position)
            closed += state == CLOSED
        state, position = START, 0
        for position, char in enumerate(text[:200], 1):
            state = scan(state, char, THINK_CLOSE)
            assert (state == CLOSED) == (THINK_CLOSE in text[:position]), repr(text)
    assert found > count / 20 and closed == found  # the sample tells both cases apart


@share_and_all(2_000, 40_000)
def test_matches_are_an_equivalence_of_clean_forms(count):
    right = stable = 0
    earlier = ""
    for rng, text in texts(count, seed=2):
        form, other = normalise(text), rng.choice([earlier, f"{text}.", f"“{text}”", text.upper()])
        assert form == " ".join(form.split()), repr(text)
        assert exact_match(text, text) == float(form != "") and exact_match(form or None, text) in (0.0, 1.0)
        assert exact_match(text, other) == exact_match(other, text) <= caseless_match(text, other)
        assert exact_match(None, text) == exact_match("", text) == caseless_match(None, text) == 0.0
        if answerable(text) and not text.endswith("\\"):  # a space after a backslash is LaTeX's
            assert exact_match(f" {text}\n", text) == 1.0, repr(text)
        plain = not set(form) & {"\\", "{", "}", "~"} and not (form and (form[-1] in FINAL_STOPS or form[0] in QUOTES))
        if plain and max(map(len, form.split()), default=0) < 128:
            assert normalise(form) == form, repr(text)
            stable += form != ""
            assert exact_match(rf"\text{{{form}}}.", form) == exact_match(f"“{form}”", form) == float(form != "")
        prefixes = tuple(text[:end] for end in sorted(rng.sample(range(len(text) + 1), min(3, len(text)))))
        expected = any(text[:4].strip() == prefix.strip() != "" for prefix in prefixes)
        assert prefix_match(text[:4], prefixes) == float(expected) and prefix_match(None, prefixes) == 0.0
        right += exact_match(text, other)
        earlier = text
    assert right > count / 4 and stable > count / 8


CAUSES = "no_answer empty not_answerable too_many_words too_long not_in_passage too_many_occurrences".split()


@share_and_all(1_000, 20_000)
def test_a_mask_put_back_gives_the_passage_again(count):
    causes = set()
    for rng, text in texts(count, seed=3):
        passage = SimpleNamespace(text=(text * rng.randrange(1, 4)).replace(MASK, "mask"), labels=None)
        text = passage.text
        start = rng.randrange(len(text) + 1)
        end = rng.randrange(start, min(len(text), start + 12) + 1)
        words = rng.choice([text[start:end], text[start:end], text[start:end] + "x", last_answer(text, "boxed")])
        rule = rng.choice(["main", "one_mask", "words", "one_mask_words"])
        config = Config(mask_rule=rule, max_occurrences=rng.randrange(1, 9))
        made = [make_mask(words, passage, config, rng), mask_at(passage, start, end, config)]
        if rng.random() < 0.2:
            made.append(random_span(passage, config, rng))
        for mask in made:
            causes.add(mask.invalid)
            assert mask.invalid in ("", *CAUSES) and (mask.masked == "") == (mask.invalid != ""), repr(text)
            if mask.invalid:
                continue
            hidden = mask.masked.count(MASK)
            back = mask.masked.replace(MASK, mask.target)
            # any white space matches any, so other occurrences may be spaced in another way
            assert back == text if hidden == 1 else back.split() == text.split(), (text, words)
            assert text[mask.start :].startswith(mask.target) and mask.masked[mask.start :].startswith(MASK)
            assert answerable(mask.target) and len(mask.words.split()) <= config.max_span_words
        assert 1 <= made[0].occurrences <= config.max_occurrences or made[0].invalid
        borders = sorted({0, len(text), *(rng.randrange(len(text) + 1) for _ in range(5))})
        tokens = list(zip(borders, borders[1:], strict=False))
        for number in range(len(tokens)):
            mask = next_token_mask(passage, tokens, number, Config())
            if not mask.invalid:
                assert mask.masked.removesuffix(MASK) + mask.prefixes[-1] == text[: tokens[-1][1]]
                assert prefix_match(mask.target, mask.prefixes) == 1.0
    assert causes >= {"", "no_answer", "empty", "not_answerable", "not_in_passage", "too_many_occurrences"}


def value(rng: random.Random, text: str, depth: int = 0):
    """Anything that a JSON record may hold."""
    kinds = [text, text, text[:3], None, True, 7, -1.5, float("nan"), float("inf"), 1e300, 10**400, "", [], {}]
    if depth < 3 and rng.random() < 0.4:
        some = [value(rng, text, depth + 1) for _ in range(rng.randrange(3))]
        names = rng.choices(["role", "content", "ground_truth", text[:2]], k=len(some))
        return rng.choice([some, dict(zip(names, some, strict=True)), [dict(zip(names, some, strict=True))]])
    return rng.choice(kinds)


@share_and_all(1_000, 20_000)
def test_answers_questions_prompts_and_paragraphs_from_anything(count):
    golds = 0
    for rng, text in texts(count, seed=4):
        gold = extract_gold(text)
        *_, line = text.strip().split("\n")
        _, mark, after = line.partition("####")
        if mark and after:
            expected = after.strip().removeprefix("$")
        else:
            expected = (last_answer(text, "boxed") or "").strip()
        assert (gold or "").replace(",", "") == expected.replace(",", ""), repr(text)
        golds += gold is not None
        fields = ["prompt", "question", "problem", "answer", "final_answer", "solution", "reward_model"]
        record = {name: value(rng, text) for name in rng.sample(fields, rng.randrange(len(fields)))}
        for found in (question_text(record), gold_answer(record)):
            assert isinstance(found, str) and (found == "" or found.strip()), repr(record)
        assert strip_instruction(strip_instruction(text)) == strip_instruction(text)
        kept, dropped = paragraphs(text)
        assert dropped >= 0 and all("\n" not in paragraph for paragraph in kept), repr(text)
        words = iter(text.split())
        assert all(word in words for paragraph in kept for word in paragraph.split()), repr(
            text
        )  # in order, no new ones
        head, tail = text.replace("{passage}", ""), "</s>"
        assert fill(f"{head}{{passage}}{tail}", text) == head + text + tail
        if text.count("{passage}") != 1:
            with pytest.raises(ValueError, match="once"):
                fill(text, "")
    assert golds > count / 40


MEGABYTES = [*"{}\\ ", "\n", "\\boxed{", "\\boxed{}", "\\{", "\\\\boxed{{", "####\n", "#### ", "a ", "\u0301\u0323"]


QUICK = ["\\boxed{{", "#", "\\text{", '"', "a "]


@pytest.mark.parametrize("unit", [*QUICK, *(pytest.param(unit, marks=pytest.mark.faults) for unit in MEGABYTES)])
def test_a_megabyte_takes_each_parser_less_than_a_second(unit):
    text = unit * (1_000_000 // len(unit))
    passage = SimpleNamespace(text=text, labels=None)
    parsers = {
        "last_answer": lambda: last_answer("\\boxed{" + text, "boxed"),
        "scan": lambda: scan(START, "\\boxed{" + text, BOXED_OPENING), "exact_match": lambda: exact_match(text, "a"),
        "prefix_match": lambda: prefix_match(text, ("a", text)),
        "make_mask": lambda: make_mask(text, passage, Config(), random.Random(0)),
        "make_mask, no caps": lambda: make_mask(text[:20] + "a", passage, Config(max_span_words=0), random.Random(0)),
        "make_mask, words": lambda: make_mask("a a", passage, Config(mask_rule="words"), random.Random(0)),
        "extract_gold": lambda: extract_gold(text + "\nx"), "extract_gold, one line": lambda: extract_gold(text),
        "paragraphs": lambda: paragraphs(f"x{text}y\nz."),
    }
    for name, parse in parsers.items():
        started = time.process_time()
        parse()
        assert time.process_time() - started < 1, name
