"""Benchmarks as a model is asked them: which, with what prompt, answered and judged; during training and by eval.py."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.scores import summarise
from benchmarks.sets import BENCHMARKS, Item, judge, load_items, prompt_template
from config import Config, ConfigError
from prompts import BOXED_OPENING, encode
from ranks import gather
from rollout import Sampler, generate


@dataclass
class Exam:
    """A benchmark as one model is asked it."""

    name: str
    items: list[Item]
    samples: int
    prompt: str
    """Template with {passage}."""
    data: str
    """Fingerprint of the items."""
    counts: dict[str, int]


def parse_tasks(text: str, paths: dict[str, str] | None = None, key: str = "tasks") -> dict[str, str]:
    """`gsm8k,math500=FILE` -> {"gsm8k": "", "math500": "FILE"}; paths: of words such as gsm8k.path=FILE.

    Raises ConfigError for a benchmark that is unknown or named twice, for none, and for a file that is not there.
    """
    tasks: dict[str, str] = {}
    for word in filter(None, (word.strip() for word in text.split(","))):
        name, _, path = (part.strip() for part in word.partition("="))
        if name not in BENCHMARKS or name in tasks:
            why = "named twice" if name in tasks else f"unknown benchmark; known are {', '.join(BENCHMARKS)}"
            raise ConfigError(f"{key}={text!r}: {name!r}: {why}")
        tasks[name] = path
    for word, path in (paths or {}).items():
        name = word.removesuffix(".path")
        if name not in tasks or tasks[name]:
            why = "has a file already" if name in tasks else f"is not among {key}={text}"
            raise ConfigError(f"{word}={path!r}: {name} {why}")
        tasks[name] = str(path or "")
    if not tasks:
        raise ConfigError(f"{key}={text!r}: name one or more of {', '.join(BENCHMARKS)}")
    for name, path in tasks.items():
        if path and not Path(path).expanduser().exists():
            raise ConfigError(f"{key}: {name}={path}: no such file or folder")
    return tasks


def load_exams(tasks: dict[str, str], limit: int, samples: int, config: Config, log) -> list[Exam]:
    """Every rank reads all items. samples: 0 for the table's. Raises DataError where a source cannot be read."""
    exams = []
    for name, path in tasks.items():
        row = BENCHMARKS[name]
        items, counts, data = load_items(name, path, limit, log)
        # the prompt of rlvr is what a model was trained on; the others ask for a letter, or for a text
        prompt = config.question_prompt if config.question_prompt and row.kind == "maths" else prompt_template(name)
        exams.append(Exam(name, items, samples or row.samples, prompt, data, counts))
    return exams


def to_the_end(sampler: Sampler) -> Sampler:
    """For a model with a chat template, which ends its responses itself: no stop at an answer, the last counts."""
    return replace(sampler, config=replace(sampler.config, stop_at_answer=False)) if sampler.frame else sampler


def answer(
    exam: Exam, items: list[Item], sampler: Sampler, seed: int, max_tokens: int,
    last_number: bool = False, guess: bool = False, label: str = "",
) -> list[dict]:  # fmt: skip
    """A record per response, `exam.samples` in a row for each item; sampled and judged on this rank, no collective."""
    texts = [exam.prompt.replace("{passage}", item.question) for item in items]
    prompts = [encode(sampler.tokenizer, text, frame=sampler.frame) for text in texts]
    # transformers adds the rank to the seed that it is given; the responses must not depend on who makes them
    seed -= sampler.ranks.rank
    groups = generate(
        sampler, prompts, exam.samples, max_tokens, BOXED_OPENING, seed, greedy=exam.samples == 1, label=label
    )
    if not groups:  # a signal to stop: whoever gathers the records raises Stopped
        return []
    asked = [item for item in items for _ in range(exam.samples)]
    responses = [response for group in groups for response in group]
    verdicts = judge(exam.name, asked, [response.text for response in responses], last_number, guess)
    return [
        {"task": exam.name, "id": item.id, "sample": number % exam.samples, "question": item.question}
        | {"gold": item.gold, "response": response.text, "answer": verdict.answer, "how": verdict.how}
        | {"score": verdict.score, "finish": response.finish, "tokens": len(response.completion_ids)}
        for number, (item, response, verdict) in enumerate(zip(asked, responses, verdicts, strict=True))
    ]


def run_exams(exams: list[Exam], sampler: Sampler) -> dict:
    """`eval/gsm8k`, the score in per cent, and its details. Every rank calls it, asks its share, gets all numbers.

    Greedy, so without noise; but batches, and so rounding, depend on the number of ranks.
    """
    metrics, ranks, wanted = {}, sampler.ranks, ("id", "score", "how", "finish", "tokens")
    sampler = to_the_end(sampler)
    for exam in exams:
        mine = exam.items[ranks.rank :: ranks.world]
        records = answer(exam, mine, sampler, 0, sampler.config.max_prediction_tokens, label=f"eval {exam.name}")
        numbers = summarise(gather([{key: record[key] for key in wanted} for record in records]))
        metrics[f"eval/{exam.name}"] = numbers["score"]
        for key in ("standard_error", "parse_rate", "truncation_rate", "length_mean"):
            if numbers[key] is not None:
                metrics[f"eval/{exam.name}_{key}"] = numbers[key]
    return metrics
