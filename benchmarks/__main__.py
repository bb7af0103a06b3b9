"""Commands of the benchmarks.

    python -m benchmarks show NAME [PATH]       counts of a set's items, its fingerprint, the first prompt
    python -m benchmarks judge FILE.jsonl       rows that say what is right, against the judge; prints those that differ

`python eval.py compare OUT [OUT ...]` puts finished evaluations side by side.
"""

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

from benchmarks.judge import check_answers, option_letter
from benchmarks.sets import load_items, prompt_template
from config import Config, command
from masking import make_mask
from rewards import exact_match


def judge_row(row: dict) -> object:
    """The verdict on a row, to be compared with its `right`, or `target` of a mask. Kinds of rows: maths (gold, answer,
    right), letter (letters, answer, right: a letter or null), match (gold, answer, right: of exact_match), mask
    (passage, rule, words, target: null if there is no mask)."""
    if row["kind"] == "maths":
        return check_answers([(row["gold"], row["answer"])])[0]
    if row["kind"] == "letter":
        return option_letter(row["answer"], row["letters"])
    if row["kind"] == "match":
        return exact_match(row["answer"], row["gold"])
    passage = SimpleNamespace(text=row["passage"], labels=None)
    mask = make_mask(row["words"], passage, Config(mask_rule=row["rule"]), random.Random(0))
    return None if mask.invalid else mask.target


def main() -> None:
    with command(__doc__):
        match sys.argv[1:]:
            case ["judge", path]:
                lines = Path(path).read_text(encoding="utf-8").splitlines()
                rows = [json.loads(line) for line in lines if line.strip()]
                found = [(row, judge_row(row)) for row in rows]
                differ = [(row, verdict) for row, verdict in found if verdict != row.get("right", row.get("target"))]
                for row, verdict in differ:
                    print(f"judged {verdict!r}: {json.dumps(row, ensure_ascii=False)}")
                print(f"{len(rows) - len(differ)} of {len(rows)} as they say")
            case ["show", name, *path] if len(path) < 2:
                items, counts, fingerprint = load_items(name, *path)
                asked = prompt_template(name).replace("{passage}", items[0].question)
                print(f"{name}: {counts}, fingerprint {fingerprint}\n\n--- {items[0].id}\n{asked}\n=> {items[0].gold}")
            case _:
                raise SystemExit((__doc__ or "").rstrip())


if __name__ == "__main__":
    main()
