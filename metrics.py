"""What a step reports: numbers from its tasks and groups, for metrics.jsonl and one line in the terminal.

Names are `gen/...` for the generator, `pred/...` for the predictor. Every rank computes them from the same records, so
nothing is communicated. Leaves out the trainer's own numbers (grpo.update) and the probe's.

Alone:  python metrics.py RUN [RUN ...]   a table of runs.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from statistics import fmean

from config import Config
from evidence import read_rows
from grpo import Group, Sample, bundle, bundle_length, keep_group
from masking import LABELS
from prompts import BOXED_OPENING, CLOSED, MASK_OPENING, START, last_answer, scan
from rewards import caseless_match
from sampler import Rollout, Sampler
from tasks import GIVEN, Task


def step_metrics(
    method: str, proposals: list[list[Task]], groups: list[Group], samples: list[Sample], sampler: Sampler
) -> dict:
    """proposals: per passage its tasks; groups: both roles, rewarded; samples: what is trained on."""
    config = sampler.config
    tasks = [task for per_passage in proposals for task in per_passage]
    valid = [task for task in tasks if not task.mask.invalid]
    graded = [task for task in valid if task.rewards and method != "rlp"]  # right or wrong; rlp's gains are neither
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
    if method == "active":  # without the random masks beside the generator's
        proposals = [[task for task in tasks if task.proposal] for tasks in proposals]
    metrics |= mask_metrics(proposals)
    metrics["pred/valid_rate"] = mean(
        [last_answer(rollout.text, "boxed") is not None for task in graded for rollout in task.predictions]
    )
    accuracies = [task.accuracy for task in graded]
    histogram = Counter(round(accuracy * config.predictions_per_mask) for accuracy in accuracies)
    metrics |= {
        "pred/accuracy": mean(accuracies),
        "pred/accuracy_caseless": mean(
            [
                caseless_match(last_answer(rollout.text, "boxed"), task.mask.target)
                for task in graded
                for rollout in task.predictions
            ]
        ),
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
    """What the generator chooses. Shares of labels and means are over valid masks, causes over all responses."""
    valid = [task for tasks in proposals for task in tasks if not task.mask.invalid]
    proposed = sum(map(len, proposals))
    metrics = {
        "gen/valid_rate": len(valid) / max(1, proposed),
        "gen/distinct": mean([len({t.mask.words for t in tasks if not t.mask.invalid}) for tasks in proposals]),
        "gen/span_words": mean([len(task.mask.target.split()) for task in valid]),
        "gen/occurrences": mean([task.mask.occurrences for task in valid]),
    }
    causes = Counter(task.mask.invalid for tasks in proposals for task in tasks if task.mask.invalid)
    metrics |= {f"gen/invalid_{cause}": count / proposed for cause, count in sorted(causes.items())}
    labelled = [task.mask.label for task in valid if task.mask.label]
    stand = {label for task in valid if task.mask.label for label in task.passage.labels}
    metrics |= {f"gen/share_{label}": labelled.count(label) / len(labelled) for label in LABELS if label in stand}
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


def step_line(row: dict, steps: int) -> str:
    """One line of the terminal, with what the step's method has to say."""
    parts = [f"step {row['step']:>{len(str(steps))}}/{steps}"]
    if row["method"] in GIVEN:
        parts[0] += f"  loss {row['loss']:.3f} on {row['trained_tokens']} tokens"
    else:
        parts[0] += f"  reward {row['reward']:.3f}"
    if row["gen/responses"]:
        valid, length = row["gen/valid_rate"], row["gen/length_mean"]
        parts.append(f"gen {row['gen/reward']:.3f} valid {valid:.2f} len {length:.0f}")
    if row["pred/responses"]:
        zero, one, length = row["pred/accuracy_zero"], row["pred/accuracy_one"], row["pred/length_mean"]
        right = "" if row["method"] == "rlp" else f"{row['pred/accuracy']:.3f} (0: {zero:.2f} 1: {one:.2f}) "
        parts.append(f"pred {right}len {length:.0f}")
    parts.append(f"entropy {row['entropy']:.2f} grad {row['grad_norm']:.2f} mismatch {row['mismatch_kl']:.1e}")
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
        for key in wanted:
            values = [mean([row[key] for row in part if key in row]) for part in (early, late)]
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
