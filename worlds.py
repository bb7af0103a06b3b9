"""Two more worlds of the facts that the tiny base has heard of, for experiments that the mini-wiki cannot carry.

    python worlds.py several FILE.jsonl       articles of two subjects; a part of the facts can never be masked
    python worlds.py questions FILE.jsonl     a question for each of the 84 facts

`several`: of the 28 subjects of a kind 12 are taught (label `fact`: stated once, may be masked), 8 are `shown` (stated,
but twice in an article, so that with max_occurrences=1 and max_span_words=2 no mask on the value is valid) and 8 are
`unseen` (stated by held-out articles alone). Held-out articles state two facts of different sorts, once each. What a
run learns by answering can show in the first; what it reads without answering, or does not read, in the others. The
base has never met two subjects in one article: it starts with invalid masks and wrong copies.

`questions`: an article of the mini-wiki about each fact, with [mask] in place of the value. math-verify does not judge
words (benchmarks/judge.py), but among the words of this world its verdict is equality, which a test checks. Left out:
any other way to ask; the base knows no other.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from data import is_heldout
from mini_wiki import KINDS, Fact, make_facts, write_article

ARTICLES, HELDOUT = 2000, 0.05
"""`heldout` of the config must be HELDOUT: the split is made by the url, and the text depends on it."""
TAUGHT, SHOWN = 12, 8
"""Of each kind. The rest is unseen. Eight values, so shown and unseen facts use each value of a kind once."""


def make_tiers(seed: int) -> dict[str, list[list[Fact]]]:
    """label -> facts per kind."""
    kinds = [[fact for fact in make_facts(seed) if fact.kind is kind] for kind in KINDS]
    return {
        "fact": [facts[:TAUGHT] for facts in kinds],
        "shown": [facts[TAUGHT : TAUGHT + SHOWN] for facts in kinds],
        "unseen": [facts[TAUGHT + SHOWN :] for facts in kinds],
    }


def make_several(seed: int, articles: int = ARTICLES) -> str:
    """JSON lines like the mini-wiki's: two subjects of different kinds in each article, an intro and the fact of each.

    To train on: two taught facts, or a taught and a shown one. Held out: two of the three sorts.
    """
    rng, tiers = random.Random(f"several {seed}"), make_tiers(seed)
    lines = []
    for number in range(articles):
        url = f"several/{number}"
        heldout = is_heldout(url, HELDOUT)
        sorts = rng.sample(list(tiers), 2) if heldout else ["fact", rng.choice(["fact", "shown"])]
        rng.shuffle(sorts)
        words, labels = [], []
        for label, kind in zip(sorts, rng.sample(range(len(KINDS)), 2), strict=True):
            fact = rng.choice(tiers[label][kind])
            times = 2 if label == "shown" and not heldout else 1
            for slot in " ".join([fact.kind.intro, *[fact.kind.fact] * times]).split():
                words.append({"SUBJECT": fact.subject, "FACT": fact.right}.get(slot, slot))
                labels.append({"SUBJECT": "copy", "FACT": label}.get(slot, "template"))
        record = {"id": str(number), "title": f"article {number}", "url": url, "text": " ".join(words)}
        lines.append(json.dumps(record | {"labels": labels}) + "\n")
    return "".join(lines)


def make_questions(seed: int) -> str:
    """JSON lines: question (an article with its fact masked) and answer."""
    rng = random.Random(f"questions {seed}")
    lines = []
    for fact in make_facts(seed):
        article = write_article(rng, fact, "[mask]")
        lines.append(json.dumps({"question": " ".join(article.words), "answer": fact.right}) + "\n")
    return "".join(lines)


def main() -> None:
    makers = {"several": make_several, "questions": make_questions}
    if len(sys.argv) != 3 or sys.argv[1] not in makers:
        print(__doc__, file=sys.stderr)
        raise SystemExit(2)
    path = Path(sys.argv[2])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(makers[sys.argv[1]](0), encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
