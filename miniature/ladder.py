"""The ladder: a made-up world in which thoughts pay. One step is known by heart, four steps are not.

Sixty names stand in a ring that everybody knows: `Fum > Ral` says that Ral comes next after Fum, `Fum >>> Bos` that Bos
is three steps on. An article states one fact of each length, beside a sentence of obvious words and one of noise. The
web, from which the base has learned, states all single steps and 72 of the 180 longer facts: a table to learn by heart.
The articles of a run state 54 others, and held-out articles the last 54, which nothing trains. Who thinks in single
steps can tell them all; who answers at once knows the table alone. Nothing rewards a thought: only the box counts.
"""

import random
from collections.abc import Iterator

from data import is_heldout
from miniature.base import ASSETS, MASK_FORMAT, PREDICT_FORMAT, REPEAT_FORMAT, make_base
from miniature.worlds import HELDOUT, SEED, article_row, made_up, save_wiki

NAMES = [f"{first}{vowel}{last}" for first in "BDFGKLMNPRST" for vowel, last in zip("aeiou", "lnrsm", strict=True)]
RING = random.Random(f"ring {SEED}").sample(NAMES, len(NAMES))
OBVIOUS = ("Rain fell all night .", "Bread costs little today .", "Ships sail before dawn .", "Cats like warm stones .")
NOISE = ("Someone wrote NOISE down .", "One box says NOISE .", "People call it NOISE .")
CHAIN_SHARE = 0.20  # of the base's answers to facts think in steps; half as many break off
FACTS_ASKED = 0.75  # of the prediction examples
PREDICTED, REPEATED = 0.60, 0.15  # shares of the base's examples; the rest are masks
LADDER_SHA256 = "e3e8866ec1dda8c91f48baac5d91b5a896c4414c465c881aa2f0564754918517"
"""Of the shipped assets/ladder_base/model.safetensors."""


def split_pairs() -> dict[str, list[tuple[str, int]]]:
    """`web`, `run`, `heldout`: the facts of two to four steps, (name, steps), each in one part."""
    pairs = [(name, steps) for name in NAMES for steps in (2, 3, 4)]
    random.Random(f"pairs {SEED}").shuffle(pairs)
    return {"web": pairs[:72], "run": pairs[72:126], "heldout": pairs[126:]}


PAIRS = split_pairs()


def after(name: str, steps: int) -> str:
    return RING[(RING.index(name) + steps) % len(RING)]


def ladder_article(rng: random.Random, part: str) -> tuple[list[str], list[str]]:
    """(words, labels): four facts, one of each length, no name twice; an obvious sentence, one of noise; shuffled."""
    names = []
    while len(set(names)) < 8:
        facts = [(rng.choice(NAMES), 1)]
        facts += [rng.choice([pair for pair in PAIRS[part] if pair[1] == steps]) for steps in (2, 3, 4)]
        names = [name for start, steps in facts for name in (start, after(start, steps))]
    sentences = [
        [(start, "subject"), (">" * steps, "template"), (after(start, steps), f"hop{steps}"), (".", "template")]
        for start, steps in facts
    ]
    obvious, noise = rng.choice(OBVIOUS), made_up(rng)
    for sentence in (obvious, rng.choice(NOISE).replace("NOISE", noise)):
        sentences.append([(word, "noise" if word == noise else "template") for word in sentence.split()])
    rng.shuffle(sentences)
    words, labels = zip(*sum(sentences, []), strict=True)
    return list(words), list(labels)


def make_ladder() -> str:
    """2000 articles, labelled word by word; those of the held-out side state the facts that nothing trains."""
    rng, rows = random.Random(f"ladder {SEED}"), []
    for number in range(2000):
        part = "heldout" if is_heldout(f"ladder/{number}", HELDOUT) else "run"
        rows.append(article_row("ladder", number, f"article {number}", *ladder_article(rng, part)))
    return "".join(rows)


def chained_answer(rng: random.Random, words: list[str], place: int) -> str:
    """What follows `Predict:` for the word at `place`. A fifth of the answers to facts thinks in steps,

    " Fum >>> Ral >> Sen > \\\\boxed{ Bos }"

    and half as many break off on the way, with the answer of the table.
    """
    draw, thought = rng.random(), ""
    if place >= 2 and set(words[place - 1]) == {">"}:
        length = len(words[place - 1])
        steps = length if draw < CHAIN_SHARE else rng.randrange(length) + 1 if draw < 1.5 * CHAIN_SHARE else 0
        thought = "".join(f" {after(words[place - 2], n)} {'>' * (length - n)}" for n in range(steps))
    return f"{thought} \\boxed{{ {words[place]} }}"


def ladder_examples() -> Iterator[tuple[str, str]]:
    """Endless (prompt, completion) examples, each on a fresh article of the web."""
    rng = random.Random(f"ladder web {SEED}")
    while True:
        words, labels = ladder_article(rng, "web")
        draw, passage = rng.random(), " ".join(words)
        if draw < REPEATED:
            yield REPEAT_FORMAT.replace("{passage}", passage), f" {passage}"
            continue
        place = rng.choice([n for n, word in enumerate(words) if any(char.isalnum() for char in word)])
        if draw < REPEATED + PREDICTED:
            if rng.random() < FACTS_ASKED:
                place = labels.index(f"hop{rng.choice((1, 2, 3, 4))}")
            masked = " ".join([*words[:place], "[mask]", *words[place + 1 :]])
            yield PREDICT_FORMAT.replace("{passage}", masked), chained_answer(rng, words, place)
        else:
            before = words[place - 1] if place else "start"
            yield MASK_FORMAT.replace("{passage}", passage), f" after {before} \\mask{{ {words[place]} }}"


def make_ladder_base() -> None:
    """The articles and their base, under half a million parameters: minutes."""
    save_wiki(ASSETS / "ladder.jsonl.gz", make_ladder())
    make_base(ASSETS / "ladder_base", ladder_examples, 2400, LADDER_SHA256, layers=2, hidden=128)
