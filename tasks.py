"""Tasks for the predictor: what they are, and where they come from when no generator proposes them.

    random_span     spans by SpanBERT's law (masking.random_span)
    random_token    the passage cut at a random token, which is to be predicted
    entropy_token   the same, at a token among those whose next-token entropy is highest under the start model
    rlvr            questions with a gold answer, checked by math-verify
    rlp             one random position per text; the prediction is a thought, paid by what it says of the next token
    sft, cpt        the answer, or the text itself, given as the completion: cross-entropy is the same update with
                    advantage 1 and no sampling

The mask methods and `sft` spend as many responses a step as `active` does: passages x masks x (1 + predictions); `rlvr`
and `rlp` passages x predictions. Leaves out the generator's own tasks (train.propose) and when a reward is given.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from statistics import fmean

from benchmarks.judge import check_answers
from config import Config
from data import Corpus, Passage, is_heldout
from grpo import Group, Sample, make_samples
from masking import MASK, Mask, next_token_mask, random_span
from model import Ranks, gather
from questions import load_questions, strip_instruction
from reference_model import add_ref_logprobs, score
from rewards import INVALID_MASK_REWARD, answerable, generator_reward
from rlp import (
    THOUGHT_PROMPT,
    Frame,
    Position,
    close_thought,
    draw_position,
    empty_thought_gain,
    information_gain,
    make_frame,
    thought_prompt,
    thought_samples,
)  # fmt: skip
from rollout import derive_seed
from sampler import Rollout, Sampler, predict_prompt, question_prompt
from sources import DataError

GIVEN = ("sft", "cpt")
"""Methods whose completions are given, not sampled."""


@dataclass
class Task:
    """A passage, a mask on it and, if the mask is valid, what the predictor made of it."""

    passage: Passage
    mask: Mask
    proposal: Rollout | None = None
    """The generator's response that named the mask; None where a rule drew it."""
    prompt_ids: list[int] = field(default_factory=list)
    """The prediction prompt; empty if the mask is invalid."""
    predictions: list[Rollout] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    """Of the predictions."""
    position: Position | None = None
    """`rlp`: where in the text the thought is taken."""

    @property
    def accuracy(self) -> float:
        """Mean reward of the predictions: the share that is right, where right is 1 and wrong is 0."""
        return fmean(self.rewards)

    def proposal_reward(self, kind: str = "one_minus_accuracy") -> float:
        """Of the generator: harder is better; 0 for a mask that is invalid, here, or that nobody recovered, in
        rewards.generator_reward."""
        return INVALID_MASK_REWARD if self.mask.invalid else generator_reward(self.accuracy, kind)


def make_task(passage: Passage, mask: Mask, sampler: Sampler, proposal: Rollout | None = None) -> Task:
    """With its prediction prompt; a prompt over max_prompt_tokens makes the mask invalid."""
    task = Task(passage, mask, proposal)
    if not mask.invalid:
        task.prompt_ids = predict_prompt(sampler, mask.masked)
        if len(task.prompt_ids) > sampler.config.max_prompt_tokens:
            mask.invalid, task.prompt_ids = "prompt_too_long", []
    return task


def method_at(config: Config, step: int) -> str:
    """The method of a step (from 0): warmup_method first, if there is one."""
    return config.warmup_method if config.warmup_method and step < config.warmup_method_steps else config.method


