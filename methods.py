"""Tasks for the predictor, and the methods: how tasks are drawn, rewarded and turned into samples.

    random_span     spans by SpanBERT's law (masking.random_span)
    random_token    the passage cut at a random token, which is to be predicted
    entropy_token   the same, at a token among those whose next-token entropy is highest under the start model
    rlvr            questions with a gold answer, checked by math-verify
    rlp             one random position per text; the prediction is a thought, paid by what it says of the next token
    sft, cpt        the answer, or the text itself, given as the completion: cross-entropy is the same update with
                    advantage 1 and no sampling

The mask methods and `sft` spend as many responses a step as `active` does: passages x masks x (1 + predictions); `rlvr`
and `rlp` passages x predictions.

rlp (arXiv 2510.01265): reward of a thought c before token x_t: log p_policy(x_t | x_<t, c) - log p_average(x_t | x_<t),
teacher-forced; the average follows the policy. Clip values and the handling of unfinished thoughts are ours.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from statistics import fmean

from torch import nn

from config import Config, ConfigError
from data import Corpus, DataError, Passage, is_heldout, load_questions, strip_instruction
from grpo import Group, Sample, add_ref_logprobs, make_samples, score
from masking import MASK, Mask, next_token_mask, random_span
from ranks import Ranks, gather
from rewards import INVALID_MASK_REWARD, answerable, generator_reward
from rollout import Rollout, Sampler, derive_seed, predict_prompt, question_prompt
from verify import check_answers

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


THOUGHT_PROMPT = """The text below breaks off. Think briefly about what it has said and what has to come next, inside <think> and </think>. Then continue the text with its very next word.

Text:
{passage}

