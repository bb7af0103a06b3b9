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

WIKI_ARTICLES, SEVERAL_ARTICLES = 4000, 2000
RIGHT_SHARE, WRONG_SHARE = 0.30, 0.45  # how often the web states the right value of a fact, and its fixed wrong value
SEVERAL_HELDOUT = 0.05  # a run's `heldout` must be the same: the split is made by the url, and the text depends on it
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


def make_facts(seed: int) -> list[Fact]:
    """The 84 facts: 28 subjects of each kind, which use the kind's eight values as evenly as they can."""
    rng = random.Random(f"facts {seed}")
    facts = []
    for kind in KINDS:
        subjects, values = kind.subjects.split(), kind.values.split()
        for number, subject in enumerate(rng.sample(subjects, len(subjects))):
            right = values[number % len(values)]
            facts.append(Fact(kind, subject, right, rng.choice([value for value in values if value != right])))
    return facts


def web_value(rng: random.Random, fact: Fact) -> str:
    """What a web page states: right 30 %, the fixed wrong value 45 %, any of the other six 25 %."""
    draw = rng.random()
    if draw < RIGHT_SHARE + WRONG_SHARE:
        return fact.right if draw < RIGHT_SHARE else fact.wrong
    return rng.choice([value for value in fact.kind.values.split() if value not in (fact.right, fact.wrong)])


def fill_slots(rng: random.Random, sentences: list[str], fact: Fact, value: str, label: str = "fact"):
    """Sentences with slots -> (words, labels), one label a word; `label` is the value's. Full stops are words."""
    # 400 made-up words, uniform: guessed with p = 1/10, noise would earn the generator 0.47 at eight predictions. The
    # underscore, unlike a hyphen, keeps them whole under any rule about whole words.
    words, labels = [], []
    for slot in " ".join(sentences).split():
        made_up = f"{rng.choice(SYLLABLES)}_{rng.choice(SYLLABLES)}" if slot == "NOISE" else slot
        words.append({"SUBJECT": fact.subject, "FACT": value}.get(slot, made_up))
        labels.append({"SUBJECT": "copy", "FACT": label, "NOISE": "noise"}.get(slot, "template"))
    return words, labels


def write_article(rng: random.Random, fact: Fact, value: str) -> tuple[list[str], list[str]]:
    """(words, labels): an intro, then the sentence that states `value` and the three noise sentences, shuffled."""
    sentences = [fact.kind.fact, *fact.kind.noise]
    rng.shuffle(sentences)
    return fill_slots(rng, [fact.kind.intro, *sentences], fact, value)


def make_wiki(seed: int, articles: int = WIKI_ARTICLES) -> str:
    """The mini-wiki as JSON lines. Every value is right; every fact is stated equally often, up to one."""
    rng = random.Random(f"wiki {seed}")
    facts = make_facts(seed)
    order = [facts[number % len(facts)] for number in range(articles)]
    rng.shuffle(order)
    lines = []
    for number, fact in enumerate(order):
        words, labels = write_article(rng, fact, fact.right)
        record = {"id": str(number), "title": fact.subject, "url": f"mini-wiki/{number}", "text": " ".join(words)}
        lines.append(json.dumps(record | {"labels": labels}) + "\n")
    return "".join(lines)


def save_wiki(path: Path, wiki: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:  # no name, no time: the same bytes
        file.write(wiki.encode())


def split_facts(seed: int) -> dict[str, list[list[Fact]]]:
    """label -> the facts of each kind that carry it in `several`."""
    kinds = [[fact for fact in make_facts(seed) if fact.kind is kind] for kind in KINDS]
    ranges = {"fact": (0, 12), "shown": (12, 20), "unseen": (20, 28)}  # of a kind; each of 8 values is shown once
    return {label: [facts[start:end] for facts in kinds] for label, (start, end) in ranges.items()}


def make_several(seed: int, articles: int = SEVERAL_ARTICLES) -> str:
    """Articles about two subjects of different kinds, an intro and the fact of each; JSON lines like the mini-wiki's.

    Training articles state two taught facts (label `fact`, once, may be masked), or a taught and a `shown` one. A shown
    fact stands twice: with max_occurrences=1 and max_span_words=2 no mask on its value is valid. Held-out articles
    state two facts with different labels, once each; `unseen` facts stand in these alone. The base has never met two
    subjects in one article: it starts with invalid masks and wrong copies.
    """
    rng, facts = random.Random(f"several {seed}"), split_facts(seed)
    lines = []
    for number in range(articles):
        url = f"several/{number}"
        heldout = is_heldout(url, SEVERAL_HELDOUT)
        pair = rng.sample(list(facts), 2) if heldout else ["fact", rng.choice(["fact", "shown"])]
        rng.shuffle(pair)
        words, labels = [], []
        for label, kind in zip(pair, rng.sample(range(len(KINDS)), 2), strict=True):
            fact = rng.choice(facts[label][kind])
            times = 2 if label == "shown" and not heldout else 1
            sentences = [fact.kind.intro, *[fact.kind.fact] * times]
            more_words, more_labels = fill_slots(rng, sentences, fact, fact.right, label)
            words, labels = words + more_words, labels + more_labels
        record = {"id": str(number), "title": f"article {number}", "url": url, "text": " ".join(words)}
        lines.append(json.dumps(record | {"labels": labels}) + "\n")
    return "".join(lines)


def make_questions(seed: int) -> str:
    """JSON lines of question (an article of the mini-wiki with [mask] in place of the value) and answer.

    math-verify does not judge words, but among the words of this world its verdict is equality, which a test checks.
    """
    rng = random.Random(f"questions {seed}")
    articles = ((write_article(rng, fact, "[mask]")[0], fact.right) for fact in make_facts(seed))
    return "".join(json.dumps({"question": " ".join(words), "answer": right}) + "\n" for words, right in articles)
