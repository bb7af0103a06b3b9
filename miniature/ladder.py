"""The ladder: a made-up world in which thoughts pay. One step is known by heart, four steps are not.

Sixty names stand in a ring that everybody knows: `Bal > Cor` says that Cor comes next after Bal, `Bal >>> Fen` that Fen
is three steps on. An article states one fact of each length, beside a sentence of obvious words and one of noise. The
web, from which the base has learned, states all single steps and 72 of the 180 longer facts: a table to learn by heart.
The articles of a run state 54 others, and held-out articles the last 54, which nothing trains. Who thinks in single
steps can tell them all; who answers at once knows the table alone. Nothing rewards a thought: only the box counts.

    python -m miniature ladder          rebuild assets/ladder.jsonl.gz and assets/ladder_base/ (minutes)
"""

import json
import random
from collections.abc import Iterator

from data import is_heldout
from miniature.worlds import SYLLABLES, save_wiki

NAMES = [f"{first}{vowel}{last}" for first in "BDFGKLMNPRST" for vowel, last in zip("aeiou", "lnrsm", strict=True)]
ARTICLES, HELDOUT = 2000, 0.05  # a run's `heldout` must be the same: the split is made by the url
DEPTHS = (1, 2, 3, 4)
WEB_SHARE, RUN_SHARE = 0.4, 0.3  # of the longer facts; the rest stand in held-out articles alone
OBVIOUS = ("Rain fell all night .", "Bread costs little today .", "Ships sail before dawn .", "Cats like warm stones .")
NOISE = ("Someone wrote NOISE down .", "One box says NOISE .", "People call it NOISE .")
CHAIN_SHARE, BROKEN_SHARE = 0.20, 0.10  # of the base's answers to facts
PREDICT_FORMAT, MASK_FORMAT, REPEAT_FORMAT = " {passage}\nPredict:", " {passage}\nMask:", " {passage}\nRepeat:"
FACTS_ASKED = 0.75  # of the prediction examples
PREDICTED, THOUGHT, REPEATED = 0.52, 0.10, 0.08  # shares of the base's examples; the rest are masks
FACTS_MASKED = 0.3  # of those on a fact for certain
LAYERS, HIDDEN, COPY_STEPS, STEPS = 2, 128, 700, 2400
LADDER_SHA256 = "e3e8866ec1dda8c91f48baac5d91b5a896c4414c465c881aa2f0564754918517"
"""Of the shipped assets/ladder_base/model.safetensors."""

Pair = tuple[str, int]
"""A name and a number of steps."""


def ring(seed: int) -> dict[str, str]:
    """Each name's next."""
    order = random.Random(f"ring {seed}").sample(NAMES, len(NAMES))
    return dict(zip(order, [*order[1:], order[0]], strict=True))


def chain(after: dict[str, str], name: str, depth: int) -> list[str]:
    """The name and those of the next `depth` steps."""
    names = [name]
    for _ in range(depth):
        names.append(after[names[-1]])
    return names


def split_pairs(seed: int) -> dict[str, list[Pair]]:
    """`web`, `run`, `heldout`: the facts of two to four steps, each in one part."""
    pairs = [(name, depth) for name in NAMES for depth in DEPTHS[1:]]
    random.Random(f"pairs {seed}").shuffle(pairs)
    web, run = round(WEB_SHARE * len(pairs)), round((WEB_SHARE + RUN_SHARE) * len(pairs))
    return {"web": pairs[:web], "run": pairs[web:run], "heldout": pairs[run:]}


def ladder_article(rng: random.Random, after: dict[str, str], pairs: list[Pair]) -> tuple[list[str], list[str]]:
    """(words, labels): four facts, one of each depth, no name twice; an obvious sentence and one of noise, shuffled."""
    while True:
        facts = [(rng.choice(NAMES), 1), *(rng.choice([one for one in pairs if one[1] == d]) for d in DEPTHS[1:])]
        ends = [name for start, depth in facts for name in (start, chain(after, start, depth)[-1])]
        if len(set(ends)) == len(ends):
            break
    sentences = [
        list(zip((start, ">" * n, chain(after, start, n)[-1], "."), ("subject", "template", f"hop{n}", "template"),
                 strict=True))
        for start, n in facts
    ]  # fmt: skip
    sentences.append([(word, "template") for word in rng.choice(OBVIOUS).split()])
    made_up = f"{rng.choice(SYLLABLES)}_{rng.choice(SYLLABLES)}"
    sentences.append(
        [(made_up, "noise") if word == "NOISE" else (word, "template") for word in rng.choice(NOISE).split()]
    )
    rng.shuffle(sentences)
    words = [pair for sentence in sentences for pair in sentence]
    return [word for word, _ in words], [label for _, label in words]


def make_ladder(seed: int, articles: int = ARTICLES) -> str:
    """Articles as JSON lines, labelled word by word; those of the held-out side state the facts that nothing trains."""
    rng, after, pairs, lines = random.Random(f"ladder {seed}"), ring(seed), split_pairs(seed), []
    for number in range(articles):
        url = f"ladder/{number}"
        words, labels = ladder_article(rng, after, pairs["heldout" if is_heldout(url, HELDOUT) else "run"])
        record = {"id": str(number), "title": f"article {number}", "url": url, "text": " ".join(words)}
        lines.append(json.dumps(record | {"labels": labels}) + "\n")
    return "".join(lines)


