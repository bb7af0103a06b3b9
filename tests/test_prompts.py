"""Prompts and answers: what is filled in, which braces close, and that the sampler's scan agrees with the parser."""

import doctest
import random
import re
import time

import pytest

import prompts
from prompts import (
    BOXED_OPENING, CLOSED, MASK_OPENING, MASK_PROMPT, PREDICT_PREFIX, PREDICT_PROMPT, START, fill, last_answer, scan,
)  # fmt: skip


def test_examples_in_the_docstrings():
    results = doctest.testmod(prompts)
    assert results.attempted >= 5 and results.failed == 0


@pytest.mark.parametrize("template", [MASK_PROMPT, PREDICT_PROMPT])
def test_default_prompts_are_filled_once_and_end_with_a_cue(template):
    assert template.count("{passage}") == 1
    assert template.endswith("Passage:\n{passage}\n\nReasoning:")
    assert "Titan" in template and len(template.split()) < 200  # compact: the prompt has 1536 tokens in all


def test_each_prompt_shows_its_own_command_in_a_worked_example():
    assert last_answer(MASK_PROMPT, "mask") == "nitrogen" and BOXED_OPENING not in MASK_PROMPT
    assert last_answer(PREDICT_PROMPT, "boxed") == "nitrogen" and MASK_OPENING not in PREDICT_PROMPT
    # the predictor's example is the generator's, masked
    example = MASK_PROMPT.split("Passage:\n")[1].split("\n")[0]
    assert example.count("nitrogen") == 1
    assert example.replace("nitrogen", "[mask]") in PREDICT_PROMPT


def test_fill_leaves_every_other_brace_alone():
    passage = r"{0} {passage} {{x}} %s \boxed{y} \1 \g<0>"
    assert fill(r"Use \mask{...}. {passage} {end}", passage) == rf"Use \mask{{...}}. {passage} {{end}}"


@pytest.mark.parametrize("template", ["no place", "{passage} and {passage}", ""])
def test_fill_wants_one_place(template):
    with pytest.raises(ValueError, match="once"):
        fill(template, "text")


def test_the_prefix_leaves_the_completion_inside_the_box():
    assert last_answer(PREDICT_PREFIX + "Paris} and on", "boxed") == "Paris"
    assert scan(scan(START, PREDICT_PREFIX, BOXED_OPENING), "Paris}", BOXED_OPENING) == CLOSED


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{Paris}.", "Paris"),
        (r"\boxed{}", ""),
        (r"\boxed {Paris}", "Paris"),
        ("\\boxed \n\t{Paris}", "Paris"),
        (r"\boxed {a} \boxed {b", "a"),
        (r"\boxed {a \boxed  {b} c}", "b"),
        (r"\box ed{Paris}", None),
        (r"\boxed x{Paris}", None),
        (r"\boxed{ a b }", " a b "),
        ("\\boxed{a\nb}", "a\nb"),
        (r"\boxed{one} then \boxed{two}", "two"),
        (r"\boxed{one} then \boxed{two", "one"),  # an unclosed one is ignored
        (r"\boxed{\text{a} {b}}", r"\text{a} {b}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\}}", r"\}"),
        (r"\boxed{\{}", r"\{"),
        (r"\boxed{a\\}", r"a\\"),  # an escaped backslash escapes nothing
        (r"\boxed{a\\\}}", r"a\\\}"),
        (r"\boxed{a \boxed{b}}", "b"),  # the inner one is the last to be opened
        (r"\boxed{a \boxed{b} c", "b"),
        (r"\boxed{a} \boxed{b {c}", "a"),
        (r"} {{ \boxed{a}", "a"),  # braces before it do not matter
        (r"{\boxed{a}", "a"),
        (r"\boxed{a}}}}", "a"),
        (r"\boxed{a} {b}", "a"),
        (r"\\boxed{a}", "a"),
        (r"\\\boxed{a}", "a"),
        (r"\bo\boxed{a}", "a"),
        (r"\boxed{\boxed{\boxed{a}}}", "a"),
        (r"\boxed{北京}", "北京"),
        ("Paris", None),
        ("", None),
        (r"\boxed{Paris", None),
        (r"\boxed Paris}", None),
        (r"boxed{Paris}", None),
        (r"\Boxed{Paris}", None),
        (r"\mask{Paris}", None),
        (r"\boxed{Paris\}", None),
        ("\\", None),
    ],
)
def test_last_balanced_answer(text, answer):
    assert last_answer(text, "boxed") == answer
    if MASK_OPENING not in text:
        assert last_answer(text.replace("boxed", "mask"), "mask") == answer
    assert closes_at(text, BOXED_OPENING) == first_answer_at(text, "boxed")


def closes_at(text: str, opening: str) -> int | None:
    """Length of the shortest prefix at which the scan, fed single characters, is closed."""
    state = START
    for position, char in enumerate(text, 1):
        state = scan(state, char, opening)
        if state == CLOSED:
            return position
    return None


def first_answer_at(text: str, command: str) -> int | None:
    """The same by parsing every prefix anew."""
    return next((n for n in range(len(text) + 1) if last_answer(text[:n], command) is not None), None)


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


def random_texts(count: int):
    rng = random.Random(7)
    alphabet = [r"\boxed{", r"\boxed{", "\\boxed \n{", r"\boxed", r"\mask{", r"\mask {", r"\box", "boxed{", *" }"]
    alphabet += [ "a", "\n", *"{}}\\", r"\\", r"\{", r"\}"]
    for _ in range(count):
        yield rng, "".join(rng.choices(alphabet, k=rng.randrange(14)))


def test_scan_closes_exactly_where_the_first_answer_does():
    closed = 0
    for rng, text in random_texts(6000):
        expected = first_answer_at(text, "boxed")
        assert closes_at(text, BOXED_OPENING) == expected, text
        closed += expected is not None
        # and the way the text is cut into pieces, empty ones included, changes nothing
        state, position = START, 0
        while position < len(text):
            piece = text[position : position + rng.randrange(6)]
            state, position = scan(state, piece, BOXED_OPENING), position + len(piece)
            assert (state == CLOSED) == (expected is not None and position >= expected), (text, position)
    assert 1000 < closed < 5000  # the sample tells both cases apart


def test_last_answer_agrees_with_the_plain_definition():
    found = 0
    for _, text in random_texts(6000):
        for command in ("boxed", "mask"):
            answer = balanced_by_counting(text, command)
            assert last_answer(text, command) == answer, text
            found += answer is not None
    assert found > 1000


@pytest.mark.parametrize(
    "unit",
    ["{", "}", "\\", "{}", "\\boxed{", "\\boxed{}", "\\boxed{a", "\\{", "\\boxed", "\\boxed ", " ", "\\\\boxed{{"],
)
def test_a_megabyte_of_anything_is_parsed_in_linear_time(unit):
    text = unit * (1_000_000 // len(unit))
    started = time.process_time()
    last_answer("\\boxed{" + text, "boxed")
    scan(START, "\\boxed{" + text, BOXED_OPENING)
    assert time.process_time() - started < 4  # far above what it takes; a quadratic parser would take hours
