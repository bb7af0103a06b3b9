"""quiet_star: a thought before any token, mixed into the prediction of the text that follows (arXiv 2403.09629).

After a position of a text the model writes thoughts c, `max_prediction_tokens` sampled tokens each, between two learned
marks whose embeddings start as that of "---". A small head weighs the hidden state h at a text token without the thought
against h' at the same token behind it:

    mix   w = sigmoid(head(h, h')),   log p_talk = log softmax(W ((1 - w) h + w h'))        W: the LM head
    r_i   = mean over the next `ahead_tokens` true tokens of log p_talk, nats a token, teacher-forced behind thought i
    L     = - mean_i [ r_i + max(0, r_i - mean r) * sum_t log p(c_it) ]                       the first r_i with gradient

W is linear, so this mixes logits; the paper writes log-probs, which are the same distribution once normalised. The second
term is REINFORCE. Thoughts below the mean of their position are left out, as in the paper: steadier, and biased. It goes
through grpo.update, with its importance weights, mini-batches and clip.

The paper thinks after all positions of a text in parallel, by a diagonal attention mask. Here positions are drawn, and as
many that the responses add up to those of `active`; a position's thoughts share one pass over the text before it. The paper
trains marks and thoughts with learning rates and weights of their own; here all parameters have the same optimizer.

The marks are ids behind the vocabulary that only the embedding knows. So the ordinary sampler samples thoughts behind the
learned mark itself, and the head cannot write a mark. A probe, and an exported model, answer without quiet thoughts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from config import Config, ConfigError
from data import Passage
from grpo import Group, MicroBatch, Sample, make_micro_batches, update
from masking import MASK, Mask
from ops import pack, token_logprobs
from ranks import Ranks, gather
from relatives.rlp import MIN_PREFIX
from rollout import derive_seed, leading_ids

if TYPE_CHECKING:
    from methods import Run, Task

MARK = "---"


# ------------------------------------------------------------------------------------------------------ the parameters


class Quiet(nn.Module):
    """The method's own parameters: embeddings of the two marks and the mixing head. `join` teaches a model the marks."""

    def __init__(self, model: nn.Module, tokenizer):
        super().__init__()
        table = model.get_input_embeddings().weight
        self.start_id, self.end_id = table.shape[0], table.shape[0] + 1
        ids = torch.tensor(tokenizer(MARK, add_special_tokens=False).input_ids, device=table.device)
        self.marks = nn.Parameter(table[ids].float().mean(0).to(table.dtype).repeat(2, 1))  # one token in most tokenizers
        options = {"device": table.device, "dtype": table.dtype}
        self.inner = nn.Linear(2 * table.shape[1], table.shape[1], **options)
        self.outer = nn.Linear(table.shape[1], 1, **options)
        nn.init.zeros_(self.outer.weight), nn.init.zeros_(self.outer.bias)  # both predictions weigh the same at first

    def join(self, model: nn.Module) -> None:
        """From here on the model's embedding knows the marks; it looks up all other ids as before."""
        table = model.get_input_embeddings()
        look_up = type(table).forward

        def forward(ids: Tensor) -> Tensor:
            is_mark = ids >= self.start_id
            words = look_up(table, ids.masked_fill(is_mark, 0))
            return torch.where(is_mark[..., None], self.marks[(ids - self.start_id).clamp(min=0)].to(words.dtype), words)

        table.forward = forward

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Hidden states (N, H) without and with the thought -> its weight (N, 1), between 0 and 1."""
        return torch.sigmoid(self.outer(torch.relu(self.inner(torch.cat([before, after], -1)))))


def quiet_parameters(model: nn.Module, tokenizer, config: Config) -> Quiet:
    """The same on every rank, drawn from the seed; on the model's device, in its dtype, without gradient."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(derive_seed(config.seed, "quiet_star"))
        quiet = Quiet(model, tokenizer)
    return quiet.requires_grad_(False)


def check(config: Config) -> None:
    """Raises ConfigError for values that do not go with this method."""
    if not config.share_prompts:
        raise ConfigError("share_prompts=False: must be true with quiet_star, whose thoughts continue one text")
    if config.max_prompt_tokens < 2 * config.ahead_tokens + 2 * MIN_PREFIX:
        least = 2 * config.ahead_tokens + 2 * MIN_PREFIX
        raise ConfigError(f"max_prompt_tokens={config.max_prompt_tokens}: must be at least {least}")


# ------------------------------------------------------------------------------------------------ positions, thoughts


@dataclass
class Place:
    """A position in a text, and what became of it."""

    prefix_ids: list[int]
    """The text before it, with the tokenizer's leading tokens."""
    ahead_ids: list[int]
    """The true tokens from there on: `ahead_tokens`, fewer at the end of the text."""
    gains: list[float] = field(default_factory=list)
    """Of each thought: its reward minus the mean log-prob of the same tokens without a thought, nats a token."""
    mixes: list[float] = field(default_factory=list)
    """Of each thought: its mean weight in the mixture."""


