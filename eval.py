"""Measuring a model without training it: the held-out probe, benchmarks during training, and the benchmark command.

    torchrun --nproc_per_node=8 eval.py CHECKPOINT [tasks=gsm8k,math500] [limit=N] [out=DIR] [gsm8k.path=FILE] ...
    python eval.py CHECKPOINT ...                  one process, no torchrun
    python eval.py compare OUT [OUT ...]           evaluations side by side, and the paper's figures

CHECKPOINT: a Hugging Face folder, checkpoints/step_000100 of a run, or a hub name. The command and its keys stand in
benchmarks/evaluate.py.

The probe: training accuracy says little, since the generator moves the masks to where it is low. So a fixed set of
masks, drawn by rule from articles that are never trained on, is answered four ways: sampled and greedy (RL can sharpen
sampling without moving the argmax), with a thought and without (else "reasoning helped" is not shown). Beside it,
perplexity. Where the corpus labels its words, each passage gets one mask per label.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean

from config import Config
from data import Corpus, Passage
from grpo import score
from masking import Mask, labelled_mask, random_span, rank_of
from methods import METHODS, Task, named_masks
from ops import logprobs_of
from prompts import BOXED_OPENING, last_answer, predict_prefix, predict_prompt, question_prompt
from relatives.rlvr import verify_predictions
from rewards import exact_match
from rollout import Sampler, derive_seed, rollout
from text.files import DataError

NO_THOUGHT_TOKENS = 64
"""An answer without a thought need not be longer."""
SHOWN = 4
"""Masks whose responses go to probes.jsonl at each probe; on the mini-wiki all those of one passage."""


@dataclass
class Probe:
    """Fixed for a run: held-out passages and masks on them, the same on every rank."""

    passages: list[Passage]
    masks: list[Mask]
    prompt: Callable
    """predict_prompt, or question_prompt where the passages are questions."""
    sources: list[Passage]
    """The passage of each mask."""
    shown: list[Task] = field(default_factory=list)
    """Of the latest probe: the first masks with their responses, and the masks that the generator proposes for the
    first passage (not answered, so without a reward)."""
    exams: list = field(default_factory=list)
    """Benchmarks (Exam) that are asked beside it, with eval_every."""


def make_probe(corpus: Corpus, sampler: Sampler, config: Config) -> Probe:
    """Draw the probe from the seed: one random span per held-out passage, or one mask per label of labelled words."""
    rng = random.Random(derive_seed(config.seed, "probe"))
    passages = rng.sample(corpus.heldout, min(config.probe_passages, len(corpus.heldout)))
    prompt = question_prompt if passages[0].answer else predict_prompt
    kinds = {label for passage in passages for label in passage.labels or ()}
    pairs: list[tuple[Passage, Mask]] = []
    for passage in passages:
        if passage.answer:  # a question: its text is the masked text
            drawn = [Mask(passage.answer, masked=passage.text, target=passage.answer)]
        elif passage.labels:
            drawn = [labelled_mask(passage, label, config, rng) for label in sorted(kinds, key=rank_of(config))]
        else:
            drawn = [random_span(passage, config, rng)]
        pairs += [(passage, mask) for mask in drawn if mask is not None and not mask.invalid]
    pairs = [pair for pair in pairs if len(prompt(sampler, pair[1].masked)) <= config.max_prompt_tokens]
    if not pairs:
        why = "" if drawn[0] is None else f" ({drawn[0].invalid}, in the last)"
        raise DataError(
            f"{config.data}: no probe mask can be drawn from {len(passages)} held-out passages{why}; "
            "give other text or change max_prompt_tokens, mask_rule, max_occurrences, max_span_words or max_span_chars"
        )
    return Probe(passages, [mask for _, mask in pairs], prompt, [passage for passage, _ in pairs])


def run_probe(probe: Probe, sampler: Sampler, config: Config, step: int) -> dict:
    """Every rank calls it; all get the same numbers. Accuracies are means over masks."""
    metrics: dict = {}
    for thought, suffix in ((True, ""), (False, "_no_thought")):
        prompts = [probe.prompt(sampler, mask.masked, thought) for mask in probe.masks]
        prefix = "" if thought else predict_prefix(config)
        longest = config.max_prediction_tokens if thought else min(NO_THOUGHT_TOKENS, config.max_prediction_tokens)
        for greedy, kind in ((False, ""), (True, "_greedy")):
            name, count = f"accuracy{kind}{suffix}", 1 if greedy else config.probe_samples
            groups = rollout(sampler, prompts, count, longest, BOXED_OPENING, (step, f"probe {name}"), greedy, prefix)
            answers = [[last_answer(prefix + response.text, "boxed") for response in group] for group in groups]
            targets = [mask.target for mask in probe.masks]
            if probe.prompt is question_prompt:
                verdicts = verify_predictions(answers, targets, config, sampler.ranks)
            else:
                pairs = zip(targets, answers, strict=True)
                verdicts = [[exact_match(answer, target) for answer in group] for target, group in pairs]
            scores = [fmean(group) for group in verdicts]
            metrics[f"probe/{name}"] = fmean(scores)
            for label in sorted({mask.label for mask in probe.masks} - {""}):
                chosen = [score for mask, score in zip(probe.masks, scores, strict=True) if mask.label == label]
                metrics[f"probe/{name}_{label}"] = fmean(chosen)
            if thought and not greedy:
                if probe.prompt is predict_prompt:
                    metrics |= thought_use(probe, sampler, groups, verdicts, step)
                metrics["probe/valid_rate"] = fmean(answer is not None for group in answers for answer in group)
                records = list(zip(probe.sources, probe.masks, groups, verdicts, strict=True))[:SHOWN]
                probe.shown = [
                    Task(passage, mask, predictions=group, correct=[int(right) for right in verdict], rewards=verdict)
                    for passage, mask, group, verdict in records
                ]
    if METHODS[config.method].generator and probe.shown:
        rngs = [random.Random(derive_seed(config.seed, "probe masks"))]
        probe.shown += named_masks(sampler, [probe.shown[0].passage], (step, "probe masks"), rngs)[0]
    metrics["probe/perplexity"] = perplexity(sampler, [passage.text for passage in probe.passages])
    return metrics


def thought_use(probe: Probe, sampler: Sampler, groups: list, verdicts: list[list[float]], step: int) -> dict:
    """How much accuracy hangs on the thought. The first thought of each mask gives way to that of the next mask on
    another passage, and the answer behind it is sampled anew; the metric is the accuracy that this costs. Nothing where
    no response thinks. Every rank calls it. groups: Rollouts of each mask; verdicts: 1 or 0 for each."""
    prefix, size, prompts = predict_prefix(sampler.config), len(groups), []
    firsts = [group[0] for group in groups]
    thoughts = ["" if one.finish == "length" else one.text.partition(prefix.strip())[0].rstrip() for one in firsts]
    if not any(thoughts):
        return {}
    for number, mask in enumerate(probe.masks):
        others = (n % size for n in range(number + 1, number + size))
        other = next((n for n in others if probe.sources[n] is not probe.sources[number]), number)
        opened = sampler.tokenizer(thoughts[other] + prefix, add_special_tokens=False).input_ids
        prompts.append(probe.prompt(sampler, mask.masked) + opened)
    longest = min(NO_THOUGHT_TOKENS, sampler.config.max_prediction_tokens)
    swapped = rollout(sampler, prompts, 1, longest, BOXED_OPENING, (step, "probe thought_use"), prefix=prefix)
    answers = [last_answer(prefix + one.text, "boxed") for (one,) in swapped]
    right = [exact_match(answer, mask.target) for answer, mask in zip(answers, probe.masks, strict=True)]
    return {"probe/thought_use": fmean(group[0] for group in verdicts) - fmean(right)}


def perplexity(sampler: Sampler, texts: list[str]) -> float:
    """exp of the mean negative log-prob of the next token of plain text, over all texts; every rank calls it."""
    rows = [ids for ids in sampler.tokenizer(texts).input_ids if 1 < len(ids) <= sampler.config.tokens_per_micro_batch]
    replica = partial(logprobs_of, sampler.replica)
    scores = score(replica, [(ids[:1], ids[1:]) for ids in rows], sampler.config, sampler.ranks)
    return math.exp(-fmean(value for logprobs, _ in scores for value in logprobs))


if __name__ == "__main__":
    from benchmarks.evaluate import main  # the command is a tool: its settings, its chunks, its folder

    main()
