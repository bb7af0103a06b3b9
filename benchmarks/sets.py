r"""The benchmarks of the paper: where their items come from, how they are asked, how a response is judged.

A benchmark of the three kinds (maths, a letter, a text by BBEH's rules) is a row of BENCHMARKS. A new kind needs its
prompt in PROMPTS, its gold answer in `read_item` and its verdict in `judge`.

Items come from the hub or from a local copy: jsonl, a JSON array, {"examples": [...]}, parquet, each also in a folder
(a hub download; BBEH's repository, one task.json per task). Every record is an item or a counted skip; a file that is
broken or lacks a field is an error. The last balanced \boxed{} is judged. AIME's 000 to 999 are numbers: 073 is 73.
"""

import hashlib
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.judge import MAX_ANSWER_CHARS, check_answers, fuzzy_match, guessed_letter, option_letter
from benchmarks.judge import last_number as number_in
from config import Config, ConfigError
from data import SURROGATE
from prompts import QUESTION_PROMPT, last_answer
from relatives.rlvr import gold_answer
from text.files import CAUSES, DataError, Skip, file_records, hub_records, local_files

CHOICE_PROMPT = r"""{passage}

Reason step by step, and put only the letter of the right option in \boxed{...}.

Reasoning:"""
PUZZLE_PROMPT = r"""{passage}

Reason step by step, and put only the final answer in \boxed{...}, without words around it. Where options have letters, the final answer is the letter.

Reasoning:"""  # noqa: E501
Names = str | tuple[str, ...]


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark is, and the fields of its records (of several names, the first that has a value)."""

    hub: str
    subset: str  # the hub dataset's configuration; empty if it has but one
    split: str
    kind: str  # maths, choice (an option's letter) or bbeh (text, by BBEH's rules)
    question: Names
    answer: Names
    options: str = ""
    samples: int = 1  # responses per item: 1 greedy; 32 at temperature 1.0 for a set that is too small for one


LETTERS = ("answer_letter", "answer")
# Hub names with splits and fields were checked on pages and in code that reads them, not by loading: OlympiadBench on
# the hub has 674 of the 675 items. SuperGPQA without answer_letter: options in the question, answer "B. text".
BENCHMARKS = {
    "mmlu_pro": Benchmark("TIGER-Lab/MMLU-Pro", "", "test", "choice", "question", "answer", "options"),
    "supergpqa": Benchmark("m-a-p/SuperGPQA", "", "train", "choice", "question", LETTERS, "options"),
    "bbeh": Benchmark("BBEH/bbeh", "", "train", "bbeh", "input", "target"),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "", "test", "maths", "problem", "answer"),
    "gsm8k": Benchmark("openai/gsm8k", "main", "test", "maths", "question", "answer"),
    "olympiad": Benchmark("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", "maths", "question", "final_answer"),
    "minerva": Benchmark("math-ai/minervamath", "", "test", "maths", ("problem", "question"), ("answer", "solution")),
    "amc23": Benchmark("math-ai/amc23", "", "test", "maths", ("problem", "question"), "answer", samples=32),
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "", "train", "maths", "problem", ("answer", "solution"), samples=32),
    "aime25": Benchmark("math-ai/aime25", "", "test", "maths", ("problem", "question"), "answer", samples=32),
}
PROMPTS = {"maths": QUESTION_PROMPT, "choice": CHOICE_PROMPT, "bbeh": PUZZLE_PROMPT}
ID_FIELDS = ("id", "question_id", "uuid", "unique_id", "idx")
SKIPS = CAUSES | {"no_question": "no text in the question", "no_options": "not 2 to 26 options"}
OPTIONS_INSIDE = re.compile(r"\s*\n\s*Options are:\s*\n(?=A\. )")


@dataclass
class Item:
    """A question ready to be asked."""

    id: str  # its own id if the set has distinct ones, else the record's number, from 1; for BBEH after the task
    question: str  # what fills {passage} of the prompt, lettered options included
    gold: str  # maths: what stands in the box; choice: a letter; bbeh: the target
    letters: str = ""  # choice: the letters of the options, "ABCD" for four


@dataclass
class Verdict:
    """A judged response. how: where the answer was found (box, last_number, guess or none). score: 1.0 if right."""

    answer: str | None
    how: str
    score: float


def load_items(name: str, path: str = "", limit: int = 0, log: Callable = print) -> tuple[list[Item], dict, str]:
    """(items, counts, fingerprint) of a benchmark.

    path: a local copy, file or folder; empty for the hub. limit: that many items, evenly spread, always the same ones;
    0 for all. Counts are of the whole set: `records` = `items` + each cause of a skip. The fingerprint (16 hex digits
    of a sha256 over id, question and gold) is of the items returned. Raises ConfigError for an unknown name, DataError
    (one line) for a source that cannot be read, is broken, has no item, or lacks a field.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"task={name!r}: unknown benchmark; known: {', '.join(BENCHMARKS)}")
    row, counts, problems = BENCHMARKS[name], Counter(records=0), list[str]()

    def skip(cause: str, where: str, detail: str = "") -> None:
        counts[cause] += 1
        if counts[cause] <= 3:
            problems.append(f"{where}: skipped, {SKIPS[cause]}" + (f" ({detail})" if detail else ""))
            log(f"{name}: {problems[-1]}" + ("; more of these are only counted" if counts[cause] == 3 else ""))

    items, numbers, records = [], [], Counter[str]()
    for where, task, record in _records(path, row, log):
        records[task] += 1
        prefix = f"{task}/" if task else ""
        if item := read_item(record, row, where, skip):
            numbers.append(f"{prefix}{records[task]}")
            item.id = prefix + item.id if item.id else numbers[-1]
            items.append(item)
    if not items:
        raise DataError("; ".join([f"{name}: no item in {path or row.hub}", *problems[:1]]))
    if len({item.id for item in items}) < len(items):
        log(f"{name}: ids repeat in {path or row.hub}; items are numbered instead")
        for item, number in zip(items, numbers, strict=True):
            item.id = number
    counts.update(records=records.total(), items=len(items))
    if 0 < limit < len(items):
        items = [items[number * len(items) // limit] for number in range(limit)]
    text = json.dumps([[item.id, item.question, item.gold] for item in items])
    return items, dict(counts), hashlib.sha256(text.encode()).hexdigest()[:16]


def prompt_template(name: str) -> str:
    """The prompt of a benchmark, with one {passage} for the question."""
    return PROMPTS[BENCHMARKS[name].kind]


def read_item(record: dict, row: Benchmark, where: str, skip: Skip) -> Item | None:
    r"""One record -> an item, its id empty if it has none; or None after a call of skip(cause, where, detail). Raises
    DataError when a field is missing. `{"question": "Which gas?", "options": ["argon", "neon"], "answer": "B"}` asks
    `"Which gas?\nOptions are:\nA. argon\nB. neon"`."""
    (_, question), (name, answer) = _field(record, row.question, where), _field(record, row.answer, where)
    if not isinstance(question, str) or not question.strip():
        return skip("no_question", where)
    own_id = next((record[name] for name in ID_FIELDS if isinstance(record.get(name), str | int)), "")
    item = Item(str(own_id), question.strip(), "")
    if row.kind == "choice":
        options = _options(record, item, row, where)
        if not 2 <= len(options) <= 26:
            return skip("no_options", where)
        item.letters = string.ascii_uppercase[: len(options)]
        item.question += "\nOptions are:\n" + "\n".join(map(". ".join, zip(item.letters, options, strict=True)))
        # "B", or "B. text" as among the options. MMLU-Pro's answer_index is not used: it is wrong in item 3983.
        letter, *text = str(answer).strip().split(". ", 1)
        known = len(letter) == 1 and letter in item.letters
        item.gold = letter if known and (not text or options[ord(letter) - ord("A")] == text[0].strip()) else ""
    elif row.kind == "bbeh":
        item.gold = str(answer).strip() if isinstance(answer, str | int | float) else ""
    else:
        item.gold = gold_answer({"solution" if name == "solution" else "final_answer": answer})
    if not item.gold or len(item.gold) > MAX_ANSWER_CHARS:
        return skip("no_answer", where, repr(answer)[:80])
    if SURROGATE.search(item.id + item.question + item.gold):
        return skip("bad_utf8", where, "half of a surrogate pair")
    return item


def _field(record: dict, names: Names, where: str) -> tuple[str, object]:
    """Name and value of the first of these fields that has a value; the last name and None if none has."""
    names = (names,) if isinstance(names, str) else names
    if not any(name in record for name in names):
        raise DataError(f"{where}: no field {' or '.join(map(repr, names))}; fields are {', '.join(map(str, record))}")
    return next(((name, record[name]) for name in names if record.get(name) not in (None, "", [])), (names[-1], None))


def _options(record: dict, item: Item, row: Benchmark, where: str) -> list[str]:
    """The texts of the options, empty if there are none; cuts them off the question if they stand in it."""
    inside = OPTIONS_INSIDE.split(item.question, maxsplit=1)
    if len(inside) == 2 and row.options not in record:
        item.question, options = inside[0], [inside[1].removeprefix("A. ")]
        for letter in string.ascii_uppercase[1:]:  # an option may have several lines: look for the next letter only
            if f"\n{letter}. " not in options[-1]:
                break
            options[-1:] = options[-1].split(f"\n{letter}. ", 1)
        return [option.strip() for option in options]
    _, options = _field(record, row.options, where)
    options = [str(option).strip() for option in options] if isinstance(options, list) else []
    while options and options[-1] == "N/A":  # fillers, which MMLU-Pro's own evaluation drops too
        options.pop()
    return options


def _records(path: str, row: Benchmark, log: Callable[[str], None]) -> Iterator[tuple[str, str, dict]]:
    """(where, task, record) of the hub or of a local copy: of a folder its task.json files, or those named after the
    split, or its only file."""

    def refuse(cause: str, where: str, detail: str = "") -> None:
        raise DataError(f"{where}: {CAUSES[cause]}" + (f" ({detail})" if detail else ""))

    if not path:
        for where, _, record in hub_records(row.hub, row.subset, row.split):
            yield where, str(record.get("task") or ""), record
        return
    config = Config(data=path, data_config=row.subset)
    files = local_files(config, log)
    if files is None:
        raise DataError(f"{path}: no such file or folder")
    files = [file for file in files if not file.name.lower().removesuffix(".gz").endswith(".txt")]
    named = [file for file in files if file.name == "task.json"]
    named = named or [file for file in files if re.match(rf"{row.split}[-._]", file.name)]
    if not files:
        raise DataError(f"{path}: no .parquet, .jsonl or .json file")
    if len(files) > 1 and not named:
        raise DataError(f"{path}: {len(files)} files, none named after split {row.split!r}; give one of them")
    for file in named or files:
        task = file.parent.name if file.name == "task.json" else ""  # in BBEH's repository the folder has its name
        for where, _, record in file_records([file], config, refuse):
            yield where, str(record.get("task") or task), record


def judge(
    name: str, items: list[Item], texts: list[str], last_number: bool = False, guess: bool = False
) -> list[Verdict]:
    """The verdict on each response; items and texts aligned, an item once per sample.

    last_number: in maths, without a box, the last number of the text counts. guess: for choices, without a letter of
    the options, one that depends on the item's id alone. Both lift a base model's score, the guess by a tenth on ten
    options. An answer that keeps sympy busy takes up to 5 s (verify.py).
    """
    kind = BENCHMARKS[name].kind
    answers = []
    for item, text in zip(items, texts, strict=True):
        answer, how = (last_answer(text, "boxed") or "").strip(), "box"
        answer = option_letter(answer, item.letters) if kind == "choice" else answer
        if not answer and kind == "choice" and guess:
            answer, how = guessed_letter(item.id, item.letters), "guess"
        if not answer and kind == "maths" and last_number:
            answer, how = number_in(text), "last_number"
        answers.append((answer, how) if answer else (None, "none"))
    pairs = [(item.gold, answer) for item, (answer, _) in zip(items, answers, strict=True)]
    if kind == "maths":
        scores = check_answers(pairs)
    elif kind == "bbeh":
        scores = [float(answer is not None and fuzzy_match(answer, gold)) for gold, answer in pairs]
    else:
        scores = [float(answer == gold) for gold, answer in pairs]
    return [Verdict(answer, how, score) for (answer, how), score in zip(answers, scores, strict=True)]
