"""random_token and entropy_token: next-token prediction as a mask, after RPT (arXiv 2506.08007).

The two next-token baselines of PretrainZero: the passage is cut at a token, and the model finds it by chain of thought.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from config import Config
from data import Passage
from grpo import score
from masking import MASK, Mask, label_of, strip_hidden
from prompts import leading_ids
from rewards import answerable

if TYPE_CHECKING:
    from methods import Run, Task

LOOKAHEAD = 16  # tokens of the continuation that `reward: prefix` compares with


def token_masks(run: Run, passage: Passage, count: int, rng: random.Random, entropies=None) -> list[Mask]:
    """`random_token`: the passage cut at random tokens, distinct while there are enough."""
    tokens = run.sampler.tokenizer(passage.text, add_special_tokens=False, return_offsets_mapping=True)
    spans = tokens["offset_mapping"]  # (start, end) of each token in characters
    places = candidates(spans, passage.text, entropies, run.config.entropy_share)
    numbers = draw_distinct(places, count, rng) if places else []
    return [next_token_mask(passage, spans, number, run.config) for number in numbers]


def propose_entropy_tokens(run: Run, passages: list[Passage], step: int) -> list[list[Task]]:
    """`entropy_token`: the same among the tokens whose next-token entropy is highest under the frozen copy."""
    from methods import masks_by_rule  # here: methods.py imports this file

    by_id = {id(p): e for p, e in zip(passages, token_entropies(run, passages), strict=True)}
    return masks_by_rule(lambda *drawn: token_masks(*drawn, entropies=by_id[id(drawn[1])]))(run, passages, step)


def draw_distinct(places: Sequence[int], count: int, rng: random.Random) -> list[int]:
    """`count` of the places, distinct while there are enough; there must be one."""
    return rng.sample(places, count) if len(places) >= count else rng.choices(places, k=count)


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


def token_entropies(run: Run, passages: list[Passage]) -> list[list[float]]:
    """Entropy of the next-token distribution at each token of each passage under the frozen copy, nats; packed."""
    tokenizer = run.sampler.tokenizer
    start = leading_ids(tokenizer)  # a beginning-of-sequence token, or nothing
    texts = [tokenizer(passage.text, add_special_tokens=False).input_ids for passage in passages]
    sequences = [(start, ids) if start else (ids[:1], ids[1:]) for ids in texts]
    scores = score(run.reference, sequences, run.config, run.ranks)
    return [([] if start else [0.0]) + entropies for _, entropies in scores]


def next_token_mask(passage: Passage, tokens: list[tuple[int, int]], number: int, config: Config) -> Mask:
    """The passage up to a token, that token hidden and all that follows cut off: next-token prediction as a mask.

    tokens: (start, end) of each token in characters. A leading space of the token stays in front of the [mask]. Invalid
    if the token has no letter or digit.

    >>> from types import SimpleNamespace
    >>> passage = SimpleNamespace(text="Bonn is old.", labels=None)
    >>> mask = next_token_mask(passage, [(0, 4), (4, 7), (7, 11), (11, 12)], 1, Config())
    >>> mask.masked, mask.target, mask.prefixes
    ('Bonn [mask]', 'is', ('is', 'is old', 'is old.'))
    """
    start, end = tokens[number]
    target = strip_hidden(passage.text[start:end])
    if not answerable(target):
        return Mask(target, invalid="not_answerable")
    start = passage.text.index(target, start)
    prefixes = tuple(passage.text[start:end] for _, end in tokens[number : number + LOOKAHEAD])
    if target != prefixes[0].strip():
        prefixes = (target, *prefixes)  # without the invisible characters at the token's end
    label = label_of(passage, [(start, start + len(target))], config)
    return Mask(target, "", passage.text[:start] + MASK, target, 1, start, label, prefixes)
