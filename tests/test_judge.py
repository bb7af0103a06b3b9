"""Answers to maths questions: which ones count as right, and that no answer can hurt the run."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import verify
from benchmarks.judge import check_answers
from data import extract_gold

ROOT = Path(verify.__file__).parent
TOWER = "9^{9^{9^{9^{9}}}}"

# (gold, answer): what math-verify finds equal
RIGHT = [
    ("42", "42"),
    ("42", " 42 "),
    ("42", "42.0"),
    ("42", "$42$"),
    ("42", r"\$42"),
    ("0", "-0"),
    ("-42", "−42"),  # the minus of Unicode
    # thousands
    ("1000", "1,000"),
    ("1,000", "1000"),
    ("1234567", "1,234,567"),
    ("1000", "1{,}000"),
    ("10^{6}", "1000000"),
    (r"1.2\times10^{3}", "1200"),
    # fractions and decimals
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", "1/2"),
    (r"\frac{1}{2}", r"\frac12"),
    (r"\frac{1}{2}", r"\dfrac{1}{2}"),
    (r"\frac{1}{2}", r"\tfrac{2}{4}"),
    (r"\frac{1}{3}", "0.333333"),  # six decimals are enough
    (r"\frac{3}{2}", r"1\frac{1}{2}"),
    ("18.90", "18.9"),
    (".5", "0.5"),
    # percent and units: the number decides
    (r"50\%", "50%"),
    (r"50\%", "50"),
    (r"50\%", "0.5"),
    ("50", r"50\%"),
    ("5", r"5\text{ cm}"),
    ("5", r"5 \mathrm{~cm}"),
    ("5", "5 apples"),
    ("90", r"90^{\circ}"),
    (r"90^\circ", "90"),
    (r"\$18.90", "18.90"),
    # text wrappers
    ("5", r"\text{5}"),
    ("5", r"\mathbf{5}"),
    ("5", r"\boxed{5}"),
    (r"\text{Evelyn}", "Evelyn"),
    # roots, pi, expressions
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    (r"2\pi", "2π"),
    ("(x+1)^2", "x^2+2x+1"),
    ("x^2+1", "1+x^2"),
    ("1+2i", "2i+1"),
    ("5!", "120"),
    (r"\binom{5}{2}", "10"),
    # equations
    ("5", "x=5"),
    ("5", "3+2=5"),
    ("x=5", "5"),
    ("y=2x+1", "2x+1"),
    ("2x+3y=6", "2x+3y-6=0"),
    # points, intervals, sets, matrices
    ("(1,2)", "(1, 2)"),
    ("[1,2)", "[1, 2)"),
    (r"(-\infty,2)", r"(-\infty, 2)"),
    ("x<2", r"(-\infty,2)"),
    (r"(-\infty, 1)\cup(2,\infty)", r"(2,\infty)\cup(-\infty,1)"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"\{1,2\}", "1,2"),
    ("1,2,3", r"3, 2 \text{ and } 1"),
    (r"\pm 2", "2,-2"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
]
WRONG = [
    ("42", "43"),
    ("42", "-42"),
    ("42", "142"),
    ("1000", "1,00"),
    ("1000", "1.000"),
    (r"\frac{1}{3}", "0.33"),
    (r"\pi", "3.14"),
    ("5", "5.00001"),
    ("x^2+1", "(x+1)^2"),
    (r"\frac{a}{b}", r"\frac{b}{a}"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("1,2", "1"),
    ("A", "B"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    # two answers are not one right answer
    ("5", "5, 6"),
    ("5", "5 or 6"),
    ("5", "$6$ or $5$"),
    ("5", r"6} \boxed{5"),
    # nothing that can be read
    ("5", ""),
    ("5", "  "),
    ("", "5"),
    ("", ""),
    ("5", "?"),
    ("5", "five"),
    ("5", r"\frac{5}{0}"),
    ("5", r"\frac{5}{"),
    ("5", "the answer is 5"),
    ("5", "5" * 100_000),
    ("5" * 3000, "5" * 3000),  # longer than any answer: not even asked
]
HOSTILE = {
    "a tower of exponents": TOWER,
    "a factorial": "99999999!",
    "10,000 brackets": "(" * 10_000 + "1" + ")" * 10_000,
    "100,000 letters": "a" * 100_000,
    "100,000 digits": "1" * 100_000,
    "marks of no script": "\u202e\U0001d7d9٣\ud800\x00\n5" * 1000,
}


@pytest.mark.parametrize(("gold", "answer"), RIGHT)
def test_equal_answers_earn_one(gold, answer):
    assert check_answers([(gold, answer)]) == [1.0]


@pytest.mark.parametrize(("gold", "answer"), WRONG, ids=[f"{g[:20]}|{a[:20]}" for g, a in WRONG])
def test_other_answers_earn_nothing(gold, answer):
    assert check_answers([(gold, answer)]) == [0.0]


def test_verdicts_come_in_input_order_and_no_answer_earns_nothing():
    pairs = [("5", "6"), (r"\frac{1}{2}", "0.5"), ("5", None), ("5", "5"), (r"\frac{1}{2}", "0.6"), ("5", "6")]
    assert check_answers(pairs) == [0.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    assert check_answers([]) == []


def test_verdicts_are_those_of_math_verify_itself():
    rng = random.Random(0)
    numbers = ["0", "7", "-7", "10", "1000", "1,000", "0.5", "2.50", r"\frac{5}{2}", "5/2", r"\sqrt{4}", "2", "250\\%"]
    pairs = [(rng.choice(numbers), rng.choice(numbers)) for _ in range(150)]
    from math_verify import parse, verify  # in a main thread, as its alarms need

    direct = [float(verify(parse(rf"\boxed{{{gold}}}"), parse(rf"\boxed{{{answer}}}"))) for gold, answer in pairs]
    assert 0 < sum(direct) < len(direct)
    assert check_answers(pairs) == direct


def test_whole_numbers_need_no_child(monkeypatch):
    monkeypatch.setattr(verify, "_ask", lambda *_: pytest.fail("asked"))
    assert check_answers([("42", "42"), ("42", "-42"), ("-7", " -7")]) == [1.0, 0.0, 1.0]


def test_equal_pairs_are_checked_once(monkeypatch):
    asked = []
    monkeypatch.setattr(verify, "_ask", lambda request, seconds: asked.append(request) or 1.0)
    assert check_answers([("1/2", "0.5")] * 8 + [("1/2", ".5")]) == [1.0] * 9
    assert len(asked) == 2


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_answer_costs_its_limit_and_not_the_run(kind, monkeypatch):
    monkeypatch.setattr(verify, "MAX_ANSWER_CHARS", 10**9)  # let even the long ones through
    check_answers([("1/2", "0.5")])
    begin = time.monotonic()
    assert check_answers([("42", HOSTILE[kind])], seconds=0.5) == [0.0]
    assert time.monotonic() - begin < 0.5 + 2
    assert check_answers([("1/2", "0.5"), ("1/2", "0.6")]) == [1.0, 0.0]


def test_answers_after_a_hostile_one_in_the_same_batch_are_right():
    assert check_answers([("1/2", "0.5"), ("1/2", TOWER), ("3/4", "0.75")], seconds=1) == [1.0, 0.0, 1.0]


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="reads the limit from Linux's /proc")
def test_the_child_may_not_take_all_memory():
    check_answers([("1/2", "0.5")])
    limits = Path(f"/proc/{verify._child.pid}/limits").read_text()
    assert str(verify.MEMORY_BYTES) in next(line for line in limits.splitlines() if "address space" in line)


def test_a_child_killed_from_outside_is_replaced_and_asked_again():
    check_answers([("1/2", "0.5")])
    first = verify._child.pid
    os.kill(first, signal.SIGKILL)
    assert check_answers([("1/2", "0.5"), ("1/2", "0.6")]) == [1.0, 0.0]
    assert verify._child.pid != first and not running(first)


def test_an_answer_that_kills_two_children_is_wrong(monkeypatch):
    deaths = []
    monkeypatch.setattr(verify, "_ask", lambda *_: deaths.append(1))
    assert check_answers([("1/2", "0.5")]) == [0.0] and len(deaths) == 2


def test_an_interrupted_check_does_not_shift_the_replies(monkeypatch):
    check_answers([("1/2", "0.5")])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(verify, "_read", interrupt)
        check_answers([("1/2", "0.5")])
    assert check_answers([("1/2", "0.6")]) == [0.0]


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ModuleNotFoundError(\"No module named 'math_verify'\")\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    verify._stop()
    with pytest.raises(RuntimeError, match="No module named 'math_verify'.*pip install math-verify"):
        check_answers([("1/2", "0.5")])
    monkeypatch.undo()
    assert check_answers([("1/2", "0.5")]) == [1.0]


PREFACE = """import os, signal, sys, threading, verify
verify.check_answers([("1/2", "0.5")])
print(verify._child.pid, flush=True)
"""


@pytest.mark.parametrize(
    "ending",
    [
        "",
        "raise SystemExit(3)",
        "os.kill(os.getpid(), signal.SIGKILL)",
        "threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
        f"verify.check_answers([('1/2', '{TOWER}')], seconds=0.6)",
    ],
    ids=["end", "exit", "killed", "killed while the child is busy"],
)
def test_no_process_is_left_behind(ending):
    child = int(run_python(PREFACE + ending))
    until = time.monotonic() + 5
    while running(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not running(child)


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and ") Z " in stat.read_text())  # ended, though nobody has asked how


def test_the_child_does_without_torch():
    code = "import sys, verify; assert verify._verdict('1/2', '0.5'); print('torch' in sys.modules)"
    assert run_python(code).strip() == "False"


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60).stdout


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("She has 16 - 3 = <<16-3=13>>13 eggs.\n#### 13", "13"),
        ("It costs that.\n#### 1,024", "1024"),
        ("#### $109,200,000 ", "109200000"),
        ("#### -1,000.50", "-1000.50"),
        ("In one line. #### 7", "7"),
        ("#### 1,2", "1,2"),  # two numbers, no thousands
        (r"First \boxed{1}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("#### A heading\nSo it is \\boxed{12,345}.", "12345"),
        (r"\boxed{(1,2)}", "(1,2)"),
        (r"\boxed{}", None),
        ("The answer is 5.", None),
        ("####", None),
        ("", None),
    ],
)
def test_the_answer_of_a_worked_solution(text, gold):
    assert extract_gold(text) == gold
