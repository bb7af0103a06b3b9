"""What is sampled with and what comes out: the replica with its prompts and ends, and a response.

Leaves out how sampling goes (rollout.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from config import Config, ConfigError
from model import Ranks
from prompts import MASK_PROMPT, PREDICT_PREFIX, PREDICT_PROMPT, QUESTION_PROMPT, fill


@dataclass
class Rollout:
    """One response as the sampler made it."""

    prompt_ids: list[int]
    completion_ids: list[int]
    sampler_logprobs: list[float]
    """Of each completion token, at the sampling temperature, nats; empty if the completion was given."""
    text: str
    """The completion decoded, without special tokens."""
    finish: str
    """`eos`; `answer`: the first balanced answer closed, in `rlp` the thought; `length`: cut at the limit; `given`: by
    the text, nobody sampled it (`sft`, `cpt`)."""


@dataclass
class Sampler:
    """What every phase needs to sample: the replica and how its responses end."""

    replica: nn.Module
    tokenizer: object
    config: Config
    ranks: Ranks
    eos_ids: set[int]
    pieces: dict[int, str] = field(default_factory=dict)

    def piece(self, token: int) -> str:
        """The text of one token."""
        if token not in self.pieces:
            self.pieces[token] = self.tokenizer.decode([token])
        return self.pieces[token]


def make_sampler(replica, tokenizer, config: Config, ranks: Ranks) -> Sampler:
    """Collects every id that may end a response: the tokenizer's, the checkpoint's and the chat template's end of turn.

    Raises RuntimeError if there is none: every response would run to its limit.
    """
    eos: set[int] = set()
    for ids in (tokenizer.eos_token_id, replica.generation_config.eos_token_id, replica.config.eos_token_id):
        eos |= set(ids) if isinstance(ids, (list, tuple)) else {ids}
    if tokenizer.chat_template:
        end_of_turn = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|eot_id|>", "<end_of_turn>"])
        eos |= {token for token in end_of_turn if token != tokenizer.unk_token_id}
    eos.discard(None)
    if not eos:
        raise RuntimeError(f"model={config.model}: neither tokenizer nor checkpoint names an end-of-sequence token")
    return Sampler(replica, tokenizer, config, ranks, eos)


def encode(tokenizer, prompt: str, prefix: str = "") -> list[int]:
    """The prompt's token ids: one user turn of the chat template if there is one, else plain text.

    `prefix` opens the response (the probe's answer without a thought).
    """
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=False)
        return list(ids) + (tokenizer(prefix, add_special_tokens=False).input_ids if prefix else [])
    return tokenizer(prompt + prefix).input_ids


def mask_prompt(sampler: Sampler, text: str) -> list[int]:
    """The generator's prompt for a passage, token ids."""
    return encode(sampler.tokenizer, fill(sampler.config.mask_prompt or MASK_PROMPT, text))


def predict_prompt(sampler: Sampler, masked: str, thought: bool = True) -> list[int]:
    """The predictor's prompt for a masked passage, token ids; without `thought` the answer is opened already."""
    prompt = fill(sampler.config.predict_prompt or PREDICT_PROMPT, masked)
    return encode(sampler.tokenizer, prompt, "" if thought else predict_prefix(sampler.config))


def question_prompt(sampler: Sampler, question: str, thought: bool = True) -> list[int]:
    """The prompt of a question with a verifiable answer, token ids; without `thought` the answer is opened already."""
    prompt = fill(sampler.config.question_prompt or QUESTION_PROMPT, question)
    return encode(sampler.tokenizer, prompt, "" if thought else predict_prefix(sampler.config))


def check_prompts(sampler: Sampler) -> None:
    """Raises ConfigError if the longest passage could make a prompt over max_prompt_tokens."""
    config = sampler.config
    room = config.max_prompt_tokens - config.max_passage_tokens
    frame = max(len(mask_prompt(sampler, "")), len(predict_prompt(sampler, "")))
    if frame > room:
        raise ConfigError(
            f"max_prompt_tokens={config.max_prompt_tokens}: must be at least {config.max_passage_tokens + frame}, "
            f"max_passage_tokens={config.max_passage_tokens} plus the {frame} tokens of the longer prompt template"
        )


def predict_prefix(config: Config) -> str:
    """What opens an answer without a thought."""
    return config.predict_prefix or PREDICT_PREFIX
