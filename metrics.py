"""What a step reports, and the run directory that keeps it. Files are written by rank 0.

    config.yaml environment.txt prompts.txt chat_template.json cache/ metrics.jsonl samples.jsonl probes.jsonl
    checkpoints/ report.html

metrics.jsonl has one JSON object per step; row 0 is before training. samples.jsonl has whole rollouts of a few passages
per step, with title and url, as Wikipedia's licence asks; probes.jsonl the responses to a few fixed held-out masks.
Names are `gen/...` for masks, whoever drew them, `pred/...` for predictions. Every rank computes the same metrics.

Alone:  python metrics.py RUN [RUN ...]   a table of runs.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shutil import which
from statistics import fmean

import torch

from config import Config, ConfigError, dump_config
from engine import checks
from engine.batching import describe_attention
from grpo import Group, Sample, bundle, bundle_length, keep_group
from masking import WORD_KINDS, word_spans
from methods import METHODS, Task
from prompts import BOXED_OPENING, CLOSED, MASK_OPENING, START, last_answer, mask_prompt, predict_prompt, scan
from ranks import enter
from rewards import caseless_match
from rollout import Rollout, Sampler
from text.files import hub_commits

RECORDED = "torch transformers liger-kernel flash-attn datasets tokenizers safetensors numpy math-verify".split()


def open_run(config: Config, fresh: bool = True, say=print) -> Path:
    """Make the run directory and write what defines the run. fresh: nothing is continued; an earlier run is then moved
    aside, not written over. A dry run leaves an earlier one as it is.

    Called by rank 0 alone, before the others look. Raises OSError where the folder cannot be written, ConfigError where
    another process writes to it.
    """
    run = Path(config.run_dir)
    if (run / "environment.txt").exists():
        checks.claim(run)
    if fresh and (config.steps or config.resume == "never") and (run / "metrics.jsonl").exists():
        number = next(n for n in range(1, 10**6) if not run.with_name(f"{run.name}.{n}").exists())
        run.rename(run.with_name(f"{run.name}.{number}"))
        say(f"{run}: an earlier run, without a checkpoint to go on from, is now {run}.{number}"
            if config.resume == "auto" else f"{run}: the earlier run is now {run}.{number}")  # fmt: skip
    run.mkdir(parents=True, exist_ok=True)
    if config.steps or not (run / "config.yaml").exists():
        write_whole(run / "config.yaml", dump_config(config))
    held = checks.claim(run)
    print(environment() + hub_commits(config), file=held, flush=True)
    return run


def environment() -> str:
    """Command, versions, git revision and hardware, one per line."""
    lines = [f"time: {time.strftime('%Y-%m-%d %H:%M:%S %z')}", f"command: {' '.join(sys.argv)}"]
    lines.append(f"python: {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in RECORDED:
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
    """Append JSON lines. If writing fails, they are kept for the next call and partial lines are removed."""
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

    A last line cut short by a kill is forgotten too. Raises ConfigError for a line that is no row.
    """
    if not path.exists():
        return
    beside, number = path.with_name(path.name + ".part"), 0
    with path.open(encoding="utf-8", newline="\n") as old, beside.open("w", encoding="utf-8", newline="\n") as new:
        try:
            for line in old:
                number += 1
                if line.endswith("\n") and json.loads(line)["step"] <= last_step:
                    new.write(line)
        except (ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"{path}: no row at line {number}; mend or remove it ({error})") from None
    os.replace(beside, path)


