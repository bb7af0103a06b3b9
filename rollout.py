"""Paged generation: prompts as tokens in, `Rollout`s out, the same list on every rank.

Each rank samples its share of the prompts with transformers' continuous batching on its own replica. No collective runs
inside, so ranks may finish at different times. One gather at the end is the phase's only meeting point.

The sampler's token ids go to the loss untouched, with their log-probs. Text is decoded for parsing and rewards only.
The traps that shape this file:

- all requests are added before the sampler starts; otherwise the tokens would depend on timing;
- the sampler swallows its failures, so results are counted and a missing or failed one raises;
- it reseeds torch's global generator, so the state is saved and restored, and the seed says (run, step, phase);
- each phase gets a new manager. An old one would reuse keys of the old weights, hold cache memory during the update,
  and draw noise that depends on earlier phases.
"""

import gc
import hashlib
import logging
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.generation.continuous_batching.continuous_api import BackgroundThreadStatus
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus
from transformers.generation.continuous_batching.utils import WorkloadHints

from config import Config, ConfigError
from engine.batching import adapt, batching_settings, capture_graphs, decoding
from prompts import CLOSED, START, chat_frame, scan
from ranks import Ranks, gather, stop_requested


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
    frame: tuple[str, str] | None = None
    """What the chat template writes around a user turn; None: prompts are plain text."""
    pieces: dict[int, str] = field(default_factory=dict)
    lacks: set[str] = field(default_factory=set)
    """`graphs`, where CUDA graphs cannot be captured. A copy of the sampler knows it, too."""

    def piece(self, token: int) -> str:
        """The text of one token."""
        if token not in self.pieces:
            self.pieces[token] = self.tokenizer.decode([token])
        return self.pieces[token]


