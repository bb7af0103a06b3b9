r"""RLP (arXiv 2510.01265): a thought is worth the information that it gives about the next token of ordinary text.

One random position t per document; G thoughts c are sampled after the text x_<t; then

    r   = log p_theta(x_t | x_<t, c) - log p_ema(x_t | x_<t)          information gain, nats, no gradient through it
    A_i = G / (G - 1) (r_i - mean r)                                  no division by the standard deviation

and the clipped surrogate of grpo.py on the sampled tokens, averaged within each thought, then over thoughts. The
baseline is a moving average of the model, which reads the text alone (reference_model.py).

Three contexts, put together from token ids, so that x_t stays the token that followed in the text:

    sampled from     request, text, request, <think>                     the thought follows; chat template if any
    scored, thought  text, <think>, thought, </think>                    x_t follows
    scored, plain    text                                                x_t follows

The request is left out of the scored context: the two scores then differ by the thought in its tags and by nothing
else, with chat template or without. The tags themselves move p(x_t) too. This is the same for all thoughts of a
document, so no advantage notices; `empty_thought_gain` says how much it is (the paper is silent; clip values and the
handling of unfinished thoughts are ours too).

Leaves out sampling (rollout.py) and the update (grpo.py). The order of calls in a step: draw_position, thought_prompt,
rollout, close_thought, information_gain, thought_samples, update, refresh, ema_update.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from statistics import fmean

from torch import nn

from config import Config, ConfigError
from grpo import Group, Sample
from model import Ranks
from reference_model import score
from sampler import Rollout

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
