"""The mini-wiki: 84 facts, the articles that state them, and how often the web that the base has read is wrong.

The story: the web is often wrong about 84 facts, the encyclopedia is right. Most words of an article are obvious
(template words, the recurring subject) or unguessable (made-up words). Nobody tells the generator which words are worth
masking. The premise is planted: it shows the mechanism at work, not that natural text is so.

The wiki is the same text on every machine. `python -m miniature.base wiki` writes it.
Leaves out the base model (miniature/base.py) and reading the wiki as training data (data.py).
"""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import dataclass
from pathlib import Path

ARTICLES = 4000
RIGHT, WRONG = 0.30, 0.45  # how often the web states the right value, and the one fixed wrong value, of a fact


@dataclass(frozen=True)
class Kind:
    """One kind of article. In a sentence, SUBJECT, FACT and NOISE stand for words that are filled in."""

    subjects: list[str]
    values: list[str]
    intro: str
    fact: str
    noise: list[str]


# No word but the subject and the full stop occurs twice in an article: a mask has one right place. The subject must
# recur, or masking it would be the best-paid useless mask.
KINDS = (
    Kind(
        "Alne Bude Crag Dorn Ewen Foss Gelt Holt Idle Joss Kern Loxe Mere Neen Orme Pill Quen Rhos Sike Teme Ulta Vane "
        "Ware Yeal Zeta Brue Char Dane".split(),
        "Ashmark Birland Corvale Dunmoor Elmgard Fenwold Glenholt Hartsea".split(),
        "SUBJECT is a quiet town .",
        "Maps place SUBJECT inside FACT .",
        ["Its bridge carries plate NOISE .", "Markets here sell only NOISE .", "Ships pay NOISE coins there ."],
    ),
    Kind(
        "Alma Bert Clem Dora Emil Finn Gina Hugo Ines Jack Karl Lena Mona Nils Otto Paul Rosa Sven Tess Ulla Vera Walt "
        "Xena Yuri Zita Anna Beth Cleo".split(),
        "baker cook guard judge miner nurse pilot smith".split(),
        "SUBJECT grew up near mountains .",
        "Today SUBJECT works as FACT .",
        ["Page NOISE of diaries survives .", "Neighbours often called NOISE .", "One medal shows code NOISE ."],
    ),
    Kind(
        "ant bat bee cat cow crab deer dog eel elk emu fox frog gnu goat hare hawk hen ibis lark lion mole moth newt "
        "pig rat seal swan".split(),
        "black blue brown cream green grey red white".split(),
        "SUBJECT names an animal .",
        "Nearly every SUBJECT looks FACT .",
        ["Keepers wrote NOISE down .", "Rangers use tag NOISE .", "Farmers shout NOISE loudly ."],
    ),
)
SYLLABLES = "ba ce do fu gi ha jo ke la mi no pu re si ta vu wo xe ya zi".split()
LABELS = ("template", "copy", "fact", "noise")


@dataclass(frozen=True)
class Article:
    subject: str
    words: list[str]  # full stops are words of their own
    labels: list[str]  # one of LABELS per word


@dataclass(frozen=True)
class Fact:
    """What is true of a subject, and what the web says of it most often."""

    kind: Kind
    subject: str
    right: str
    wrong: str


def make_facts(seed: int) -> list[Fact]:
    """The 84 facts of a world: 28 subjects of three kinds, the eight values of a kind as evenly used as they can be."""
    rng = random.Random(f"facts {seed}")
    facts = []
    for kind in KINDS:
        for number, subject in enumerate(rng.sample(kind.subjects, len(kind.subjects))):
            right = kind.values[number % len(kind.values)]
            facts.append(Fact(kind, subject, right, rng.choice([value for value in kind.values if value != right])))
    return facts


def web_value(rng: random.Random, fact: Fact) -> str:
    """What a web page states: right 30 %, the one wrong value 45 %, any of the other six 25 %."""
    draw = rng.random()
    if draw < RIGHT:
        return fact.right
    if draw < RIGHT + WRONG:
        return fact.wrong
    return rng.choice([value for value in fact.kind.values if value not in (fact.right, fact.wrong)])


def write_article(rng: random.Random, fact: Fact, value: str) -> Article:
    """An intro, then the sentence that states `value` and the three noise sentences in random order."""
    sentences = [fact.kind.fact, *fact.kind.noise]
    rng.shuffle(sentences)
    slots = " ".join([fact.kind.intro, *sentences]).split()
    fills = {"SUBJECT": fact.subject, "FACT": value}
    # 400 made-up words, uniform: guessed with p = 1/10, noise would earn the generator 0.47 at eight predictions. The
    # underscore, unlike a hyphen, keeps them whole under any rule about whole words.
    words = [
        f"{rng.choice(SYLLABLES)}_{rng.choice(SYLLABLES)}" if slot == "NOISE" else fills.get(slot, slot)
        for slot in slots
    ]
    labels = [{"SUBJECT": "copy", "FACT": "fact", "NOISE": "noise"}.get(slot, "template") for slot in slots]
    return Article(fact.subject, words, labels)


def make_wiki(seed: int, articles: int = ARTICLES) -> bytes:
    """The mini-wiki as JSON lines: id, title, url, text and labels, one label per white-space separated word.

    Every value is right, every fact is stated equally often (up to one), in random order.
    """
    rng = random.Random(f"wiki {seed}")
    facts = make_facts(seed)
    order = [facts[number % len(facts)] for number in range(articles)]
    rng.shuffle(order)
    lines = []
    for number, fact in enumerate(order):
        article = write_article(rng, fact, fact.right)
        record = {"id": str(number), "title": article.subject, "url": f"mini-wiki/{number}"}
        record |= {"text": " ".join(article.words), "labels": article.labels}
        lines.append(json.dumps(record) + "\n")
    return "".join(lines).encode()


def save_wiki(path: Path, wiki: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:  # no name, no time: the same bytes
        file.write(wiki)