@contextmanager
def clock(times: dict, phase: str) -> Iterator[None]:
    """Adds the seconds spent inside to times["time/PHASE"], with the GPU's queue drained. An error there is told with
    the phase's name (ranks.report_error)."""
    enter(phase)
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    times[f"time/{phase}"] = times.get(f"time/{phase}", 0.0) + time.perf_counter() - start
    enter("log")


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
    """Summary of the run: model, device, memory, data, method."""
    parameters = sum(parameter.numel() for parameter in sampler.replica.parameters())
    end = ", ".join(f"{token} {sampler.piece(token)!r}" for token in sorted(sampler.eos_ids))
    steps = f"{config.steps} steps of {config.passages_per_step} passages"
    if METHODS[config.method].generator:
        steps += f" x {config.masks_per_passage} masks x {config.predictions_per_mask} predictions"
    early = " or when its answer closes" if config.stop_at_answer else ""
    early = " or at its closing tag" if METHODS[config.method].opening else early
    return "\n".join(
        (
            f"model {config.model}: {parameters:,} parameters, {config.dtype}, {ranks.world} x {ranks.device.type}",
            f"{describe_attention(sampler.replica)}; prompts: {'chat template' if sampler.frame else 'plain text'}; "
            f"a response ends at {end}{early}",
            f"memory: layers {'recomputed' if config.gradient_checkpointing else 'stored'} for the backward pass"
            + ("; masters, gradients and Adam on the host" if config.offload else ""),
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


def sample_rows(proposals: list[list], step: int) -> Iterator[dict]:
    """One JSON object per Task: its generator response if it has one, its mask and all predictions."""
    for tasks in proposals:
        for task in tasks:
            passage, mask, proposal = task.passage, task.mask, None
            if task.proposal:
                proposal = {"text": task.proposal.text, "finish": task.proposal.finish, "reward": task.proposal_reward}
            yield {
                "step": step,
                "passage": {"id": passage.id, "title": passage.title, "url": passage.url, "text": passage.text},
                "proposal": proposal,
                "mask": {"words": mask.words, "invalid": mask.invalid, "masked": mask.masked, "target": mask.target}
                | {"occurrences": mask.occurrences, "start": mask.start, "label": mask.label},
                "predictions": [
                    {"text": response.text, "finish": response.finish, "correct": correct, "reward": reward}
                    for response, correct, reward in zip(
                        task.predictions, task.correct or [None] * len(task.rewards), task.rewards, strict=True
                    )
                ],
            }


def step_metrics(proposals: list[list[Task]], groups: list[Group], samples: list[Sample], sampler: Sampler) -> dict:
    """proposals: per passage its tasks; groups: both roles, rewarded; samples: what is trained on."""
    config = sampler.config
    tasks = [task for per_passage in proposals for task in per_passage]
    valid = [task for task in tasks if not task.mask.invalid]
    graded = [task for task in valid if task.correct]  # rlp's gains are neither right nor wrong
    responses = [rollout for group in groups for rollout in group.rollouts]
    responses = responses or [sample.rollout for sample in samples]  # given, not sampled
    tokens = sum(len(rollout.completion_ids) for rollout in responses)
    metrics = {
        "reward": mean([reward for group in groups for reward in group.rewards]),
        "surprisal": -sum(sum(rollout.sampler_logprobs) for rollout in responses) / max(1, tokens),
        "responses": len(responses),
        "response_tokens": tokens,
        "flops": step_flops(groups, samples, active_parameters(sampler.replica), config),
    }
    metrics |= role_metrics("gen", [group for group in groups if group.role == "gen"], sampler, MASK_OPENING)
    metrics |= role_metrics("pred", [group for group in groups if group.role == "pred"], sampler, BOXED_OPENING)
    authored = [[task for task in per_passage if task.proposal] for per_passage in proposals]
    metrics |= mask_metrics(list(filter(None, authored)) or proposals)  # without masks by rule beside the generator's
    answers = [(last_answer(one.text, "boxed"), task.mask.target) for task in graded for one in task.predictions]
    metrics["pred/valid_rate"] = mean([answer is not None for answer, _ in answers])
    accuracies = [task.accuracy for task in graded]
    histogram = Counter(round(accuracy * config.predictions_per_mask) for accuracy in accuracies)
    metrics |= {
        "pred/accuracy": mean(accuracies),
        "pred/accuracy_caseless": mean([caseless_match(*pair) for pair in answers]),
        "pred/accuracy_zero": mean([accuracy == 0 for accuracy in accuracies]),
        "pred/accuracy_one": mean([accuracy == 1 for accuracy in accuracies]),
        # masks with 0, 1, ... predictions_per_mask right answers
        "pred/accuracy_histogram": [histogram[right] for right in range(config.predictions_per_mask + 1)],
    }
    return metrics


def active_parameters(model) -> int:
    """Parameters that a token meets: of experts those that it is sent to."""
    chosen = getattr(model.config, "num_experts_per_tok", 1) / getattr(model.config, "num_experts", 1)
    sizes = ((".experts." in name, parameter.numel()) for name, parameter in model.named_parameters())
    return round(sum(size * chosen if expert else size for expert, size in sizes))


def step_flops(groups: list[Group], samples: list[Sample], parameters: int, config: Config) -> float:
    """2 N a token read or sampled (a group's prompt is read once), 6 N a token trained (a prompt once, if shared);
    attention, the frozen copy and recomputation not counted."""
    sampled = sum(
        len(group.rollouts[0].prompt_ids) + sum(len(one.completion_ids) for one in group.rollouts) for group in groups
    )
    trained = sum(bundle_length(one) for one in bundle(samples, config))
    return 2.0 * parameters * sampled + 6.0 * parameters * trained * config.updates_per_batch


def role_metrics(role: str, groups: list[Group], sampler: Sampler, opening: str) -> dict:
    """Reward, length and truncation of one role's responses. Lengths in tokens, the others are means or shares."""
    responses = [rollout for group in groups for rollout in group.rollouts]
    lengths = [len(rollout.completion_ids) for rollout in responses]
    return {
        f"{role}/reward": mean([reward for group in groups for reward in group.rewards]),
        f"{role}/groups_kept": mean([keep_group(group) for group in groups]),
        f"{role}/responses": len(responses),
        f"{role}/length_mean": mean(lengths),
        f"{role}/length_max": max(lengths, default=0),
        f"{role}/truncated": mean([rollout.finish == "length" for rollout in responses]),
        f"{role}/tokens_after_answer": mean([tokens_after_answer(one, sampler, opening) for one in responses]),
    }


def mask_metrics(proposals: list[list[Task]]) -> dict:
    """What the generator chooses. Shares and means are over valid masks, causes over all responses; top_word_share is
    the share of a step's masks that name the same words: near 1, both roles have agreed on an answer."""
    valid = [task for tasks in proposals for task in tasks if not task.mask.invalid]
    proposed = sum(map(len, proposals))
    metrics = {
        "gen/valid_rate": len(valid) / max(1, proposed),
        "gen/distinct": mean([len({t.mask.words for t in tasks if not t.mask.invalid}) for tasks in proposals]),
        "gen/span_words": mean([len(word_spans(task.mask.target)) for task in valid]),
        "gen/occurrences": mean([task.mask.occurrences for task in valid]),
        "gen/top_word_share": max(Counter(task.mask.words for task in valid).values(), default=0) / max(1, len(valid)),
    }
    causes = Counter(task.mask.invalid for tasks in proposals for task in tasks if task.mask.invalid)
    metrics |= {f"gen/invalid_{cause}": count / proposed for cause, count in sorted(causes.items())}
    labelled = [task.mask.label for task in valid if task.mask.label]
    stand = {label for task in valid if task.mask.label for label in task.passage.labels or WORD_KINDS}
    metrics |= {f"gen/share_{label}": labelled.count(label) / len(labelled) for label in sorted(stand)}
    return metrics


def tokens_after_answer(rollout: Rollout, sampler: Sampler, opening: str) -> int:
    """Tokens that a response went on for after its first answer had closed; end-of-sequence not counted."""
    if rollout.finish == "answer" or opening not in rollout.text:
        return 0
    state = START
    for number, token in enumerate(rollout.completion_ids):
        state = scan(state, sampler.piece(token), opening)
        if state == CLOSED:
            return len(rollout.completion_ids) - number - 1 - (rollout.finish == "eos")
    return 0


def mean(values: list) -> float:
    """0 for nothing: a step whose masks are all invalid still has its row."""
    return fmean(values) if values else 0.0


def agreement_warning(rows: list[dict]) -> str:
    """A line where training accuracy has risen by 0.2 and the held-out probe by less than a tenth of it, else "". rows:
    those of metrics.jsonl, up to one with a probe. The first and last five steps with predictions are compared."""
    begin = next(n for n, row in enumerate(rows) if n and row["method"] == rows[-1]["method"]) if len(rows) > 1 else 0
    steps = [row["pred/accuracy"] for row in rows[begin:] if row.get("pred/responses")]  # not those of a warm-up
    probes = [row["probe/accuracy"] for row in rows[max(0, begin - 1) :] if "probe/accuracy" in row]
    rise = mean(steps[-5:]) - mean(steps[:5]) if len(steps) >= 10 else 0.0
    if rise < 0.2 or len(probes) < 2 or max(probes[1:]) - probes[0] >= rise / 10:
        return ""
    return (
        f"WARNING: training accuracy rose from {mean(steps[:5]):.2f} to {mean(steps[-5:]):.2f}, held-out accuracy "
        f"hardly ({probes[0]:.3f} to {probes[-1]:.3f}): not the skill, the masks may have changed; both roles may have "
        f"agreed on an answer (gen/top_word_share {rows[-1].get('gen/top_word_share', 0.0):.2f})"
    )


def step_line(row: dict, steps: int) -> str:
    """One line of the terminal, with what the step's method has to say."""
    parts = [f"step {row['step']:>{len(str(steps))}}/{steps}"]
    if METHODS[row["method"]].predict is None:
        parts[0] += f"  loss {row.get('loss', 0.0):.3f} on {row['trained_tokens']} tokens"
    else:
        parts[0] += f"  reward {row['reward']:.3f}"
    if row["gen/responses"]:
        valid, length = row["gen/valid_rate"], row["gen/length_mean"]
        top = row["gen/top_word_share"]
        parts.append(f"gen {row['gen/reward']:.3f} valid {valid:.2f} top {top:.2f} len {length:.0f}")
    if row["pred/responses"]:
        zero, one, length = row["pred/accuracy_zero"], row["pred/accuracy_one"], row["pred/length_mean"]
        graded = sum(row["pred/accuracy_histogram"])  # rlp's thoughts are neither right nor wrong
        right = f"{row['pred/accuracy']:.3f} (0: {zero:.2f} 1: {one:.2f}) " if graded else ""
        parts.append(f"pred {right}len {length:.0f}")
    if row["trained_tokens"]:
        parts.append(f"entropy {row['entropy']:.2f} grad {row['grad_norm']:.2f} mismatch {row['mismatch_kl']:.1e}")
    else:
        parts.append("NOTHING TRAINED: " + ("no contrast in rewards" if row["responses"] else "no valid mask"))
    return " | ".join([*parts, f"{row['time/step']:.1f} s"])


def summary_table(rows: list[dict]) -> str:
    """Before and after: the first and last probe, benchmarks too; training metrics over the first and last 20 steps."""
    steps = [row for row in rows if "reward" in row]
    lines = []
    for prefix, title in (("probe/", "held-out passages, fixed masks"), ("eval/", "benchmarks, greedy; scores in %")):
        told = [row for row in rows if any(key.startswith(prefix) for key in row)]
        if told:
            first, last = told[0], told[-1]
            heads = [f"step {row['step']}" for row in (first, last)]
            lines.append(f"{title:40} {heads[0]:>10} {heads[1]:>10}")
            for key in sorted(key for key in last if key.startswith(prefix)):
                lines.append(f"  {key:38} {first.get(key, float('nan')):10.3f} {last[key]:10.3f}")
    if steps:
        early, late = steps[:20], steps[-20:]
        span = [f"{part[0]['step']}-{part[-1]['step']}" for part in (early, late)]
        lines.append(f"{'training, mean over steps':40} {span[0]:>10} {span[1]:>10}")
        wanted = ["reward", "gen/reward", "gen/valid_rate", "pred/accuracy", "pred/groups_kept", "entropy", "surprisal"]
        wanted += sorted({key for row in steps for key in row if key.startswith("gen/share_")})
        for key in [key for key in wanted if any(row.get(key) for row in steps)]:
            values = [fmean([row[key] for row in part if key in row] or [float("nan")]) for part in (early, late)]
            lines.append(f"  {key:38} {values[0]:10.3f} {values[1]:10.3f}")
    return "\n".join(lines)


def compare(folders: list[str]) -> str:
    """A table of runs: what each spent and where its probe ended, start in the first line."""
    keys = ("accuracy_fact", "accuracy_greedy_fact", "accuracy_template", "accuracy_copy", "accuracy_noise")
    keys = {"accuracy": "sampled", "accuracy_greedy": "greedy"} | {key: key.removeprefix("accuracy_") for key in keys}
    head = f"{'run':24} {'step':>5} {'responses':>10} {'tokens':>10} {'FLOPs':>9}  "
    lines = [head + " ".join(f"{name:>11}" for name in keys.values())]
    for number, folder in enumerate(folders):
        rows = read_rows(Path(folder) / "metrics.jsonl")
        if not rows:
            raise SystemExit(f"{folder}: no metrics.jsonl")
        spent = [sum(row.get(key, 0) for row in rows) for key in ("responses", "response_tokens", "flops")]
        probed = [row for row in rows if "probe/accuracy" in row]
        for name, row in ((("start", probed[0]),) if number == 0 else ()) + ((Path(folder).name, probed[-1]),):
            counts = spent if name != "start" else [0, 0, 0]
            lines.append(
                f"{name:24} {row['step']:5} {counts[0]:10,} {counts[1]:10,} {counts[2]:9.2g}  "
                + " ".join(f"{row.get('probe/' + key, float('nan')):11.3f}" for key in keys)
            )
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("usage: python metrics.py RUN [RUN ...]")
    print(compare(sys.argv[1:]))
