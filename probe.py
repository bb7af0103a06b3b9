"""The probe: the same masks on held-out passages before, during and after training.

Training accuracy says little, since the generator moves the masks to where it is low. So a fixed set of masks, drawn by
rule from articles that are never trained on, is answered four ways: sampled and greedy (RL can sharpen sampling without
moving the argmax), with a thought and without (else "reasoning helped" is not shown). Beside it, perplexity.
Where the corpus labels its words, each passage gets one mask per label, and accuracy is also told per label.
The responses to a few of the masks are kept, so that a reader can see how the thoughts of one passage change.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean

from config import Config
from data import Corpus, Passage
from masking import LABELS, Mask, labelled_mask, make_mask, random_span
from model import gather
from prompts import BOXED_OPENING, MASK_OPENING, last_answer
from rewards import exact_match
from rollout import derive_seed, rollout, sequence_logprobs
from sampler import Sampler, mask_prompt, predict_prefix, predict_prompt, question_prompt
from tasks import Task, make_task, verify_predictions

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
    """Benchmarks (exams.Exam) that are asked beside it, with eval_every."""


def make_probe(corpus: Corpus, sampler: Sampler, config: Config) -> Probe:
    """Draw the probe from the seed: one random span per held-out passage, or one mask per label of labelled words."""
    rng = random.Random(derive_seed(config.seed, "probe"))
    passages = rng.sample(corpus.heldout, min(config.probe_passages, len(corpus.heldout)))
    prompt = question_prompt if passages[0].answer else predict_prompt
    pairs: list[tuple[Passage, Mask]] = []
    for passage in passages:
        if passage.answer:  # a question: its text is the masked text
            drawn = [Mask(passage.answer, masked=passage.text, target=passage.answer)]
        elif passage.labels:
            drawn = [labelled_mask(passage, label, config, rng) for label in LABELS]
        else:
            drawn = [random_span(passage, config, rng)]
        pairs += [(passage, mask) for mask in drawn if mask is not None and not mask.invalid]
    pairs = [pair for pair in pairs if len(prompt(sampler, pair[1].masked)) <= config.max_prompt_tokens]
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
            for label in sorted({mask.label for mask in probe.masks} - {""}) if thought else ():
                chosen = [score for mask, score in zip(probe.masks, scores, strict=True) if mask.label == label]
                metrics[f"probe/{name}_{label}"] = fmean(chosen)
            if thought and not greedy:
                metrics["probe/valid_rate"] = fmean(answer is not None for group in answers for answer in group)
                records = list(zip(probe.sources, probe.masks, groups, verdicts, strict=True))[:SHOWN]
                probe.shown = [Task(passage, mask, predictions=g, rewards=r) for passage, mask, g, r in records]
    if config.method == "active" and probe.shown:
        probe.shown += propose_masks(probe.shown[0].passage, sampler, config, step)
    metrics["probe/perplexity"] = perplexity(sampler, [passage.text for passage in probe.passages])
    return metrics


def propose_masks(passage: Passage, sampler: Sampler, config: Config, step: int) -> list[Task]:
    """The masks that the generator now names for one passage: how its taste changes, seen on one text."""
    prompts, noise = [mask_prompt(sampler, passage.text)], (step, "probe masks")
    (group,) = rollout(sampler, prompts, config.masks_per_passage, config.max_mask_tokens, MASK_OPENING, noise)
    rng = random.Random(derive_seed(config.seed, "probe masks"))
    masks = [make_mask(last_answer(response.text, "mask"), passage, config, rng) for response in group]
    return [make_task(passage, mask, sampler, response) for mask, response in zip(masks, group, strict=True)]


def perplexity(sampler: Sampler, texts: list[str]) -> float:
    """exp of the mean negative log-prob of the next token of plain text, over all texts; split over the ranks."""
    mine = [sampler.tokenizer(text).input_ids for text in texts[sampler.ranks.rank :: sampler.ranks.world]]
    scores = [score for row in sequence_logprobs(sampler, mine) for score in row]
    parts = gather([(math.fsum(scores), len(scores))])
    return math.exp(-sum(total for total, _ in parts) / sum(tokens for _, tokens in parts))