def tasks_per_passage(config: Config, method: str) -> list[int]:
    """How many masks each passage of a step gets, so that responses add up to those of `active`.

    active spends passages x masks x (1 + predictions) responses, its masks included; a rule's masks cost none, so it
    draws 1 / predictions more of them. `sft` has one response per mask. 2 passages, 4 masks, 8 predictions:

    >>> from config import Config
    >>> small = Config(passages_per_step=2, masks_per_passage=4, predictions_per_mask=8)
    >>> tasks_per_passage(small, "random_span"), tasks_per_passage(small, "sft")
    ([5, 4], [36, 36])
    """
    passages, predictions = config.passages_per_step, config.predictions_per_mask
    responses = passages * config.masks_per_passage * (1 + predictions)
    total = responses if method == "sft" else responses // predictions
    return [total // passages + (number < total % passages) for number in range(passages)]


def draw_tasks(method: str, passages: list[Passage], reference, sampler: Sampler, step: int) -> list[list[Task]]:
    """Tasks by rule, per passage; the same on every rank. reference: the frozen copy, for `entropy_token`."""
    config, proposals = sampler.config, []
    if method == "cpt":
        return [[] for _ in passages]
    entropies = token_entropies(passages, reference, sampler) if method == "entropy_token" else [None] * len(passages)
    for number, (passage, count) in enumerate(zip(passages, tasks_per_passage(config, method), strict=True)):
        rng = random.Random(derive_seed(config.seed, step, "draw", number))
        if method == "rlvr":
            proposals.append([question_task(passage, sampler)])
        elif method == "rlp":
            proposals.append([thought_task(passage, sampler, rng)])
        elif method in ("random_span", "sft"):
            masks = [random_span(passage, config, rng) for _ in range(count)]
            proposals.append([make_task(passage, mask, sampler) for mask in masks])
        else:
            spans = token_spans(sampler, passage.text)
            places = candidates(spans, passage.text, entropies[number], config.entropy_share)
            if len(places) >= count:
                chosen = rng.sample(places, count)  # distinct while there are enough
            else:
                chosen = rng.choices(places, k=count) if places else []
            proposals.append([make_task(passage, next_token_mask(passage, spans, n), sampler) for n in chosen])
    return proposals


def question_task(question: Passage, sampler: Sampler) -> Task:
    """`rlvr`: the question as the masked text, its gold answer as the target."""
    task = Task(question, Mask(question.answer, masked=question.text, target=question.answer, occurrences=1))
    task.prompt_ids = question_prompt(sampler, question.text)
    if len(task.prompt_ids) > sampler.config.max_prompt_tokens:
        task.mask.invalid, task.prompt_ids = "prompt_too_long", []
    return task


def thought_task(passage: Passage, sampler: Sampler, rng: random.Random) -> Task:
    """`rlp`: one random position of the text; the predictions will be thoughts, the target is the next token."""
    frame = rlp_frame(sampler)
    position = draw_position(passage.text, sampler.tokenizer, frame, rng)
    target = sampler.piece(position.target_id)
    text = sampler.tokenizer.decode(position.prefix_ids)
    task = Task(passage, Mask(target, masked=text + MASK, target=target, occurrences=1), position=position)
    task.prompt_ids = thought_prompt(frame, position)
    return task


def rlp_frame(sampler: Sampler) -> Frame:
    """The tokens around texts and thoughts."""
    config = sampler.config
    return make_frame(sampler.tokenizer, config.rlp_prompt or THOUGHT_PROMPT, config.max_prompt_tokens)


def thought_gains(tasks: list[Task], policy, reference, sampler: Sampler) -> list[list[float]]:
    """`rlp`: the information gain of every thought, nats (rlp.information_gain)."""
    frame = rlp_frame(sampler)
    thoughts = [[close_thought(thought, frame) for thought in task.predictions] for task in tasks]
    positions = [task.position for task in tasks]
    return information_gain(policy, reference, positions, thoughts, frame, sampler.config, sampler.ranks)


def gains_without_thought(passages: list[Passage], policy, reference, sampler: Sampler) -> dict:
    """What `rlp` pays before any thought, mean nats: for nothing at all (0 while policy and average are equal) and for
    an empty pair of think tags (not 0: the tags alone move the next token)."""
    tasks = [task for group in draw_tasks("rlp", passages, reference, sampler, 0) for task in group]
    frame, positions = rlp_frame(sampler), [task.position for task in tasks]
    common = (frame, sampler.config, sampler.ranks)
    nothing = information_gain(policy, reference, positions, [[[]]] * len(positions), *common)
    return {
        "rlp/no_thought_gain": fmean(gains[0] for gains in nothing),
        "rlp/empty_thought_gain": empty_thought_gain(policy, reference, positions, *common),
    }


def token_entropies(passages: list[Passage], reference, sampler: Sampler) -> list[list[float]]:
    """Entropy of the next-token distribution at each token of each passage under the frozen copy, nats; packed."""
    start = sampler.tokenizer("").input_ids  # a beginning-of-sequence token, or nothing
    texts = [sampler.tokenizer(passage.text, add_special_tokens=False).input_ids for passage in passages]
    sequences = [(start, ids) if start else (ids[:1], ids[1:]) for ids in texts]
    scores = score(reference, sequences, sampler.config, sampler.ranks)
    return [([] if start else [0.0]) + entropies for _, entropies in scores]


def question_corpus(config: Config, log=print) -> Corpus:
    """The questions of config.data as passages with an answer, split by a hash of their text. Every rank reads them."""
    questions, counts = load_questions(config, log)
    train, heldout = [], []
    for question in questions:
        passage = Passage(question.id, "", "", strip_instruction(question.text), answer=question.answer)
        (heldout if is_heldout(question.text, config.heldout) else train).append(passage)
    if not train or not heldout:
        raise DataError(f"{config.data}: {len(train)} questions to train on, {len(heldout)} held out; change heldout")
    return Corpus(train, heldout, {**counts, "train": len(train), "heldout": len(heldout)})


def verify_predictions(
    answers: list[list[str | None]], golds: list[str], config: Config, ranks: Ranks
) -> list[list[float]]:
    """math-verify's verdict on every answer, 1 or 0; each rank checks its share of the questions in a child process."""
    mine = list(zip(golds, answers, strict=True))[ranks.rank :: ranks.world]
    flat = check_answers([(gold, answer) for gold, group in mine for answer in group], config.verify_seconds)
    verdicts = iter(flat)
    parts = gather([[[next(verdicts) for _ in group] for _, group in mine]])
    return [parts[number % ranks.world][number // ranks.world] for number in range(len(golds))]


def token_spans(sampler: Sampler, text: str) -> list[tuple[int, int]]:
    """(start, end) of each token in characters of the text; special tokens left out."""
    return sampler.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]


def candidates(spans: list[tuple[int, int]], text: str, entropies: list[float] | None, share: float) -> list[int]:
    """Numbers of the tokens to draw from: those with a letter or digit, but the first, which nothing precedes.

    With entropies, only the `share` of these where they are highest (at least one). Source: RPT's filter as
    PretrainZero applies it, top 20 %.

    >>> candidates([(0, 1), (1, 3), (3, 4), (4, 6)], "A b! c", None, 0.5)
    [1, 3]
    >>> candidates([(0, 1), (1, 3), (3, 4), (4, 6)], "A b! c", [0.0, 0.1, 9.0, 0.2], 0.5)
    [3]
    """
    places = [n for n, (start, end) in enumerate(spans) if n > 0 and answerable(text[start:end])]
    if entropies is not None:
        keep = max(1, int(share * len(places)))
        places = sorted(sorted(places, key=lambda n: -entropies[n])[:keep])
    return places


def training_samples(
    method: str, groups: list[Group], tasks: list[Task], passages: list[Passage], reference, sampler: Sampler
) -> list[Sample]:
    """What a step trains on: responses with advantages and token weights; the generator's unless it is frozen.

    Every rank calls it: with a KL penalty the frozen copy scores them.
    """
    if method in GIVEN:
        return given_samples(method, tasks, passages, sampler)
    if method == "rlp":
        return thought_samples(groups)
    config = sampler.config
    samples = make_samples([group for group in groups if group.role == "pred" or config.train_generator], config)
    if config.kl:
        add_ref_logprobs(samples, reference, sampler)
    return samples


def given_samples(method: str, tasks: list[Task], passages: list[Passage], sampler: Sampler) -> list[Sample]:
    """`sft`: the masked words as the answer to the prediction prompt; `cpt`: the passage after its first token.

    Advantage 1 and a weight of one over all trained tokens: the update is then plain mean cross-entropy.
    """
    config, tokenizer = sampler.config, sampler.tokenizer
    rollouts = []
    if method == "sft":
        end = [tokenizer.eos_token_id]
        for task in tasks:
            text = config.sft_answer.replace("{answer}", task.mask.target)
            rollouts.append(given_rollout(task.prompt_ids, tokenizer(text, add_special_tokens=False).input_ids + end))
    else:
        for ids in (tokenizer(passage.text).input_ids for passage in passages):
            rollouts.append(given_rollout(ids[:1], ids[1:]))
    tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
    return [Sample(rollout, 1.0, 1 / tokens) for rollout in rollouts]


def given_rollout(prompt_ids: list[int], completion_ids: list[int]) -> Rollout:
    """A completion that nobody sampled, so that no sampler log-probs exist."""
    return Rollout(prompt_ids, completion_ids, [], "", "given")
