"""The command behind eval.py: a checkpoint answers benchmarks, and goes on after a kill.

Keys: `Settings` below, and MODEL_KEYS of config.py. One greedy response to an item, or several at `temperature`.

    OUT/eval-settings.json  eval.json  gsm8k/chunk_00000.jsonl  gsm8k/seconds.jsonl  ...

The settings alone divide the responses into chunks. One rank samples a chunk with noise of its own, judges it, and
writes it beside and renames it. A chunk that is there is not made again, so a killed evaluation goes on where it was.
A chunk comes out the same on any rank: in float32 on a CPU the scores are the same bits for any number of ranks.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch.distributed as dist
from huggingface_hub import resolve_revision
from huggingface_hub.errors import RevisionResolutionError
from tqdm import tqdm

import eval
from benchmarks.exams import Exam, answer, load_exams, parse_tasks, to_the_end
from benchmarks.scores import compare_evaluations, paper_means, summarise, table
from benchmarks.sets import BENCHMARKS, Item
from checkpoint import exported_model
from config import Config, ConfigError, check, command, parse_words, typed
from engine.batching import describe_attention
from engine.checks import try_sampler
from metrics import append_row, environment, peak_memory_gb, read_rows, write_whole
from model import load_replica, load_tokenizer
from prompts import chat_frame
from ranks import Ranks, gather, leave_with, start_ranks
from rollout import derive_seed, make_sampler

MODEL_KEYS = "dtype attention liger use_cuda_graph cache_memory max_requests chat_template stop_at_answer".split()
MODEL_KEYS += "question_prompt temperature seed".split()
MAY_CHANGE = ("cache_memory", "use_cuda_graph")  # when resumed, in case a GPU's memory or graphs failed


@dataclass
class Settings:
    """What is asked, of which checkpoint. All keys but the first two are words `key=value`."""

    checkpoint: str  # local folder with config.json, or a hub name
    engine: Config  # the keys of MODEL_KEYS, and the defaults of all others; its model is the checkpoint
    tasks: dict[str, str]  # by commas, NAME or NAME=FILE (also NAME.path=FILE); all benchmarks if not given
    limit: int = 0  # items of each benchmark, spread over the whole of it; 0: all
    out: str = ""  # folder for records and scores; default evals/NAME of the checkpoint, evals/RUN-step_000100 of a run
    max_new_tokens: int = 8192  # of a response
    samples: int = 0  # responses to each item, one greedy or several sampled; 0: as many as the table says
    last_number: bool = False  # maths without a box: take the last number; lifts base models
    guess: bool = False  # choices without a letter: draw one; lifts base models, by about 10 points on ten options
    chunk: int = 512  # responses; part of the noise; smaller chunks spread better over ranks, larger ones wait less


def read_settings(words: list[str]) -> Settings:
    """Command-line words -> checked settings; no file is opened. Raises ConfigError."""
    if "=" in words[0] and not os.path.exists(words[0]):
        raise ConfigError(f"{words[0]!r}: the first word must be a checkpoint")
    checkpoint, name = checkpoint_folder(words[0])
    values = parse_words(words[1:], "the checkpoint")
    paths = {key: values.pop(key) for key in list(values) if key.endswith(".path")}
    types = {one.name: one.type for one in fields(Config) if one.name in MODEL_KEYS}
    values = typed(values, types | {one.name: one.type for one in fields(Settings)[2:]} | {"tasks": "str"})
    tasks = parse_tasks(values.pop("tasks", ",".join(BENCHMARKS)), paths)
    engine = Config(model=checkpoint, **{key: values.pop(key) for key in MODEL_KEYS if key in values})
    check(engine)
    for key, least in {"limit": 0, "samples": 0, "max_new_tokens": 1, "chunk": 1}.items():
        if values.get(key, least) < least:
            raise ConfigError(f"{key}={values[key]}: must be {least} or more")
    return Settings(checkpoint, engine, tasks, **values | {"out": values.get("out") or f"evals/{name}"})


def checkpoint_folder(word: str) -> tuple[str, str]:
    """(the folder to load, or the hub name as it stands; a name for it). Raises ConfigError."""
    folder = Path(os.path.expanduser(word))
    if not os.path.exists(folder):
        if word.startswith((".", "/", "~")) or word.count("/") != 1:
            raise ConfigError(f"checkpoint {word!r}: no such folder, and not a hub name (owner/name)")
        return word, word.replace("/", "--")
    found = exported_model(folder)
    if not found or not (found / "config.json").is_file() or not any(found.glob("*.safetensors")):
        wanted = "give a Hugging Face folder, a run, or checkpoints/step_NNNNNN of it"
        raise ConfigError(f"checkpoint {word!r}: neither it nor its hf/ holds config.json and weights; {wanted}")
    place = found.resolve()
    step = place.parent if place.name == "hf" else place
    run = f"{step.parents[1].name}-" if step.parent.name == "checkpoints" else ""
    return str(place), run + step.name


def chunk_items(exam: Exam, number: int, size: int) -> list[Item]:
    """The items of a chunk: as many as make `size` responses, at least one; none beyond the last chunk."""
    count = max(1, size // exam.samples)
    return exam.items[number * count : (number + 1) * count]


def chunk_files(exam: Exam, settings: Settings) -> list[Path]:
    """The file of each chunk, in order."""
    count = -(-len(exam.items) // max(1, settings.chunk // exam.samples))
    return [Path(settings.out) / exam.name / f"chunk_{number:05d}.jsonl" for number in range(count)]


def read_chunks(exam: Exam, settings: Settings) -> Iterator[dict]:
    """All records of a benchmark. Raises RuntimeError for a file whose records are not those of its items."""
    for number, path in enumerate(chunk_files(exam, settings)):
        expected = [item.id for item in chunk_items(exam, number, settings.chunk) for _ in range(exam.samples)]
        records = read_rows(path)
        if [record["id"] for record in records] != expected:
            raise RuntimeError(f"{path}: {len(records)} records, not the {len(expected)} of its items; delete it")
        yield from records


def claim(path: Path) -> bool:
    """Whether this rank is the first to take the chunk of `path`: only one rank can create the file beside it."""
    with suppress(FileExistsError):
        path.with_suffix(".claimed").touch(exist_ok=False)
        return True
    return False


def evaluate(settings: Settings, ranks: Ranks) -> None:
    """The whole command, from items to tables; every rank calls it. Raises ConfigError, DataError, RuntimeError."""
    begin, out, config = time.perf_counter(), Path(settings.out), settings.engine
    say = tqdm.write if ranks.rank == 0 else lambda *_: None
    exams = load_exams(settings.tasks, settings.limit, settings.samples, config, say)
    # ---- rank 0 looks at the folder and sends the result to all ranks, so that all do the same work, or end
    (todo,) = gather([open_folder(settings, exams)] if ranks.rank == 0 else [])
    if isinstance(todo, str):
        raise ConfigError(todo)
    chunks = [(exam, *numbered) for exam in exams for numbered in enumerate(chunk_files(exam, settings))]
    sizes = {path: exam.samples * len(chunk_items(exam, number, settings.chunk)) for exam, number, path in chunks}
    tokenizer = load_tokenizer(config)
    (frame,) = gather([chat_frame(tokenizer)] if ranks.rank == 0 else [])  # one, should the template write the time
    sampler = to_the_end(make_sampler(load_replica(config, ranks), tokenizer, config, ranks, frame))
    try_sampler(sampler, [])
    if sampler.config.stop_at_answer != config.stop_at_answer:
        say("stop_at_answer=false: a model with a chat template ends its responses itself; its last box counts")
    context = getattr(sampler.replica.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if settings.max_new_tokens >= context:
        what = f"the model has {context} positions (max_position_embeddings), prompts included"
        raise ConfigError(f"max_new_tokens={settings.max_new_tokens}: {what}; give less")
    gc.collect()
    gc.freeze()  # items never die; the sampler's own garbage collections would walk them every chunk
    asked = ", ".join(f"{exam.name} {len(exam.items)} x {exam.samples}" for exam in exams)
    say(f"{settings.checkpoint}: {sampler.replica.num_parameters():,} parameters, {config.dtype}, {ranks.world} x "
        f"{ranks.device.type}, {describe_attention(sampler.replica)}; items x samples: {asked}")  # fmt: skip
    say(f"{len(todo)} chunks to make, {len(chunks) - len(todo)} are there; everything goes to {out}")

    # ---- each rank takes the next chunk that no rank has taken: some last many times longer than others
    bar = tqdm(total=sum(sizes.values()), desc="responses", disable=None if ranks.rank == 0 else True)
    for exam, number, path in chunks:
        if not bar.disable:  # the files of all ranks
            bar.update(sum(size for path, size in sizes.items() if path.exists()) - bar.n)
        start = time.perf_counter()
        if (exam.name, number) not in todo or not claim(path):
            continue
        items, seed = chunk_items(exam, number, settings.chunk), derive_seed(config.seed, "eval", exam.name, number)
        records = answer(exam, items, sampler, seed, settings.max_new_tokens, settings.last_number, settings.guess,
                         label=f"{exam.name} {number}")  # fmt: skip
        seconds = {"chunk": number, "rank": ranks.rank, "seconds": time.perf_counter() - start}
        append_row(path.with_name("seconds.jsonl"), seconds)
        write_whole(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    gather([])  # all chunks are there
    bar.update(bar.total - bar.n)
    bar.close()
    gc.unfreeze()
    if ranks.rank == 0:
        for path in sizes:
            path.with_suffix(".claimed").unlink(missing_ok=True)
        say(conclude(settings, exams))
        say(f"{out}: done in {time.perf_counter() - begin:.0f} s, largest memory of rank 0 {peak_memory_gb():.2f} GB")


def open_folder(settings: Settings, exams: list[Exam]) -> set[tuple[str, int]] | str:
    """Rank 0: writes eval-settings.json. Returns the chunks to make, as (benchmark, number), or an error message:
    benchmarks may join later; whatever else changes the records may not change."""
    path = Path(settings.out) / "eval-settings.json"
    facts = {key: value for key, value in asdict(settings).items() if key not in ("engine", "tasks", "out")}
    try:
        facts["weights"] = fingerprint(settings)
    except (OSError, ValueError, RevisionResolutionError) as error:
        return f"checkpoint {settings.checkpoint!r}: cannot be read ({_line(error)})"
    facts |= {key: getattr(settings.engine, key) for key in MODEL_KEYS}
    tasks = {exam.name: {key: getattr(exam, key) for key in ("data", "samples", "prompt")} for exam in exams}
    facts["tasks"] = {name: asked | {"path": settings.tasks[name]} for name, asked in tasks.items()}
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        pairs = {key: (facts[key], old.get(key)) for key in facts if key not in ("checkpoint", "tasks", *MAY_CHANGE)}
        for name in facts["tasks"].keys() & old["tasks"].keys():
            new_task, old_task = facts["tasks"][name], old["tasks"][name]
            pairs |= {f"{name}.{key}": (new_task[key], old_task.get(key)) for key in new_task if key != "path"}
        for key, (new, before) in pairs.items():
            if new != before:
                return f"{key}={new!r}: {settings.out} was made with {before!r}; choose another out="
        facts["tasks"] = old["tasks"] | facts["tasks"]
    todo = set()
    for exam in exams:
        (path.parent / exam.name).mkdir(parents=True, exist_ok=True)
        for number, file in enumerate(chunk_files(exam, settings)):
            file.with_suffix(".claimed").unlink(missing_ok=True)  # of a killed evaluation
            todo |= set() if file.exists() else {(exam.name, number)}
    write_whole(path, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    return todo


def fingerprint(settings: Settings) -> str:
    """Identifies weights, tokenizer and template: the commit of a hub name, for a folder sha256 over whole files, since
    a small step in bfloat16 changes few bytes. It costs seconds for some gigabytes, and warms the disk's cache."""
    if not Path(settings.checkpoint).exists():
        return resolve_revision(settings.checkpoint).resolved
    kinds = (".safetensors", ".json", ".jinja", ".model", ".txt")
    files = sorted(path for path in Path(settings.checkpoint).iterdir() if path.suffix in kinds)
    template, sha = Path(settings.engine.chat_template), hashlib.sha256()
    for path in [*files, *([template] if template.is_file() else [])]:
        with path.open("rb") as file:
            sha.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()[:16]


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def conclude(settings: Settings, exams: list[Exam]) -> str:
    """Rank 0, when all chunks are there: writes eval.json, where earlier benchmarks stay. Returns the table."""
    out, target = Path(settings.out), Path(settings.out) / "eval.json"
    facts = json.loads((out / "eval-settings.json").read_text(encoding="utf-8"))
    results = json.loads(target.read_text(encoding="utf-8"))["tasks"] if target.exists() else {}
    for exam in exams:
        rows = read_rows(out / exam.name / "seconds.jsonl")
        seconds = {row["chunk"]: row["seconds"] for row in rows}  # the last time, of a chunk that was made twice
        results[exam.name] = summarise(read_chunks(exam, settings)) | {"seconds": sum(seconds.values())}
        results[exam.name] |= {key: getattr(exam, key) for key in ("data", "samples", "prompt", "counts")}
    results = {name: results[name] for name in BENCHMARKS if name in results}
    means = paper_means(results)
    del facts["tasks"]
    whole = {"checkpoint": settings.checkpoint, "tasks": results, "means": means, "settings": facts}
    whole["environment"] = environment().splitlines()
    write_whole(target, json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    return table(results, means)


def main() -> None:
    words = sys.argv[1:]
    with command(eval.__doc__):
        if words[0] == "compare":
            return print(compare_evaluations(words[1:]))
        settings = read_settings(words)
    ranks = start_ranks(7 * 86400)  # at the end all wait for the longest chunk
    try:
        evaluate(settings, ranks)
    except ConfigError as error:
        leave_with(error)
    dist.destroy_process_group()
