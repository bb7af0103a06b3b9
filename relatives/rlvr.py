r"""rlvr: questions with gold answers, checked by math-verify. Benchmarks read their gold answers here, too.

Records of three kinds: verl (prompt: [{role, content}], reward_model: {ground_truth}); GSM8K (answer ends in
"#### 42"); generic (question | problem | prompt, answer | final_answer | solution, of which the last \boxed{} counts).
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from benchmarks.judge import MAX_ANSWER_CHARS, check_answers
from config import Config, one_line
from data import SURROGATE, Corpus, Passage, is_heldout
from masking import Mask
from prompts import last_answer
from ranks import Ranks, gather
from text.files import DataError, Skip, Tally, file_records, hub_records, local_files

if TYPE_CHECKING:  # methods.py imports this file
    from methods import Run, Task

GROUPED_DIGITS = re.compile(r"-?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
TEXT_FIELDS = ("question", "problem", "prompt")
ANSWER_FIELDS = ("answer", "final_answer", "solution")
CHOICE_FIELDS = ("options", "choices")
FIELDS = (*TEXT_FIELDS, *ANSWER_FIELDS, *CHOICE_FIELDS, "reward_model")
INSTRUCTIONS = (  # endings that data sets add to their questions
    "Let's think step by step and output the final answer within \\boxed{}.",
    'Let\'s think step by step and output the final answer after "####".',
    "Please reason step by step, and put your final answer within \\boxed{}.",
)


def load_questions(config: Config, log: Callable[[str], None] = print) -> tuple[list[Passage], dict[str, int]]:
    """The questions of config.data, up to max_passages, the same on every rank; and counts: `records` (those that could
    be read), `questions` and each cause of a skip that occurred. Raises DataError when there is no question."""
    tally, questions, files = Tally(log), [], local_files(config, log)
    if files is None:
        records = hub_records(config.data, config.data_config, seed=config.seed)
    else:
        records = file_records(files, config, tally.skip, FIELDS, ("no_question", FIELDS))
    for where, place, record in records:
        tally.counts["records"] += 1
        if question := read_question(record, place, where, tally.skip):
            questions.append(question)
            if len(questions) == config.max_passages:
                log(one_line(f"data: max_passages={config.max_passages} reached at {where}; nothing further is read"))
                break
    tally.counts["questions"] = len(questions)
    if not questions:
        raise DataError(f"no usable question in {config.data}: skipped {tally.skipped()}{tally.first_problem}")
    log(one_line(f"data: {len(questions):,} questions of {config.data}; skipped: {tally.skipped()}"))
    return questions, dict(tally.counts)


def read_question(record: dict, place: str, where: str, skip: Skip) -> Passage | None:
    r"""One record -> a question, or None after a call of skip(cause, where, detail). The answer of
    `{"problem": "Solve $2x = 1$.", "solution": r"So $x = \boxed{\frac12}$."}` is `\frac12`."""
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
        return Passage(place, "", "", text, answer=answer)
    return None


def question_text(record: dict) -> str:
    """The question as it stands, outer white space aside; empty if there is none. verl's prompt goes before others."""
    verl = isinstance(record.get("reward_model"), dict)
    for name in ("prompt", *TEXT_FIELDS) if verl else TEXT_FIELDS:
        value = record.get(name)
        if isinstance(value, list):  # a chat: its one user turn
            turns = [turn for turn in value if isinstance(turn, dict) and turn.get("role") != "system"]
            value = turns[0].get("content") if [turn.get("role") for turn in turns] == ["user"] else None
        if isinstance(value, str) and value.strip():
            return value.strip()
    return ""


