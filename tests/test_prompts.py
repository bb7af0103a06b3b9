"""Prompts and answers: what is filled in, which braces close, and that the sampler's scan agrees with the parser."""

import doctest

import pytest

import prompts
from prompts import (BOXED_OPENING, CLOSED, MASK_OPENING, MASK_PROMPT, PREDICT_PREFIX, PREDICT_PROMPT, START,
                     last_answer, scan)  # fmt: skip


def test_examples_in_the_docstrings():
    results = doctest.testmod(prompts)
    assert results.attempted >= 4 and results.failed == 0


def test_each_prompt_shows_its_own_command_in_a_worked_example():
    assert last_answer(MASK_PROMPT, "mask") == "nitrogen" and BOXED_OPENING not in MASK_PROMPT
    assert last_answer(PREDICT_PROMPT, "boxed") == "nitrogen" and MASK_OPENING not in PREDICT_PROMPT
    # the predictor's example is the generator's, masked
    example = MASK_PROMPT.split("Passage:\n")[1].split("\n")[0]
    assert example.count("nitrogen") == 1
    assert example.replace("nitrogen", "[mask]") in PREDICT_PROMPT


def test_the_prefix_leaves_the_completion_inside_the_box():
    assert last_answer(PREDICT_PREFIX + "Paris} and on", "boxed") == "Paris"
    assert scan(scan(START, PREDICT_PREFIX, BOXED_OPENING), "Paris}", BOXED_OPENING) == CLOSED


@pytest.mark.parametrize(("text", "answer"), [
    (r"so \boxed{Paris}.", "Paris"), (r"\boxed{}", ""), (r"\boxed {Paris}", "Paris"), ("\\boxed \n\t{Paris}", "Paris"),
    (r"\boxed {a} \boxed {b", "a"), (r"\boxed {a \boxed  {b} c}", "b"), (r"\box ed{Paris}", None),
    (r"\boxed x{Paris}", None), (r"\boxed{ a b }", " a b "), ("\\boxed{a\nb}", "a\nb"),
    (r"\boxed{one} then \boxed{two}", "two"),
    (r"\boxed{one} then \boxed{two", "one"),  # an unclosed one is ignored
    (r"\boxed{\text{a} {b}}", r"\text{a} {b}"), (r"\boxed{\{1, 2\}}", r"\{1, 2\}"), (r"\boxed{\}}", r"\}"),
    (r"\boxed{\{}", r"\{"),
    (r"\boxed{a\\}", r"a\\"),  # an escaped backslash escapes nothing
    (r"\boxed{a\\\}}", r"a\\\}"),
    (r"\boxed{a \boxed{b}}", "b"),  # the inner one is the last to be opened
    (r"\boxed{a \boxed{b} c", "b"), (r"\boxed{a} \boxed{b {c}", "a"),
    (r"} {{ \boxed{a}", "a"),  # braces before it do not matter
    (r"{\boxed{a}", "a"), (r"\boxed{a}}}}", "a"), (r"\boxed{a} {b}", "a"), (r"\\boxed{a}", "a"), (r"\\\boxed{a}", "a"),
    (r"\bo\boxed{a}", "a"), (r"\boxed{\boxed{\boxed{a}}}", "a"), (r"\boxed{北京}", "北京"), ("Paris", None), ("", None),
    (r"\boxed{Paris", None), (r"\boxed Paris}", None), (r"boxed{Paris}", None), (r"\Boxed{Paris}", None),
    (r"\mask{Paris}", None), (r"\boxed{Paris\}", None), ("\\", None),
])  # fmt: skip
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
