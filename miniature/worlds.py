"""The made-up worlds, which all state the same 84 facts: the mini-wiki, articles about two subjects, and questions.

The web is often wrong about the facts, and the encyclopedia is right. Most words of an article are obvious (template
words, the recurring subject) or unguessable (made-up words). Nobody tells the generator which words are worth masking.
The premise is planted: it shows the mechanism at work, not that natural text is so.
"""

import gzip
import json
import random
from pathlib import Path
from typing import NamedTuple

from data import is_heldout

SEED = 0  # another number makes other facts, other texts and, after `make base`, another base
RIGHT_SHARE, WRONG_SHARE = 0.30, 0.45  # how often the web states the right value of a fact, and its fixed wrong value
HELDOUT = 0.05  # a run's `heldout` must be the same: the split is made by the url, and the text depends on it
SYLLABLES = "ba ce do fu gi ha jo ke la mi no pu re si ta vu wo xe ya zi".split()


class Kind(NamedTuple):  # of article; SUBJECT, FACT and NOISE stand for words that are filled in
    subjects: str
    values: str
    intro: str
    fact: str
    noise: tuple[str, ...]


# No word but the subject and the full stop occurs twice in an article: a mask has one right place. The subject must
# recur, or masking it would be the best-paid useless mask.
KINDS = (
    Kind("Alne Bude Crag Dorn Ewen Foss Gelt Holt Idle Joss Kern Loxe Mere Neen Orme Pill Quen Rhos Sike Teme Ulta "
         "Vane Ware Yeal Zeta Brue Char Dane", "Ashmark Birland Corvale Dunmoor Elmgard Fenwold Glenholt Hartsea",
         "SUBJECT is a quiet town .", "Maps place SUBJECT inside FACT .",
         ("Its bridge carries plate NOISE .", "Markets here sell only NOISE .", "Ships pay NOISE coins there .")),
    Kind("Alma Bert Clem Dora Emil Finn Gina Hugo Ines Jack Karl Lena Mona Nils Otto Paul Rosa Sven Tess Ulla Vera "
         "Walt Xena Yuri Zita Anna Beth Cleo", "baker cook guard judge miner nurse pilot smith",
         "SUBJECT grew up near mountains .", "Today SUBJECT works as FACT .",
         ("Page NOISE of diaries survives .", "Neighbours often called NOISE .", "One medal shows code NOISE .")),
    Kind("ant bat bee cat cow crab deer dog eel elk emu fox frog gnu goat hare hawk hen ibis lark lion mole moth newt "
         "pig rat seal swan", "black blue brown cream green grey red white",
         "SUBJECT names an animal .", "Nearly every SUBJECT looks FACT .",
         ("Keepers wrote NOISE down .", "Rangers use tag NOISE .", "Farmers shout NOISE loudly .")),
)  # fmt: skip


class Fact(NamedTuple):
    kind: Kind
    subject: str
    right: str
    wrong: str  # the value that the web states most often


def make_facts() -> list[Fact]:
    """The 84 facts: 28 subjects of each kind, which use the kind's eight values as evenly as they can."""
    rng = random.Random(f"facts {SEED}")
    facts = []
    for kind in KINDS:
        subjects, values = kind.subjects.split(), kind.values.split()
        for number, subject in enumerate(rng.sample(subjects, len(subjects))):
            right = values[number % len(values)]
            facts.append(Fact(kind, subject, right, rng.choice([value for value in values if value != right])))
    return facts


FACTS = make_facts()


def web_value(rng: random.Random, fact: Fact) -> str:
    """What a web page states: right 30 %, the fixed wrong value 45 %, any of the other six 25 %."""
    draw = rng.random()
    others = [value for value in fact.kind.values.split() if value not in (fact.right, fact.wrong)]
    return fact.right if draw < RIGHT_SHARE else fact.wrong if draw < RIGHT_SHARE + WRONG_SHARE else rng.choice(others)