def gold_answer(record: dict) -> str:
    r"""What is right, as it would stand in the box; empty if there is nothing to check against.

    >>> gold_answer({"answer": "6 + 4 = 10\n#### 1,000"}), gold_answer({"answer": 27.0}), gold_answer({"answer": "1/2"})
    ('1000', '27', '1/2')
    >>> gold_answer({"final_answer": ["$2$", "3"]}), gold_answer({"solution": "By symmetry, 7."})
    ('$2$, 3', '')
    """
    if isinstance(model := record.get("reward_model"), dict):
        return _gold(model.get("ground_truth"))
    for name in ANSWER_FIELDS:
        value = record.get(name)
        several = value if name == "final_answer" and isinstance(value, list) else [value]
        parts = [_gold(part, only_marked=name == "solution") for part in several]
        if parts and all(parts):
            return ", ".join(parts)
    return ""


def _gold(value, only_marked: bool = False) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value) if abs(value) < math.inf else ""  # not for nan either
    if not isinstance(value, str):
        return ""
    return extract_gold(value) or ("" if only_marked or value.rstrip().endswith("####") else value.strip())


def extract_gold(text: str) -> str | None:
    r"""The answer of a worked solution: what follows #### on its last line (GSM8K), else its last \boxed{}; else None.

    >>> extract_gold("48 / 2 = <<48/2=24>>24 clips, so 1,024 in all.\n#### 1,024"), extract_gold("A guess: 7.")
    ('1024', None)
    >>> extract_gold(r"#### Step 1" "\n" r"Halving gives $\boxed{\frac{1}{2}}$.")
    '\\frac{1}{2}'
    """
    # cut by hand: a pattern tried at each # of a long line takes quadratic time
    marked = text.strip().rpartition("\n")[2].partition("####")[2]
    answer = marked.strip().removeprefix("$") if marked else (last_answer(text, "boxed") or "").strip()
    return (answer.replace(",", "") if GROUPED_DIGITS.fullmatch(answer) else answer) or None


def strip_instruction(text: str) -> str:
    r"""The question without a data set's own instruction at its end, for a template that brings another.

    >>> strip_instruction("What is 1 + 1? Let's think step by step and output the final answer within \\boxed{}.")
    'What is 1 + 1?'
    """
    for ending in INSTRUCTIONS:
        text = text.removesuffix(ending).rstrip()
    return text


def question_corpus(config: Config, log=print) -> Corpus:
    """The questions of config.data as passages with an answer, split by a hash of their text. Every rank reads them.
    Raises DataError when there is no question on one of the sides."""
    questions, counts = load_questions(config, log)
    train, heldout = [], []
    for question in (replace(one, text=strip_instruction(one.text)) for one in questions):
        (heldout if is_heldout(question.text, config.heldout) else train).append(question)
    if not train or not heldout:
        raise DataError(f"{config.data}: {len(train)} questions to train on, {len(heldout)} held out; change heldout")
    return Corpus(train, heldout, {**counts, "train": len(train), "heldout": len(heldout)})


def verify_predictions(
    answers: list[list[str | None]], golds: list[str], config: Config, ranks: Ranks
) -> list[list[float]]:
    """math-verify's verdict on every answer, 1 or 0; each rank checks its share of the questions in a child process."""
    mine = list(zip(golds, answers, strict=True))[ranks.rank :: ranks.world]
    pairs = [(gold, answer) for gold, group in mine for answer in group]
    verdicts = iter(check_answers(pairs, config.verify_seconds))
    parts = gather([[[next(verdicts) for _ in group] for _, group in mine]])
    return [parts[number % ranks.world][number // ranks.world] for number in range(len(golds))]


def grade_by_maths(run: Run, tasks: list[Task]) -> None:
    """`rlvr`: right or wrong by math-verify."""
    answers = [[last_answer(response.text, "boxed") for response in task.predictions] for task in tasks]
    verdicts = verify_predictions(answers, [task.mask.target for task in tasks], run.config, run.ranks)
    for task, group in zip(tasks, verdicts, strict=True):
        task.correct = [int(right) for right in group]


def question_masks(run: Run, question: Passage, count: int, rng: random.Random) -> list[Mask]:
    """`rlvr`: the question as the masked text, its gold answer as the target."""
    return [Mask(question.answer, masked=question.text, target=question.answer, occurrences=1)]