def make_sampler(replica, tokenizer, config: Config, ranks: Ranks, frame: tuple[str, str] | None = None) -> Sampler:
    """Collects every id that may end a response: the tokenizer's, the checkpoint's and the chat template's end of turn.

    frame: what an earlier part of the run rendered (chat_frame); else it is rendered here. Raises ConfigError if no
    token ends a response: every one would run to its limit.
    """
    eos: set[int] = set()
    for ids in (tokenizer.eos_token_id, replica.generation_config.eos_token_id, replica.config.eos_token_id):
        eos |= set(ids) if isinstance(ids, (list, tuple)) else {ids}
    vocabulary = replica.get_input_embeddings().num_embeddings  # an architecture's default may lie beyond it
    if tokenizer.chat_template:
        eos |= {*tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|eot_id|>", "<end_of_turn>"])}
        eos -= {tokenizer.unk_token_id}
    eos = {token for token in eos if token is not None and 0 <= token < vocabulary}
    if not eos:
        raise ConfigError(
            f"model={config.model!r}: neither its tokenizer nor its config names an end-of-sequence token; "
            "add eos_token to tokenizer_config.json"
        )
    return Sampler(replica, tokenizer, config, ranks, eos, frame or chat_frame(tokenizer))


# Hide its request for psutil on a CPU: it would size a cache that is sized here
logging.getLogger("ContinuousBatchingLogger").addFilter(lambda record: "psutil" not in record.getMessage())


def derive_seed(*parts) -> int:
    """A seed below 2^31 from whatever tells two streams of noise apart: (run seed, step, phase, rank, world)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "big") >> 1


def rollout(
    sampler: Sampler, prompts: list[list[int]], count: int, max_tokens: int, opening: str, noise: tuple,
    greedy: bool = False, prefix: str = "",
) -> list[list[Rollout]]:  # fmt: skip
    """`count` responses to each prompt, the same result on every rank; prompts[rank::world] are sampled here.

    prompts: token ids, the same list on every rank. max_tokens: longest response. opening: MASK_OPENING or
    BOXED_OPENING, what `stop_at_answer` waits for, or a closing tag, which always ends a response. noise: (step,
    phase), other for each call, from which the seed is derived beside run, rank and world size. prefix: text with which
    the prompts open the response already. Raises RuntimeError if a request fails.
    """
    rank, world = sampler.ranks.rank, sampler.ranks.world
    seed = derive_seed(sampler.config.seed, *noise, rank, world)
    own = prompts[rank::world]
    mine = generate(sampler, own, count, max_tokens, opening, seed, greedy, prefix, label=str(noise[-1]))
    parts = gather([mine])
    return [parts[number % world][number // world] for number in range(len(prompts))]


def generate(
    sampler: Sampler, prompts: list[list[int]], count: int, max_tokens: int, opening: str, seed: int,
    greedy: bool = False, prefix: str = "", label: str = "",
) -> list[list[Rollout]]:  # fmt: skip
    """The share of one rank: no collectives.

    Empty after a signal to stop, at once: the gather that follows raises Stopped.
    """
    config = replace(sampler.config, use_cuda_graph=sampler.config.use_cuda_graph and not sampler.lacks)
    replica = sampler.replica
    if not prompts:
        return []
    if not all(prompts):
        raise ValueError("an empty prompt: the sampler would answer it with garbage")
    longest = max(map(len, prompts))
    # The checkpoint's settings may have a top-p; its log-probs would not match the trainer's
    sampling = {"do_sample": False} if greedy else {"do_sample": True, "temperature": config.temperature, "top_k": 0}
    generation = GenerationConfig(
        max_new_tokens=max_tokens, num_return_sequences=count, eos_token_id=sorted(sampler.eos_ids), **sampling
    )
    hints = WorkloadHints(max_prompt_length=longest, max_generated_length=max_tokens, num_requests=count * len(prompts))
    # A tag ends a response by the method's definition, a brace only where a base model would ramble on
    stop_early = not opening.endswith("{") or config.stop_at_answer
    start = scan(START, prefix, opening)
    results: dict[str, object] = {}
    wanted = count * len(prompts)
    bar = tqdm(total=wanted, desc=label, leave=False, disable=None if sampler.ranks.rank == 0 else True)
    stopping = stop_at_answer(sampler, opening, start) if stop_early else nullcontext(set())
    numbers = range(len(prompts))
    names = [[str(number), *(f"{number}__child#{child}" for child in range(count - 1))] for number in numbers]
    # The sampler reseeds torch's global generators; whoever draws next must not notice
    unnoticed = torch.random.fork_rng([replica.device] if replica.device.type == "cuda" else [])
    with unnoticed, bar, stopping as answered:
        manager = replica.init_continuous_batching(
            generation, batching_settings(config, replica, prompts, max_tokens, wanted, seed), hints
        )
        settings = manager.continuous_batching_config
        if decoding(replica) == "block table":  # the sampler offers those by name, to flash-attn alone
            settings.max_blocks_per_request = -(-(longest + max_tokens) // settings.page_size) + 1
        try:
            for number, prompt in enumerate(prompts):
                manager.add_request(prompt, request_id=str(number))
            adapt(manager, wanted)
            if captured := capture_graphs(manager):
                manager.start()
                # Everything is admitted: the thread may end by itself when all is done, which saves its idle wait
                manager.background_thread_status.request_stop(BackgroundThreadStatus.FLUSH_AND_STOP, sampler.ranks.rank)
            while captured and len(results) < wanted and not stop_requested():
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    results[result.request_id] = result
                    bar.update()
                elif result is None and not manager.is_running() and manager.output_router.output_queue.empty():
                    break
        finally:
            manager.stop(block=True, hard_stop=len(results) < wanted)
            manager.batch_processor = None  # as stop does with one that was started
            manager.destroy()
            if replica.device.type == "cuda":
                torch._C._cuda_clearCublasWorkspaces()  # those of this phase's streams; the update makes its own
    if not captured:
        print(f"rank {sampler.ranks.rank}: CUDA graphs cannot be captured; sampling without", file=sys.stderr)
        sampler.lacks.add("graphs")
        gc.collect()  # the cache, before the next one takes its share of free memory
        return generate(sampler, prompts, count, max_tokens, opening, seed, greedy, prefix, label)
    if len(results) < wanted and stop_requested():
        return []
    fatal = manager.background_thread_status.fatal_error
    groups = []
    for prompt, own in zip(prompts, names, strict=True):
        groups.append([_to_rollout(sampler, results.get(name), prompt, name in answered, fatal) for name in own])
    texts = sampler.tokenizer.batch_decode(
        [response.completion_ids for group in groups for response in group], skip_special_tokens=True
    )
    for response, text in zip((response for group in groups for response in group), texts, strict=True):
        response.text = text
    return groups


@contextmanager
def at_each_token(update):
    """Inside, a request takes in a token by update(original, request, token_id, logprob); True: it is finished."""
    original = RequestState.update_and_check_completion
    RequestState.update_and_check_completion = lambda *given: update(original, *given)
    try:
        yield
    finally:
        RequestState.update_and_check_completion = original


def before_restart(request) -> list[int]:
    """What a request generated before its cache was taken away; the sampler counts it as prompt since."""
    return request.initial_tokens[request._true_initial_tokens :] if request._true_initial_tokens else []


@contextmanager
def stop_at_answer(sampler: Sampler, opening: str, start):
    """Inside, a request also finishes with the token that closes its first balanced answer; yields their ids.

    The sampler has no stop strings. The decision depends on the sampled tokens alone, so sampling stays on-policy and
    the log-probs are untouched.
    """
    answered = set()

    def update(original, request, token_id, logprob):
        finished, known = original(request, token_id, logprob), hasattr(request, "answer_scan")
        state = request.answer_scan if known else start
        for token in [token_id] if known else [*before_restart(request), *request.generated_tokens]:
            state = scan(state, sampler.piece(token), opening)
        request.answer_scan = state
        if state == CLOSED:
            answered.add(request.request_id)
            request.status = RequestStatus.FINISHED
        return finished or state == CLOSED

    with at_each_token(update):
        yield answered


def _to_rollout(sampler: Sampler, result, prompt: list[int], answered: bool, fatal) -> Rollout:
    if result is None or result.error is not None:
        cause = (result.error if result is not None else None) or fatal or "no result came back"
        raise RuntimeError(f"rank {sampler.ranks.rank}: a generation request failed: {cause}")
    tokens, logprobs = list(result.generated_tokens), list(result.logprobs)
    if list(result.prompt_ids) != list(prompt) or not tokens or len(tokens) != len(logprobs):
        raise RuntimeError(
            f"rank {sampler.ranks.rank}: the sampler returned {len(tokens)} tokens, {len(logprobs)} log-probs, "
            f"a prompt of {len(result.prompt_ids)} tokens for one of {len(prompt)}"
        )
    finish = "eos" if tokens[-1] in sampler.eos_ids else "answer" if answered else "length"
    return Rollout(prompt, tokens, logprobs, "", finish)
