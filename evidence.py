"""The run directory: everything needed to believe, continue or repeat a run. Written by rank 0.

    config.yaml  environment.txt  prompts.txt  cache/  metrics.jsonl  samples.jsonl  probes.jsonl  checkpoints/

metrics.jsonl has one JSON object per step; row 0 is before training. samples.jsonl has whole rollouts of a few passages
per step, with title and url, as Wikipedia's licence asks; probes.jsonl, in the same form, the responses to a few fixed
held-out masks at each probe. Leaves out what the numbers mean (metrics.py) and how they look (report.py).
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shutil import which

import torch

import stopping
from config import Config, dump_config
from model import describe_attention
from sampler import mask_prompt, predict_prompt

PACKAGES = "torch transformers liger-kernel flash-attn datasets tokenizers safetensors numpy math-verify".split()


def open_run(config: Config) -> Path:
    """Make the run directory and write what defines the run. With resume=never an earlier run is moved aside; a dry run
    leaves an earlier one's config as it is.

    Called by rank 0 alone, before the others look. Raises OSError where the folder cannot be written.
    """
    run = Path(config.run_dir)
    if config.resume == "never" and (run / "metrics.jsonl").exists():
        number = next(n for n in range(1, 10**6) if not run.with_name(f"{run.name}.{n}").exists())
        run.rename(run.with_name(f"{run.name}.{number}"))
    run.mkdir(parents=True, exist_ok=True)
    if config.steps or not (run / "config.yaml").exists():
        write_whole(run / "config.yaml", dump_config(config))
    with (run / "environment.txt").open("a", encoding="utf-8") as file:
        file.write(environment() + "\n")
    return run


def environment() -> str:
    """Command, versions, git revision and hardware, one per line."""
    lines = [f"time: {time.strftime('%Y-%m-%d %H:%M:%S %z')}", f"command: {' '.join(sys.argv)}"]
    lines.append(f"python: {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in PACKAGES:
        try:
            lines.append(f"{package}: {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package}: not installed")
    root = Path(__file__).resolve().parent
    commands = {"git": ["rev-parse", "HEAD"], "git changes": ["status", "--porcelain", "-uno"]}
    for name, words in commands.items() if which("git") else ():
        answer = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
        lines.append(f"{name}: {' '.join(answer.stdout.split()) or 'none'}")
    lines.append(f"world size: {os.environ.get('WORLD_SIZE', '1')}")
    if torch.cuda.is_available():
        driver = Path("/proc/driver/nvidia/version")
        kernel = driver.read_text(encoding="utf-8").split("\n")[0] if driver.exists() else "not known"
        lines += [f"cuda: {torch.version.cuda}", f"driver: {kernel}"]
    lines.append(f"device: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'}")
    return "\n".join(lines) + "\n"


def write_whole(path: Path, text: str) -> None:
    """Write beside, then rename: a reader, or a killed run, sees the old file or the new one, never half of it."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


_waiting: dict[Path, tuple[int, str]] = {}
"""Of files that could not be written: their size before, and the lines to come."""


def append_row(path: Path, *rows: dict) -> None:
    """Append JSON lines. Where the disk refuses, they are kept, come first at the next call, and no half line stays."""
    size, lines = _waiting.pop(path, (-1, ""))
    lines += "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not lines:
        return
    try:
        size = size if size >= 0 else path.stat().st_size if path.exists() else 0
        with path.open("ab") as file:
            file.truncate(size)
            file.write(lines.encode("utf-8"))
    except OSError as error:
        _waiting[path] = (size, lines)
        with suppress(OSError):
            os.truncate(path, size)
        print(f"WARNING: {path} CANNOT BE WRITTEN ({error}); its lines are kept and tried again", file=sys.stderr)


def unwritten() -> list[Path]:
    """Files that still lack lines, after another try."""
    for path in list(_waiting):
        append_row(path)
    return list(_waiting)


def log_row(run: Path, row: dict, config: Config) -> None:
    """A row of metrics.jsonl; with `wandb` also to that project of Weights & Biases, which nothing else here needs.

    Each command is a run of its own there: a resumed one stands beside its beginning, under the same name.
    """
    append_row(run / "metrics.jsonl", row)
    if config.wandb:
        import wandb  # only where it is asked for

        if wandb.run is None:
            wandb.init(project=config.wandb, name=run.name, dir=str(run), config=asdict(config))
        wandb.log({key: value for key, value in row.items() if isinstance(value, int | float)}, step=row["step"])


