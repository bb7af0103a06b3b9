"""The judge: verdicts, pairs that must never be equal, and that no answer can hurt the run. judged.jsonl has a row for
each answer and its verdict (`python -m benchmarks judge tests/judged.jsonl`). A mistake of the judge becomes a row."""

import doctest
import json
import os
import random
import signal
import subprocess
import sys
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from unittest.mock import Mock

import pytest
from reference import ROOT

from benchmarks import __main__ as commands
from benchmarks import judge, verify
from benchmarks.judge import check_answers, fuzzy_match, option_letter, read_number

ROWS = [json.loads(line) for line in Path(__file__).with_name("judged.jsonl").read_text(encoding="utf-8").splitlines()]
TOWER = "9^{9^{9^{9^{9}}}}"


def test_examples_in_the_docstrings():
    results = doctest.testmod(judge)
    assert results.attempted >= 5 and results.failed == 0


@pytest.mark.parametrize(("kind", "least"), [("maths", 400), ("letter", 100), ("match", 100), ("mask", 30)])
def test_every_row_of_the_table_is_judged_as_it_says(kind, least):
    rows = [row for row in ROWS if row["kind"] == kind]
    assert len(rows) >= least and len({json.dumps(row) for row in rows}) == len(rows)
    verdicts = [row.get("right", row.get("target")) for row in rows]
    assert 0.1 < sum(map(bool, verdicts)) / len(rows) < 0.9
    found = [(row, commands.judge_row(row)) for row in rows]
    assert [pair for pair, right in zip(found, verdicts, strict=True) if pair[1] != right] == []


def written(value: Fraction, rng: random.Random) -> str:
    """One of the ways to write a number exactly; a decimal where it ends."""
    top, bottom = value.numerator, value.denominator
    ways = [f"{top}/{bottom}", rf"\frac{{{top}}}{{{bottom}}}", rf"\dfrac{{{top}}}{{{bottom}}}"]
    if 10**12 % bottom == 0:
        decimal, power = Decimal(top) / Decimal(bottom), rng.randrange(1, 12)
        ways += [f"{decimal:f}", f"{decimal:f}", f"{decimal:e}", f"{decimal:,f}"]
        ways += [rf"{decimal * 10**power:f} \times 10^{{{-power}}}"]
    dress = r"%s|%s|%s.|$%s$|**%s**|\(%s\)|x = %s|\approx %s|%s\text{ cm}|%s dollars|€%s".split("|")
    return rng.choice(dress).replace("%s", rng.choice(ways))


def neighbour(value: Fraction, rng: random.Random) -> Fraction:
    """Another number that is easily taken for this one."""
    step, inverse = Fraction(1, 10 ** rng.randrange(0, 12)), 1 / (value or Fraction(1))
    return rng.choice([-value, value + step, value - step, value * 10, value / 10, inverse, value * 2])