def made_up(rng: random.Random) -> str:
    """One of 400 words, uniform: guessed with p = 1/10, noise would earn the generator 0.47 at eight predictions. The
    underscore, unlike a hyphen, keeps the word whole under any rule about whole words."""
    return f"{rng.choice(SYLLABLES)}_{rng.choice(SYLLABLES)}"


def fill_slots(rng: random.Random, sentences: list[str], fact: Fact, value: str, label: str = "fact"):
    """Sentences with slots -> (words, labels), one label a word; `label` is the value's. Full stops are words."""
    words, labels = [], []
    for slot in " ".join(sentences).split():
        words.append(made_up(rng) if slot == "NOISE" else {"SUBJECT": fact.subject, "FACT": value}.get(slot, slot))
        labels.append({"SUBJECT": "copy", "FACT": label, "NOISE": "noise"}.get(slot, "template"))
    return words, labels


def write_article(rng: random.Random, fact: Fact, value: str) -> tuple[list[str], list[str]]:
    """(words, labels): an intro, then the sentence that states `value` and the three noise sentences, shuffled."""
    sentences = [fact.kind.fact, *fact.kind.noise]
    rng.shuffle(sentences)
    return fill_slots(rng, [fact.kind.intro, *sentences], fact, value)


def article_row(world: str, number: int, title: str, words: list[str], labels: list[str]) -> str:
    """An article as a JSON line."""
    row = {"id": str(number), "title": title, "url": f"{world}/{number}", "text": " ".join(words), "labels": labels}
    return json.dumps(row) + "\n"


def make_wiki() -> str:
    """The mini-wiki, 4000 articles. Every value is right; every fact is stated equally often, up to one."""
    rng = random.Random(f"wiki {SEED}")
    order = [FACTS[number % len(FACTS)] for number in range(4000)]
    rng.shuffle(order)
    articles = [(fact.subject, *write_article(rng, fact, fact.right)) for fact in order]
    return "".join(article_row("mini-wiki", number, *article) for number, article in enumerate(articles))


def save_wiki(path: Path, wiki: str) -> None:
    """Write it compressed, without name and time: the same bytes each time."""
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
        file.write(wiki.encode())


PARTS = {"fact": range(12), "shown": range(12, 20), "unseen": range(20, 28)}
"""Of `several`: which of a kind's 28 facts carry the label. Each of the eight values is shown once."""


def make_several() -> str:
    """2000 articles about two subjects of different kinds, an intro and the fact of each.

    Training articles state two taught facts (label `fact`, once, may be masked), or a taught and a `shown` one. A shown
    fact stands twice: with max_occurrences=1 and max_span_words=2 no mask on its value is valid. Held-out articles
    state two facts with different labels, once each; `unseen` facts stand in these alone. The base has never met two
    subjects in one article: it starts with invalid masks and wrong copies.
    """
    rng, rows = random.Random(f"several {SEED}"), []
    for number in range(2000):
        heldout = is_heldout(f"several/{number}", HELDOUT)
        pair = rng.sample(list(PARTS), 2) if heldout else ["fact", rng.choice(["fact", "shown"])]
        rng.shuffle(pair)
        words, labels = [], []
        for label, kind in zip(pair, rng.sample(range(len(KINDS)), 2), strict=True):
            fact = FACTS[28 * kind + rng.choice(PARTS[label])]
            times = 2 if label == "shown" and not heldout else 1
            sentences = [fact.kind.intro, *[fact.kind.fact] * times]
            more_words, more_labels = fill_slots(rng, sentences, fact, fact.right, label)
            words, labels = words + more_words, labels + more_labels
        rows.append(article_row("several", number, f"article {number}", words, labels))
    return "".join(rows)


def make_questions() -> str:
    """JSON lines of question (an article of the mini-wiki with [mask] in place of the value) and answer.

    math-verify does not judge words, but among the words of this world its verdict is equality, which a test checks.
    """
    rng = random.Random(f"questions {SEED}")
    articles = ((write_article(rng, fact, "[mask]")[0], fact.right) for fact in FACTS)
    return "".join(json.dumps({"question": " ".join(words), "answer": right}) + "\n" for words, right in articles)
