r"""math-verify in a process of its own that may be killed: the part of the judge (judge.py) that needs algebra.

A model's answer may keep sympy busy for years or take all memory. So one child process, which imports no torch, does
the checks; the caller waits `seconds` for each answer, then kills the child and scores 0.0. A new child takes a second.
The limit is of wall time, so verdicts near it depend on the machine: where several ranks must agree, check an answer on
one rank and send the verdict to the others.

The verdict is math-verify's (0.9.0, gold first, both wrapped in \boxed{}), with one guard. math-verify compares numbers
as floats, so that 2^{-60} equals 2^{-61}; where it says yes, the values are compared again, exactly or to 100 digits.
"""

import atexit
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

START_SECONDS = 120.0  # importing sympy takes half a second; far more from a cold network disk
MEMORY_BYTES = 4 << 30  # address space of the child
DECIMALS = 1e-5  # relative; math-verify itself compares decimal numbers to six places, which says nothing near zero
EXACT = 1e-40  # relative; what evalf leaves of an exact zero is far smaller

_child: subprocess.Popen | None = None
_lock = threading.Lock()


def equal_in_child(gold: str, answer: str, seconds: float) -> float:
    """1.0 if math-verify finds the two equal and the guard agrees, else 0.0, also after `seconds` of wall time. Threads
    take turns. Raises RuntimeError when the child cannot be started. `"(x+1)^2", "x^2+2x+1"` -> `1.0`"""
    request = json.dumps([gold, answer, seconds]).encode() + b"\n"  # ASCII, without line ends inside
    with _lock:
        verdict = _ask(request, seconds)
        if verdict is None:  # another process may have killed the child: only an answer that kills two is wrong
            verdict = _ask(request, seconds)
    return verdict or 0.0


def _ask(request: bytes, seconds: float) -> float | None:
    """The child's verdict; 0.0 after `seconds`, which ends the child; None if the child died."""
    global _child
    _child, reply = _child or _start(), None
    try:
        rest = request
        while rest:
            rest = rest[os.write(_child.stdin.fileno(), rest) :]
        reply = _read(_child, seconds)
    except BrokenPipeError:
        pass
    finally:  # also on an interrupt, or the late reply would be taken for the next answer's
        if reply not in ("0", "1"):
            _stop()
    return {"1": 1.0, "0": 0.0, "timeout": 0.0}.get(reply)


def _read(process: subprocess.Popen, seconds: float) -> str:
    """One line from the child (a pipe passes short lines whole), `timeout`, or "" if the child has ended."""
    poll = select.poll()  # select.select fails in a process with more than 1024 open files
    poll.register(process.stdout, select.POLLIN)
    ready = poll.poll(1000 * seconds)
    return os.read(process.stdout.fileno(), 4096).decode(errors="replace").strip() if ready else "timeout"


def _start() -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.verify"], cwd=Path(__file__).resolve().parent.parent, bufsize=0,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONHASHSEED": "0"},  # sympy's order of terms depends on it
    )  # fmt: skip
    reply = _read(process, START_SECONDS)
    if reply != "ready":
        process.kill()
        why, need = reply or f"exit status {process.wait()}", "it needs math-verify: pip install math-verify==0.9.0"
        raise RuntimeError(f"the process that checks answers did not start ({why}); {need}")
    return process


@atexit.register
def _stop() -> None:
    global _child
    if _child is not None:
        process, _child = _child, None
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def _serve() -> None:
    """The child. Reads [gold, answer, seconds] a line, writes 1 or 0 a line, until stdin ends."""
    with suppress(ValueError):  # macOS refuses; there the time limit alone must do
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # without a handler the kernel ends the process, even inside C code
    replies = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not pass for a reply
    try:
        _verdict("1/2", "0.5")  # imports and builds the parsers, before any clock runs
    except Exception as error:
        os.write(replies, f"{type(error).__name__}: {error}"[:1000].encode() + b"\n")
        raise SystemExit(1) from None
    os.write(replies, b"ready\n")
    for line in sys.stdin.buffer:
        gold, answer, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds + 1)  # ends the child if the caller is gone
        try:
            same = _verdict(gold, answer)
        except Exception:  # parsers and sympy raise anything on odd input
            same = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(replies, b"1\n" if same else b"0\n")


def _verdict(gold: str, answer: str) -> bool:
    """The verdict of math-verify, without its own limits: these use the alarm signal, which C code does not notice."""
    import sympy
    from math_verify import LatexExtractionConfig, parse, verify

    latex = [LatexExtractionConfig()]  # alone: of a text that it cannot read, the other takes the last number
    boxed = [parse(f"\\boxed{{{text}}}", extraction_config=latex, parsing_timeout=None) for text in (gold, answer)]
    for values in boxed:  # math-verify makes several symbols of one name, also of i
        for symbol in getattr(values[0], "free_symbols", ()) if values else ():
            values[0] = values[0].subs(symbol, sympy.I if symbol.name == "i" else sympy.Symbol(symbol.name, real=True))
    same = verify(*boxed, timeout_seconds=None, allow_set_relation_comp=True)
    return same and _close(boxed[0][0], boxed[1][0])


def _close(gold: object, answer: object) -> bool:
    """Whether two values that math-verify finds equal agree to 100 digits; True for kinds that have no value."""
    import sympy

    if isinstance(gold, sympy.Set | sympy.Tuple | sympy.MatrixBase) and type(gold) is type(answer):
        parts, others = ([*one] if isinstance(one, sympy.MatrixBase) else one.args for one in (gold, answer))
        if isinstance(gold, sympy.FiniteSet | sympy.Union):  # in any order
            return all(any(_close(part, other) for other in others) for part in parts)
        return all(map(_close, parts, others))
    if not (isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr)):
        return {type(gold).__name__, type(answer).__name__} != {"FiniteSet", "And"}  # -2, 1 is not -2 < x < 1
    if sympy.oo in (gold, answer) or -sympy.oo in (gold, answer):
        return gold == answer
    # a formula is compared at one point; equal formulas are equal there
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    point = {symbol: sympy.Rational(137 + 13 * number, 101 + number) for number, symbol in enumerate(symbols)}
    gold, answer = gold.subs(point), answer.subs(point)
    if gold.has(sympy.zoo, sympy.nan) or answer.has(sympy.zoo, sympy.nan):
        return False
    size, difference = abs(sympy.N(gold)), abs(sympy.N(gold - answer))
    if not (size.is_finite and difference.is_number and difference.is_finite):
        return True  # not to be evaluated, as f(x)
    limit = DECIMALS if gold.has(sympy.Float) or answer.has(sympy.Float) else EXACT
    return bool(difference <= limit * size)


if __name__ == "__main__":
    _serve()