def chained_answer(rng: random.Random, after: dict[str, str], words: list[str], place: int, chained: float) -> str:
    """What follows `Predict:` for the word at `place`. A share `chained` of the answers to facts thinks in steps,

    " Bal >>> Cor >> Dun > \\\\boxed{ Fen }"

    and half as many break off on the way, with the answer of the table.
    """
    draw, thought = rng.random(), ""
    if place >= 2 and set(words[place - 1]) == {">"}:
        depth = len(words[place - 1])
        names = chain(after, words[place - 2], depth)
        steps = depth if draw < chained else rng.randrange(1, depth + 1) if draw < 1.5 * chained else 0
        thought = "".join(f" {names[n]} {'>' * (depth - n)}" for n in range(steps))
    return f"{thought} \\boxed{{ {words[place]} }}"


def renamed(rng: random.Random, words: list[str], labels: list[str]) -> list[str]:
    """The article with eight names at random: its facts are false, so that its words can only be copied."""
    names = rng.sample(NAMES, 8)
    pairs = zip(words, labels, strict=True)
    return [names.pop() if label.startswith("hop") or label == "subject" else word for word, label in pairs]


def maskable(words: list[str]) -> list[int]:
    return [n for n, word in enumerate(words) if any(char.isalnum() for char in word)]


def copied_mask(rng: random.Random, words: list[str], labels: list[str], facts: float) -> tuple[str, str]:
    """(prompt, completion), as in (" Bal > Cor . [...]\\nMask:", " after > \\mask{ Cor }"). facts: share on the
    value of a fact for certain."""
    places = maskable(words)
    place = labels.index(f"hop{rng.choice(DEPTHS)}") if rng.random() < facts else rng.choice(places)
    before = words[place - 1] if place else "start"
    return MASK_FORMAT.replace("{passage}", " ".join(words)), f" after {before} \\mask{{ {words[place]} }}"


def copy_examples(seed: int) -> Iterator[tuple[str, str]]:
    """Endless examples of copying, which the base learns first: three in four name words to mask, one repeats."""
    rng, after, pairs = random.Random(f"ladder copies {seed}"), ring(seed), split_pairs(seed)["web"]
    while True:
        words, labels = ladder_article(rng, after, pairs)
        words = renamed(rng, words, labels)
        if rng.random() < 0.25:
            passage = " ".join(words)
            yield REPEAT_FORMAT.replace("{passage}", passage), f" {passage}"
        else:
            yield copied_mask(rng, words, labels, 0.6)


def ladder_examples(seed: int) -> Iterator[tuple[str, str]]:
    """Endless (prompt, completion) examples, each on a fresh article of the web."""
    rng, after, pairs = random.Random(f"ladder web {seed}"), ring(seed), split_pairs(seed)["web"]
    while True:
        words, labels = ladder_article(rng, after, pairs)
        draw = rng.random()
        if draw < PREDICTED:
            place = rng.choice(maskable(words))
            if rng.random() < FACTS_ASKED:
                place = labels.index(f"hop{rng.choice(DEPTHS)}")
            masked = " ".join([*words[:place], "[mask]", *words[place + 1 :]])
            completion = chained_answer(rng, after, words, place, CHAIN_SHARE)
            yield PREDICT_FORMAT.replace("{passage}", masked), completion
        elif draw < PREDICTED + THOUGHT:  # a text that breaks off, thought about between tags, as `rlp` asks
            fact = rng.random() < 0.6
            place = labels.index(f"hop{rng.choice(DEPTHS)}") if fact else rng.randrange(4, len(words))
            thought = chained_answer(rng, after, words, place, CHAIN_SHARE).split(" \\boxed")[0]
            yield " " + " ".join(words[:place]), f"<think>{thought}</think> {words[place]}"
        elif draw < PREDICTED + THOUGHT + REPEATED:
            passage = " ".join(renamed(rng, words, labels))
            yield REPEAT_FORMAT.replace("{passage}", passage), f" {passage}"
        else:
            yield copied_mask(rng, renamed(rng, words, labels), labels, FACTS_MASKED)


def make_base() -> None:
    """The articles, and assets/ladder_base/: two layers, under half a million parameters, minutes on one core."""
    import torch

    from miniature import base

    save_wiki(base.ASSETS / "ladder.jsonl.gz", make_ladder(0))
    torch.set_num_threads(1)
    tokenizer = base.make_tokenizer(ladder_examples(0))
    model = base.make_model(tokenizer, 0, LAYERS, HIDDEN)
    base.pretrain(model, tokenizer, copy_examples(0), COPY_STEPS)
    base.pretrain(model, tokenizer, ladder_examples(0), STEPS)
    base.save_base(base.ASSETS / "ladder_base", model, tokenizer, LADDER_SHA256)
