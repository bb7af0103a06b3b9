r"""Questions with checkable answers: jsonl, json (a record per line), parquet files or a hub dataset -> `Question`s.

Layouts, told by their fields; the first that fits counts:

    verl      prompt: [{role, content}], reward_model: {ground_truth}
    GSM8K     question, answer: a worked solution that ends in "#### 42"
    generic   question | problem | prompt, answer | final_answer | solution; of a solution, its last \boxed{} counts

A number may stand as one: AMC's 27.0 is 27. A list of one answer is that answer, a longer `final_answer` (Olympiad) is
joined by commas. Of verl's messages the one user turn is the question; a system turn is dropped, since run and model
have their own template. Records that are no question are counted under a cause and logged with file and line.
Order: files by name, records as they stand; a hub dataset, whose question column text_field must name, by the seed.
Nothing is deduplicated (verl's one-example files are one question many times), so split by a hash of the text, not of
the id. Left out: the tokenizer, so lengths and special tokens in a text are the caller's; multiple choice; near-
duplicates.

Alone:  python questions.py CONFIG.yaml [key=value ...]   counts, and the first three questions
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.judge import MAX_ANSWER_CHARS
from config import Config, parse_command_line
from prompts import last_answer
from sources import (
    CAUSES,
    SURROGATE,
    DataError,
    Skip,
    hub_records,
    local_files,
    local_records,
    parquet_rows,
    source_path,
)
from words import one_line

TEXT_FIELDS = ("question", "problem", "prompt")
ANSWER_FIELDS = ("answer", "final_answer", "solution")
CHOICE_FIELDS = ("options", "choices")
FIELDS = (*TEXT_FIELDS, *ANSWER_FIELDS, *CHOICE_FIELDS, "reward_model")
QUESTION_CAUSES = {
    "no_question": f"no text in {', '.join(TEXT_FIELDS)}, or a chat that is not one user turn",
    "no_answer": "no answer that can be checked",
    "choices": "multiple choice",
}
INSTRUCTIONS = (  # endings that data sets add to their questions
    "Let's think step by step and output the final answer within \\boxed{}.",
    'Let\'s think step by step and output the final answer after "####".',
    "Please reason step by step, and put your final answer within \\boxed{}.",
)
THOUSANDS = re.compile(r"-?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")


@dataclass
class Question:
    """A task with a gold answer, ready for `check_answers`."""

    id: str  # file and line or row, unique in the source
    text: str
    answer: str


def load_questions(config: Config, log: Callable[[str], None] = print) -> tuple[list[Question], dict[str, int]]:
    """Reads config.data whole (up to max_passages questions): the questions, and how many there are of each cause.

    Every record becomes a question or a counted skip; the first three of a cause are logged with file and line. The
    counts hold `records` (those that could be read), `questions` and each cause that occurred, broken files among them.
    The list is the same on every rank. Raises DataError when the source cannot be read or has no question.
    """
    counts: Counter[str] = Counter()
    problems: list[str] = []
    causes = CAUSES | QUESTION_CAUSES

    def skip(cause: str, where: str, detail: str = "") -> None:
        counts[cause] += 1
        if counts[cause] <= 3:
            line = one_line(f"{where}: skipped, {causes[cause]}" + (f" ({detail})" if detail else ""))
            problems.append(line)
            log(f"data: {line}" + ("; more of these are only counted" if counts[cause] == 3 else ""))

    files = local_files(config, log)
    questions = []
    for where, place, record in hub_records(config) if files is None else _local(files, config, skip):
        counts["records"] += 1
        question = read_question(record, place, where, skip)
        if question:
            questions.append(question)
            if len(questions) == config.max_passages:
                log(one_line(f"data: max_passages={config.max_passages} reached at {where}; nothing further is read"))
                break
    counts["questions"] = len(questions)
    skipped = ", ".join(f"{counts[cause]:,} {cause}" for cause in causes if counts[cause]) or "nothing"
    if not questions:
        first = f"; first problem: {problems[0]}" if problems else ""
        raise DataError(f"no usable question in {config.data}: skipped {skipped}{first}")
    log(one_line(f"data: {len(questions):,} questions of {config.data}; skipped: {skipped}"))
    return questions, dict(counts)


def read_question(record: dict, place: str, where: str, skip: Skip) -> Question | None:
    r"""One record -> a question, or None after a call of skip(cause, where, detail).

    `{"problem": "Solve $2x = 1$.", "solution": r"So $x = \boxed{\frac12}$."}` has the answer `\frac12`.
    """
    names = f"fields are {', '.join(map(str, list(record)[:8]))}"
    if any(record.get(name) for name in CHOICE_FIELDS):
        skip("choices", where)
    elif not (text := question_text(record)):
        skip("no_question", where, names)
    elif not (answer := gold_answer(record)):
        skip("no_answer", where, names)
    elif len(answer) > MAX_ANSWER_CHARS:
        skip("no_answer", where, f"{len(answer)} characters")
    elif SURROGATE.search(text + answer):
        skip("bad_utf8", where, "half of a surrogate pair")
    else:
        return Question(place, text, answer)
    return None


def question_text(record: dict) -> str:
    """The question as it stands, outer white space aside; empty if there is none. verl's prompt goes before others."""
    verl = isinstance(record.get("reward_model"), dict)
    for name in ("prompt", *TEXT_FIELDS) if verl else TEXT_FIELDS:
        value = record.get(name)
        if isinstance(value, list):
            turns = [turn for turn in value if isinstance(turn, dict) and turn.get("role") != "system"]
            one = len(turns) == 1 and turns[0].get("role") == "user"
            value = turns[0].get("content") if one else None
        if isinstance(value, str) and value.strip():
            return value.strip()
    return ""