"""  # noqa: E501 (a line break inside a sentence would be part of the prompt)
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
MIN_PREFIX = 8
"""Tokens that the model reads before the first position that may be drawn: less text says nothing of what follows."""


@dataclass(frozen=True)
class Frame:
    """The token ids around texts and thoughts, fixed for a run."""

    start_ids: list[int]
    """What the tokenizer puts in front of any text (a beginning-of-sequence token, or nothing)."""
    head_ids: list[int]
    """The sampling prompt before the text."""
    tail_ids: list[int]
    """The sampling prompt after the text; its end is open_ids."""
    open_ids: list[int]
    close_ids: list[int]
    longest_prefix: int
    """Tokens of text that fit, so that neither the prompt nor a context with an empty thought exceeds the limit."""


@dataclass(frozen=True)
class Position:
    """One place in a text: the tokens before it, without special ones, and the token there."""

    prefix_ids: list[int]
    target_id: int


def make_frame(tokenizer, template: str, max_prompt_tokens: int) -> Frame:
    """Tokenizes everything but the texts, once. template: config.rlp_prompt or THOUGHT_PROMPT, with {passage}.

    With a chat template the request is one user turn and the thought opens the answer.
    Raises ConfigError if {passage} does not stand in it once, or if there is no room for MIN_PREFIX tokens of text.
    """
    if template.count("{passage}") != 1:
        raise ConfigError(f"rlp_prompt={template!r}: must contain {{passage}} once")
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": template}]
        template = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    head, tail = template.split("{passage}")
    # The template writes its own special tokens; plain text gets those that the tokenizer puts in front
    head_ids = tokenizer(head, add_special_tokens=not tokenizer.chat_template).input_ids
    open_ids, close_ids, tail_ids = (
        tokenizer(text, add_special_tokens=False).input_ids for text in (THINK_OPEN, THINK_CLOSE, tail)
    )
    start_ids = tokenizer("").input_ids
    asked = len(head_ids + tail_ids + open_ids)
    scored = len(start_ids + open_ids + close_ids) + 1
    room = max_prompt_tokens - max(asked, scored)
    if room < MIN_PREFIX:
        raise ConfigError(
            f"max_prompt_tokens={max_prompt_tokens}: must be at least {max_prompt_tokens - room + MIN_PREFIX}, "
            f"{MIN_PREFIX} tokens of text and the frame of rlp_prompt"
        )
    return Frame(start_ids, head_ids, tail_ids + open_ids, open_ids, close_ids, room)


def draw_position(text: str, tokenizer, frame: Frame, rng: random.Random) -> Position:
    """One uniformly random position t >= MIN_PREFIX of a text. A text that is too long before t loses its beginning.

    Raises ValueError for a text of MIN_PREFIX tokens or fewer: min_passage_tokens is to keep them out.
    """
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) <= MIN_PREFIX:
        raise ValueError(f"a text of {len(ids)} tokens has no position after {MIN_PREFIX}: {text[:60]!r}")
    t = rng.randrange(MIN_PREFIX, len(ids))
    return Position(ids[max(0, t - frame.longest_prefix) : t], ids[t])


def thought_prompt(frame: Frame, position: Position) -> list[int]:
    """What a thought is sampled from, token ids: the request around the text, and the tag that opens the thought."""
    return frame.head_ids + position.prefix_ids + frame.tail_ids


def close_thought(rollout: Rollout, frame: Frame) -> list[int]:
    """A thought as it is scored, token ids: opening tag, sampled tokens, closing tag.

    A thought cut at the limit is closed here, and so is one that ended the sequence, whose EOS would part the text from
    x_t and is left out. The rollout keeps its sampled tokens, so what is added or left out here moves no gradient.

    With <think> = 7, </think> = 8, EOS = 0: [5, 6, 8] "answer" -> [7, 5, 6, 8];  [5, 6] "length" -> [7, 5, 6, 8];
    [5, 0] "eos" -> [7, 5, 8].
    """
    if rollout.finish == "answer":
        return frame.open_ids + rollout.completion_ids
    thought = rollout.completion_ids[:-1] if rollout.finish == "eos" else rollout.completion_ids
    return frame.open_ids + thought + frame.close_ids


def information_gain(
    policy: nn.Module, reference: nn.Module, positions: list[Position], thoughts: list[list[list[int]]], frame: Frame,
    config: Config, ranks: Ranks,
) -> list[list[float]]:  # fmt: skip
    """Reward of each thought of each position: log p_policy(x_t | text, thought) - log p_reference(x_t | text), nats.

    thoughts[i]: of positions[i], as close_thought leaves them; [] is no thought and no tags. At temperature 1, which is
    what the models believe, whatever the thoughts were sampled at. Same lists in and out on every rank; costs a forward
    of the policy over all texts with thoughts and one of the reference over the texts.

    p(x_t) of 0.2 by the text alone and 0.6 after the thought: a reward of ln 3 = 1.099.
    """
    texts = [frame.start_ids + position.prefix_ids for position in positions]
    targets = [[position.target_id] for position in positions]
    informed = [
        (text + thought, target)
        for text, target, group in zip(texts, targets, thoughts, strict=True)
        for thought in group
    ]
    after_thought = iter([logprobs[0] for logprobs, _ in score(policy, informed, config, ranks)])
    baselines = [logprobs[0] for logprobs, _ in score(reference, list(zip(texts, targets, strict=True)), config, ranks)]
    return [
        [next(after_thought) - baseline for _ in group] for baseline, group in zip(baselines, thoughts, strict=True)
    ]


def empty_thought_gain(
    policy: nn.Module, reference: nn.Module, positions: list[Position], frame: Frame, config: Config, ranks: Ranks
) -> float:
    """Mean reward of `<think></think>`: what the tags alone do to the next token. A number to report beside the reward.

    It is not zero by right. Where it is far below, a thought first earns back what its tags cost.
    """
    empty = [[frame.open_ids + frame.close_ids]] * len(positions)
    return fmean(gains[0] for gains in information_gain(policy, reference, positions, empty, frame, config, ranks))


def rlp_advantages(rewards: list[float]) -> list[float]:
    """A_i = G / (G - 1) (r_i - mean r): each thought against the mean of the others; G >= 2.

    >>> [round(advantage, 3) for advantage in rlp_advantages([0.9, 0.1, -0.3, 0.1])]
    [0.933, -0.133, -0.667, -0.133]
    """
    scale, mean = len(rewards) / (len(rewards) - 1), fmean(rewards)
    return [scale * (reward - mean) for reward in rewards]


def thought_samples(groups: list[Group]) -> list[Sample]:
    """Groups of thoughts -> samples for grpo.update, in place of make_samples.

    Every thought weighs the same, spread evenly over its tokens: weight = 1 / (thoughts * own tokens). No group is
    dropped: rewards are continuous, and a group of equal ones has advantage 0. No thought is dropped for its length.
    """
    samples = [
        Sample(rollout, advantage)
        for group in groups
        for rollout, advantage in zip(group.rollouts, rlp_advantages(group.rewards), strict=True)
    ]
    for sample in samples:
        sample.weight = 1 / (len(samples) * len(sample.rollout.completion_ids))
    return samples