@dataclass
class Thought(Sample):
    """A thought and the text behind it. Its rollout's prompt ends with the opening mark."""

    place: Place | None = None
    number: int = 0
    """In the list of the step."""

    @property
    def tokens(self) -> int:
        return len(self.rollout.completion_ids) + 1 + 2 * (len(self.place.ahead_ids) - 1)  # the text twice


def propose_places(run: Run, passages: list[Passage], step: int) -> list[list[Task]]:
    """Random positions t >= MIN_PREFIX of each text, distinct while there are enough; tokens that precede a prompt over
    max_prompt_tokens are cut off."""
    from methods import Task, tasks_per_passage  # here: methods.py imports this file

    config, sampler, proposals = run.config, run.sampler, []
    start_ids, ahead = leading_ids(sampler.tokenizer), config.ahead_tokens
    room = config.max_prompt_tokens - 2 * ahead - len(start_ids)  # so that a packed thought fits a micro-batch
    counts = tasks_per_passage(config, "quiet_star")
    for number, (passage, count) in enumerate(zip(passages, counts, strict=True)):
        rng = random.Random(derive_seed(config.seed, step, "draw", number))
        ids = sampler.tokenizer(passage.text, add_special_tokens=False).input_ids
        places = range(MIN_PREFIX, len(ids))
        tasks = []
        for t in rng.sample(places, count) if len(places) >= count else rng.choices(places, k=count):
            place = Place(start_ids + ids[max(0, t - room) : t], ids[t : t + ahead])
            target = sampler.tokenizer.decode(place.ahead_ids)
            masked = sampler.tokenizer.decode(place.prefix_ids, skip_special_tokens=True) + MASK
            task = Task(passage, Mask(target, masked=masked, target=target, occurrences=1), position=place)
            task.prompt_ids = [*place.prefix_ids, run.sampler.replica.extra.start_id]
            tasks.append(task)
        proposals.append(tasks)
    return proposals


def think(run: Run, tasks: list[Task], step: int) -> None:
    """Thoughts of exactly `max_prediction_tokens` tokens: neither an answer nor the end of a sequence ends them."""
    from methods import predict

    sampler = replace(run.sampler, eos_ids={-1}, config=replace(run.config, stop_at_answer=False))
    predict(replace(run, sampler=sampler), tasks, step)


# ------------------------------------------------------------------------------------------------------- the mixture


@dataclass
class TalkBatch(MicroBatch):
    """Of each text token behind each thought (N of them), beside what the thoughts' own tokens need."""

    thoughts: list[Thought]
    before: Tensor
    """(N,) where the row predicts it without the thought."""
    after: Tensor
    """(N,) where the row predicts it behind the thought."""
    ahead: Tensor
    """(N,) the true tokens."""
    ahead_weights: Tensor


def pack_thoughts(bundles: list[list[Thought]], device: torch.device) -> TalkBatch:
    """Thoughts, bundled by position -> one packed row. The text before a position stands in it once; the tokens behind it
    continue it, and so does each thought: opening mark, sampled tokens, closing mark, and those tokens again."""
    thoughts = [thought for bundle in bundles for thought in bundle]
    if not bundles:  # a dummy of weight zero, as in grpo.pack_samples; the marks' ids follow the vocabulary
        raise NotImplementedError
    rows, prefixes, predicts, targets, before, after, ahead, per_token, per_ahead = ([] for _ in range(9))
    begin = 0
    for bundle in bundles:
        prefix, mark, text = bundle[0].rollout.prompt_ids[:-1], bundle[0].rollout.prompt_ids[-1], bundle[0].place.ahead_ids
        own = len(rows)
        rows.append(prefix)
        prefixes.append(None)
        begin += len(prefix)
        plain = [begin - 1, *range(begin, begin + len(text) - 1)]
        if len(text) > 1:
            rows.append(text[:-1])
            prefixes.append(own)
            begin += len(text) - 1
        for thought in bundle:
            completion = thought.rollout.completion_ids
            rows.append([mark, *completion, mark + 1, *text[:-1]])
            prefixes.append(own)
            predicts += range(begin, begin + len(completion))
            targets += completion
            before += plain
            begin += len(completion) + 1
            after += range(begin, begin + len(text))
            begin += len(text)
            ahead += text
            per_token += [(one, thought.advantage, thought.weight, 0.0) for one in thought.rollout.sampler_logprobs]
            per_ahead += [thought.weight * len(completion) / len(text)] * len(text)
    per_token, per_ahead = (torch.tensor(one, dtype=torch.float32, device=device) for one in (per_token, per_ahead))
    places = (torch.tensor(one, device=device) for one in (before, after, ahead))
    inputs, predicts, targets = pack(rows, device, prefixes), *(torch.tensor(one, device=device) for one in (predicts, targets))
    return TalkBatch(inputs, predicts, targets, *per_token.unbind(1), thoughts, *places, per_ahead)