def extract_gold(text: str) -> str | None:
    r"""The answer of a worked solution: what follows #### on its last line (GSM8K), else its last \boxed{}; else None.

    >>> extract_gold("48 / 2 = <<48/2=24>>24 clips, so 1,024 in all.\n#### 1,024"), extract_gold("A guess: 7.")
    ('1024', None)
    >>> extract_gold(r"#### Step 1" "\n" r"Halving gives $\boxed{\frac{1}{2}}$.")
    '\\frac{1}{2}'
    """
    # cut by hand: a pattern tried at each # of a long line takes quadratic time
    _, _, marked = text.strip().rpartition("\n")[2].partition("####")
    answer = (marked or last_answer(text, "boxed") or "").strip()
    if marked:
        answer = answer.removeprefix("$")
    return (answer.replace(",", "") if THOUSANDS.fullmatch(answer) else answer) or None


def gold_answer(record: dict) -> str:
    r"""What is right, as it would stand in the box; empty if there is nothing to check against.

    >>> gold_answer({"answer": "6 + 4 = 10\n#### 1,000"}), gold_answer({"answer": 27.0}), gold_answer({"answer": "1/2"})
    ('1000', '27', '1/2')
    >>> gold_answer({"final_answer": ["$2$", "3"]}), gold_answer({"solution": "By symmetry, 7."})
    ('$2$, 3', '')
    """
    model = record.get("reward_model")
    if isinstance(model, dict):
        return _gold(model.get("ground_truth"))
    for name in ANSWER_FIELDS:
        value = record.get(name)
        if name == "final_answer" and isinstance(value, list):
            parts = [_gold(part) for part in value]
            answer = ", ".join(parts) if all(parts) else ""
        else:
            answer = _gold(value, only_marked=name == "solution")
        if answer:
            return answer
    return ""


def _gold(value, only_marked: bool = False) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool):
        return ""
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return (str(int(value)) if value.is_integer() else repr(value)) if math.isfinite(value) else ""
    if not isinstance(value, str):
        return ""
    return extract_gold(value) or ("" if only_marked else value.strip())


def strip_instruction(text: str) -> str:
    r"""The question without a data set's own instruction at its end, for a template that brings another.

    >>> strip_instruction("What is 1 + 1? Let's think step by step and output the final answer within \\boxed{}.")
    'What is 1 + 1?'
    """
    for ending in INSTRUCTIONS:
        text = text.removesuffix(ending).rstrip()
    return text


# ---------------------------------------------------------------------------------------------- where records come from


def _local(files: list[Path], config: Config, skip: Skip) -> Iterator[tuple[str, str, dict]]:
    """All of FIELDS of a parquet file, in order; sources.py reads a text column and its keys only, shuffled."""
    top = source_path(config)
    for path in files:
        if path.suffix.lower() == ".parquet" and path.stat().st_size:
            name = one_line(path.name if path == top else path.relative_to(top).as_posix())
            yield from parquet_rows(path, name, FIELDS, FIELDS, "no_question", skip)
        else:
            yield from local_records([path], config, skip)


def main() -> None:
    """Counts the questions of a config and shows three."""
    config = parse_command_line("usage: python questions.py CONFIG.yaml [key=value ...]")
    try:
        questions, counts = load_questions(config)
    except DataError as error:
        raise SystemExit(f"data error: {error}") from None
    print(counts)
    for question in questions[:3]:
        print(f"\n--- {question.id}\n{question.text}\n=> {question.answer}")


if __name__ == "__main__":
    main()