def close_log() -> None:
    """W&B's last rows are sent; train.py leaves without the interpreter's exit, at which it would do that itself."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()


def read_rows(path: Path) -> list[dict]:
    """The rows of a jsonl file; none if it is not there."""
    if not path.exists():
        return []
    # not splitlines: a JSON text may hold U+2028; what follows the last line end is a line cut short
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def keep_rows(path: Path, last_step: int) -> None:
    """Forget rows after `last_step`: the resumed run will make those steps again, and each step stands once.

    A last line cut short by a kill is forgotten too.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        if json.loads(line)["step"] <= last_step:
            kept.append(line + "\n")
    write_whole(path, "".join(kept))


@contextmanager
def clock(times: dict, phase: str) -> Iterator[None]:
    """Adds the seconds spent inside to times["time/PHASE"], with the GPU's queue drained. An error there is told with
    the phase's name (stopping.report)."""
    stopping.enter(phase)
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    times[f"time/{phase}"] = times.get(f"time/{phase}", 0.0) + time.perf_counter() - start
    stopping.enter("log")


_peak = 0.0
"""Largest memory of the GPU before the allocator's own record was last reset, 1e9 bytes."""


def peak_memory_gb() -> float:
    """Largest memory so far in 1e9 bytes: the GPU's allocator on CUDA, else the process's resident set."""
    if torch.cuda.is_available():
        return max(_peak, torch.cuda.max_memory_allocated() / 1e9)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak * (1 if platform.system() == "Darwin" else 1024) / 1e9


@contextmanager
def largest_memory(row: dict) -> Iterator[None]:
    """Sets row["peak_memory_gb"]: on a GPU the largest inside; else the process's largest so far, which cannot be
    reset. For the update, not for rollouts, whose cache takes its share of whatever is free."""
    global _peak
    cuda = torch.cuda.is_available()
    if cuda:
        _peak = peak_memory_gb()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield
    row["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9 if cuda else peak_memory_gb()


def describe(config: Config, ranks, sampler, corpus, probe) -> str:
    """What runs, on what, in the lines that a user would ask for first."""
    parameters = sum(parameter.numel() for parameter in sampler.replica.parameters())
    end = ", ".join(f"{token} {sampler.piece(token)!r}" for token in sorted(sampler.eos_ids))
    steps = f"{config.steps} steps of {config.passages_per_step} passages"
    if config.method == "active":
        steps += f" x {config.masks_per_passage} masks x {config.predictions_per_mask} predictions"
    early = config.stop_at_answer and not sampler.tokenizer.chat_template
    return "\n".join(
        (
            f"model {config.model}: {parameters:,} parameters, {config.dtype}, {ranks.world} x {ranks.device.type}",
            f"{describe_attention(sampler.replica)}; a response ends at {end}"
            + (" or when its answer closes" if early else ""),
            f"memory: layers {'recomputed' if config.gradient_checkpointing else 'stored'} for the backward pass"
            + ("; replica and training state take turns" if config.offload else ""),
            f"data {config.data}: {len(corpus.train):,} passages to train on, {len(corpus.heldout):,} held out, "
            f"{len(probe.masks)} probe masks on {len(probe.passages)} of them",
            "counts: " + ", ".join(f"{name} {count:,}" for name, count in corpus.counts.items()),
            f"method {config.method}; {steps}; seed {config.seed}; everything goes to {config.run_dir}",
        )
    )


def save_prompts(path: Path, sampler, corpus) -> None:
    """Both prompts as the model sees them, special tokens included, for the first passage."""
    text = corpus.train[0].text
    word = text.split()[0]
    prompts = (mask_prompt(sampler, text), predict_prompt(sampler, text.replace(word, "[mask]", 1)))
    write_whole(path, "\n\n=====\n\n".join(sampler.tokenizer.decode(ids) for ids in prompts) + "\n")


def sample_rows(proposals: list[list], config: Config, step: int) -> Iterator[dict]:
    """One JSON object per task (tasks.Task): its generator response if it has one, its mask and all predictions."""
    for tasks in proposals:
        for task in tasks:
            passage, mask, proposal = task.passage, task.mask, None
            if task.proposal:
                proposal = {"text": task.proposal.text, "finish": task.proposal.finish}
                judged = task.rewards or mask.invalid  # the probe's proposals are not
                proposal["reward"] = task.proposal_reward(config.generator_reward) if judged else None
            yield {
                "step": step,
                "passage": {"id": passage.id, "title": passage.title, "url": passage.url, "text": passage.text},
                "proposal": proposal,
                "mask": {"words": mask.words, "invalid": mask.invalid, "masked": mask.masked, "target": mask.target}
                | {"occurrences": mask.occurrences, "start": mask.start, "label": mask.label},
                "predictions": [
                    {"text": response.text, "finish": response.finish, "reward": reward}
                    for response, reward in zip(task.predictions, task.rewards, strict=True)
                ],
            }
