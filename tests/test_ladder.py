"""The ladder: facts that follow from single steps, split into those that the web, the run and nobody states."""

import gzip
import json
import random
from collections import Counter
from itertools import islice

import pytest
from reference import tiny_config

import eval as probes
from data import Passage
from masking import Mask, make_mask
from miniature import ladder
from prompts import last_answer
from rollout import Rollout


def facts(words: list[str]) -> list[tuple[str, int, str]]:
    """(name, steps, name) of each fact that the words state."""
    return [(words[n - 1], len(w), words[n + 1]) for n, w in enumerate(words) if set(w) == {">"}]


def test_the_names_stand_in_one_ring_and_each_longer_fact_is_in_one_part():
    assert len(set(ladder.NAMES)) == 60 and {ladder.after("Bal", steps) for steps in range(60)} == set(ladder.NAMES)
    assert ladder.after("Bal", 60) == "Bal" and ladder.after(ladder.after("Bal", 1), 2) == ladder.after("Bal", 3)
    assert {part: len(pairs) for part, pairs in ladder.PAIRS.items()} == {"web": 72, "run": 54, "heldout": 54}
    assert len(set(sum(ladder.PAIRS.values(), []))) == 180


def test_articles_state_the_facts_of_their_side_and_no_name_twice():
    articles = ladder.make_ladder()
    assert articles.encode() == gzip.decompress((ladder.ASSETS / "ladder.jsonl.gz").read_bytes())  # the shipped ones
    rows, heldout = [json.loads(line) for line in articles.splitlines()], 0
    assert len(rows) == 2000
    for row in rows:
        words, side = row["text"].split(), ladder.is_heldout(row["url"], ladder.HELDOUT)
        heldout += side
        stated = facts(words)
        assert sorted(depth for _, depth, _ in stated) == [1, 2, 3, 4]
        assert all(ladder.after(name, depth) == end for name, depth, end in stated)
        assert len({name for one in stated for name in (one[0], one[2])}) == 8
        part = ladder.PAIRS["heldout" if side else "run"]
        assert {(name, depth) for name, depth, _ in stated if depth > 1} <= set(part)
        labels = Counter(row["labels"])
        assert [labels[f"hop{n}"] for n in (1, 2, 3, 4)] == [1] * 4 and labels["subject"] == 4 and labels["noise"] == 1
    assert 25 < heldout < 200


def test_every_fact_can_be_masked_and_no_number_of_steps():
    config = tiny_config("", mask_rule="one_mask_words", max_occurrences=1, max_span_words=1)
    for line in ladder.make_ladder().splitlines()[:30]:
        row = json.loads(line)
        passage = Passage(row["id"], "", "", row["text"], row["labels"])
        for word, label in zip(row["text"].split(), row["labels"], strict=True):
            mask = make_mask(word, passage, config, random.Random(0))
            assert (mask.invalid == "") == any(char.isalnum() for char in word) and mask.label in ("", label)


def test_a_thought_counts_down_and_ends_in_the_answer():
    second, third, end = (ladder.after("Bal", steps) for steps in (1, 2, 3))
    words = f"Bal >>> {end} .".split()
    whole = f" Bal >>> {second} >> {third} > \\boxed{{ {end} }}"
    found = Counter(ladder.chained_answer(random.Random(n), words, 2) for n in range(4000))
    assert set(found) == {whole, f" Bal >>> {second} >> \\boxed{{ {end} }}", f" Bal >>> \\boxed{{ {end} }}",
                          f" \\boxed{{ {end} }}"}  # fmt: skip
    assert found[whole] / 4000 == pytest.approx(0.2 + 0.1 / 3, abs=0.03)  # some break off after the last step
    assert found[f" \\boxed{{ {end} }}"] / 4000 == pytest.approx(0.7, abs=0.03)
    assert {ladder.chained_answer(random.Random(n), words, 0) for n in range(50)} == {" \\boxed{ Bal }"}  # no fact


def test_the_web_states_no_fact_of_a_run():
    web = set(ladder.PAIRS["web"])
    for prompt, completion in islice(ladder.ladder_examples(), 300):
        whole = [one for one in facts(prompt.split()) if "[mask]" not in one and one[1] > 1]
        assert {(name, depth) for name, depth, _ in whole} <= web, prompt
        assert "Predict:" not in prompt or last_answer(completion, "boxed")


def test_a_thought_is_exchanged_with_that_of_the_next_passage(build_sampler, folders, monkeypatch):
    """Two passages with two masks each: the answer behind another passage's thought, and what that costs."""
    sampler = build_sampler(folders["smollm3"])
    texts = [" one \\boxed{a}", " two \\boxed{b}", " three \\boxed{c}", " four"]
    groups = [[Rollout([1], [1], [0.0], text, "answer" if "box" in text else "length")] for text in texts]
    sources = [Passage("1", "", "", "x")] * 2 + [Passage("2", "", "", "y")] * 2
    masks = [Mask("a", masked=f"[mask] {n}", target="a") for n in range(4)]
    probe = probes.Probe(sources, masks, lambda sampler, masked: sampler.tokenizer(masked).input_ids, sources)
    asked = []

    def rollout(sampler, prompts, count, longest, opening, noise, prefix):
        asked.extend(sampler.tokenizer.decode(ids) for ids in prompts)
        return [[Rollout([1], [1], [0.0], "a}" if n < 1 else "z}", "answer")] for n in range(4)]

    monkeypatch.setattr(probes, "rollout", rollout)
    found = probes.thought_use(probe, sampler, groups, [[1.0], [0.0], [1.0], [0.0]], 0)
    assert found == {"probe/thought_use": 0.5 - 0.25}
    ends = ["three \\boxed{", "three \\boxed{", "one \\boxed{", "one \\boxed{"]  # a thought cut off counts as none
    assert [text.split("[mask]")[1][3:].strip() for text in asked] == ends
    silent = [[Rollout([1], [1], [0.0], " \\boxed{a}", "answer")]] * 4
    assert probes.thought_use(probe, sampler, silent, [[1.0]] * 4, 0) == {}


