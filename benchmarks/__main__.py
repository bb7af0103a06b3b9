"""Commands of the benchmarks.

    python -m benchmarks show NAME [PATH]       counts of a set's items, its fingerprint, the first prompt
    python -m benchmarks judge FILE.jsonl       rows that say what is right, against the judge; prints those that differ
    python -m benchmarks compare OUT [OUT ...]  finished evaluations side by side (as `python eval.py compare`)
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

from benchmarks.judge import check_answers, option_letter
from benchmarks.scores import compare
from config import Config, ConfigError
from data import DataError
from masking import make_mask
from prompts import fill
from rewards import exact_match


def judge_row(row: dict) -> object:
    """What the public functions say of one row, to be compared with what the row says.

    A row has a `kind`: maths (gold, answer, right), letter (letters, answer, right: a letter or null), match (gold,
    answer, right: of exact_match), mask (passage, rule, words, target: null if there is no mask).

    >>> judge_row({"kind": "letter", "letters": "ABCD", "answer": "(B) neon"})
    'B'
    """
    if row["kind"] == "maths":
        return check_answers([(row["gold"], row["answer"])])[0]
    if row["kind"] == "letter":
        return option_letter(row["answer"], row["letters"])
    if row["kind"] == "match":
        return exact_match(row["answer"], row["gold"])
    passage = SimpleNamespace(text=row["passage"], labels=None)
    mask = make_mask(row["words"], passage, Config(mask_rule=row["rule"]), random.Random(0))
    return None if mask.invalid else mask.target


def judge(path: str) -> str:
    """The rows of a jsonl that differ from the judge, and how many agree: last line `3 of 4 as they say`."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    found = [judge_row(row) for row in rows]
    differ = [(row, one) for row, one in zip(rows, found, strict=True) if one != row.get("right", row.get("target"))]
    lines = [f"judged {one!r}: {json.dumps(row, ensure_ascii=False)}" for row, one in differ]
    return "\n".join([*lines, f"{len(rows) - len(differ)} of {len(rows)} as they say"])


def show(name: str, path: str = "") -> str:
    """Counts of a benchmark's items, the fingerprint, the first item as it is asked: `show("gsm8k", "a.jsonl")`."""
    from benchmarks.sets import load_items, prompt_template

    items, counts, fingerprint = load_items(name, path)
    asked = fill(prompt_template(name), items[0].question)
    return f"{name}: {counts}, fingerprint {fingerprint}\n\n--- {items[0].id}\n{asked}\n=> {items[0].gold}"


def main() -> None:
    command, *words = sys.argv[1:] or [""]
    try:
        if command == "judge" and len(words) == 1:
            print(judge(*words))
        elif command == "show" and len(words) in (1, 2):
            print(show(*words))
        elif command == "compare" and words:
            print(compare(words))
        else:
            raise SystemExit((__doc__ or "").rstrip())
    except (ConfigError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