@pytest.mark.parametrize("count", [2_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_two_different_numbers_are_never_equal_and_equal_ones_are(count, monkeypatch):
    monkeypatch.setattr(judge, "equal_in_child", lambda *pair: pytest.fail(f"asked the child about {pair}"))
    rng, wrong, missed = random.Random(count), [], []
    for _ in range(count):
        size = 10 ** rng.randrange(1, 10)
        value = Fraction(rng.randrange(-size, size), rng.choice([1, 1, 10, 1000, 10**6, 3, 7, 12, 2**5]))
        other = neighbour(value, rng)
        gold, same, different = written(value, rng), written(value, rng), written(other, rng)
        missed += [(gold, same)] if check_answers([(gold, same)]) != [1.0] else []
        wrong += [(gold, different)] if value != other and check_answers([(gold, different)]) != [0.0] else []
    assert wrong == [] and missed == []


def test_what_is_no_plain_number():
    texts = ["", "x", "12 or 13", "12!", "5x", "6:18", "1,0000", r"\sqrt{4}", "1/0", "+", "10^{x}"]
    assert [text for text in texts if read_number(text) is not None] == []


# ---------------------------------------------------------------------------------------------- letters and BBEH
BBEH_RIGHT = [
    ("(A)", "(A)"), ("(A)", "A"), ("(A)", "a"), ("(A)", r"\text{(A)}"), ("(A)", "**(A)**"), ("A", "(A)"), ("E", "e."),
    ("17", "17.0"), ("17.0", "17"), ("14.22", "14.220"), ("-58396", "-58396."), ("-58396", "$-58396$"), ("Yes", "yes"),
    ("no, unknown, yes", "no,unknown,yes"), ("no, unknown, yes", r"\text{No, unknown, yes}"),
    ("no, unknown, yes", r"\text{no}, \text{unknown}, \text{yes}"), ("AB, ABC, ABC", "ab, abc, abc."),
    ("[friday]", "friday"), ("[friday]", "[Friday]"), ("friday", "[friday]"), ("[hiking, studying]", "hiking,studying"),
    ("[]", "[]"), ("kas jiłaka’pa", "Kas jiłaka’pa"), ("it's open", "its open"), ("unknown", "unknown?"),
    ("unknown", "unknown.\nThe clues do not say."), ("disproved", "The answer is: disproved."),
    ("proved", "The final answer is proved"), ("same_day, 06:24:24", r"same\_day, 06:24:24"),
    ("1 egg", r"\texttt{1 egg}"), ("pha⁵⁵", "pha⁵⁵"),
]  # fmt: skip
BBEH_WRONG = [  # "(A) Sam": the published rules know no words after the letter
    ("(A)", "(B)"), ("(A)", "(A) Sam"), ("(A)", "[A]"), ("17", "18"), ("1000", "1,000"), ("17", "17 eggs"),
    ("Yes", "No"), ("proved", "disproved"), ("no, unknown, yes", "yes, unknown, no"), ("AB, ABC, ABC", "AB ABC ABC"),
    ("[friday]", "(friday)"), ("unknown", "?unknown"), ("[]", "."), ("jiłaka’pa", "jilaka’pa"),
    ("spoon", "s" * 100_000), ("10", "infinity"),
]  # fmt: skip


def test_bbehs_rules_and_a_long_box():
    assert [pair for pair in BBEH_RIGHT if not fuzzy_match(pair[1], pair[0])] == []
    assert [pair for pair in BBEH_WRONG if fuzzy_match(pair[1], pair[0])] == []
    assert option_letter("C" * 100_000, "ABCD") is None


# ---------------------------------------------------------------------------------------------- the child
HOSTILE = {
    "a tower of exponents": TOWER, "a factorial": "99999999!", "words and a mark": "a" * 1000 + "!",
    "a number among words": "a" * 90 + " 7 " + "b" * 90 + "!", "nested braces": "{" * 999 + "7" + "}" * 999,
    "a product of powers": r"\times".join(["9^{999}", "2^{-999}"] * 60), "marks of markdown": "*" * 1999,
    "text in text": r"\text{a" * 280, "10,000 brackets": "(" * 10_000 + "1" + ")" * 10_000,
    "100,000 letters": "a" * 100_000, "100,000 digits": "1" * 100_000,
    "marks of no script": "\u202e\U0001d7d9٣\ud800\x00\n5" * 1000,
}  # fmt: skip


def test_verdicts_come_in_input_order_and_no_answer_earns_nothing():
    pairs = [("5", "6"), (r"\frac{1}{2}", "0.5"), ("5", None), ("5", "5"), (r"\frac{1}{2}", "0.6"), ("5", "6")]
    pairs += [(r"\sqrt{4}", "2"), (r"\sqrt{4}", TOWER), (r"\sqrt{9}", "3")]  # also around an answer that takes too long
    assert check_answers(pairs, seconds=1) == [0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0]
    assert check_answers([]) == []


def test_verdicts_on_expressions_are_those_of_math_verify_itself():
    from math_verify import parse, verify  # in a main thread, as its alarms need

    rng = random.Random(0)
    forms = r"\sqrt{4}x 2x x+x x+1 1+x (x+1)^2 x^2+2x+1 \frac{x}{2} x/2 0.5x \pi (1,2) [1,2]".split()
    pairs = [(rng.choice(forms), rng.choice(forms)) for _ in range(150)]
    direct = [float(verify(parse(rf"\boxed{{{gold}}}"), parse(rf"\boxed{{{answer}}}"))) for gold, answer in pairs]
    assert 0 < sum(direct) < len(direct) and check_answers(pairs) == direct


def test_equal_pairs_are_checked_once(monkeypatch):
    monkeypatch.setattr(verify, "_ask", ask := Mock(return_value=1.0))
    assert check_answers([("x+1", "1+x")] * 8 + [("x+1", "x+2-1")]) == [1.0] * 9 and ask.call_count == 2


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_answer_costs_its_limit_and_not_the_run(kind, monkeypatch):
    monkeypatch.setattr(judge, "MAX_ANSWER_CHARS", 10**9)  # let even the long ones through
    check_answers([(r"\sqrt{4}", "2")])
    begin = time.monotonic()
    assert check_answers([("x", HOSTILE[kind])], seconds=0.5) == [0.0]
    assert time.monotonic() - begin < 0.5 + 2
    assert check_answers([("42", HOSTILE[kind])], seconds=0.5) == [0.0]
    assert time.monotonic() - begin < 1.0 + 4
    assert check_answers([(r"\sqrt{4}", "2"), (r"\sqrt{4}", "3")]) == [1.0, 0.0]


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="reads the limit from Linux's /proc")
def test_the_child_may_not_take_all_memory():
    check_answers([(r"\sqrt{4}", "2")])
    limits = Path(f"/proc/{verify._child.pid}/limits").read_text()
    assert str(verify.MEMORY_BYTES) in next(line for line in limits.splitlines() if "address space" in line)


def test_a_child_killed_from_outside_is_replaced_and_asked_again():
    check_answers([(r"\sqrt{4}", "2")])
    first = verify._child.pid
    os.kill(first, signal.SIGKILL)
    assert check_answers([(r"\sqrt{4}", "2"), (r"\sqrt{4}", "3")]) == [1.0, 0.0]
    assert verify._child.pid != first and not running(first)


def test_an_answer_that_kills_two_children_is_wrong(monkeypatch):
    monkeypatch.setattr(verify, "_ask", ask := Mock(return_value=None))
    assert check_answers([(r"\sqrt{4}", "2")]) == [0.0] and ask.call_count == 2


def test_an_interrupted_check_does_not_shift_the_replies(monkeypatch):
    check_answers([(r"\sqrt{4}", "2")])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(verify, "_read", Mock(side_effect=KeyboardInterrupt))
        check_answers([(r"\sqrt{4}", "2")])
    assert check_answers([(r"\sqrt{4}", "3")]) == [0.0]


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ModuleNotFoundError(\"No module named 'math_verify'\")\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    verify._stop()
    with pytest.raises(RuntimeError, match="No module named 'math_verify'.*pip install math-verify"):
        check_answers([(r"\sqrt{4}", "2")])
    monkeypatch.undo()
    assert check_answers([(r"\sqrt{4}", "2")]) == [1.0]


PREFACE = r"""import os, signal, sys, threading
from benchmarks import judge, verify
judge.check_answers([(r"\sqrt{4}", "2")])
verify._verdict("1/2", "0.5")  # imports what the child imports
print(verify._child.pid, "torch" in sys.modules, flush=True)
"""
KILLED_WHILE_BUSY = f"""threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
judge.check_answers([('x', '{TOWER}')], seconds=0.6)
"""


@pytest.mark.parametrize("ending", ["", KILLED_WHILE_BUSY], ids=["end", "killed while the child is busy"])
def test_no_process_is_left_behind_and_none_needs_torch(ending):
    command = [sys.executable, "-c", PREFACE + ending]
    child, torch = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60).stdout.split()
    until = time.monotonic() + 5
    while running(int(child)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not running(int(child)) and torch == "False"


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and ") Z " in stat.read_text())  # a zombie has ended
