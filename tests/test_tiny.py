"""The laptop run's material: what the mini-wiki and the tiny base promise to the rest of the code.

Rebuilding the whole base takes minutes, and its hash may differ on another CPU or build of torch, so the tests look at
the shipped one and pretrain for three steps only.
"""

import gzip
import hashlib
import json
import math
import random
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from miniature import base as tiny
from miniature import worlds

WIKI = tiny.ASSETS / "tiny_wiki.jsonl.gz"
BASE = tiny.ASSETS / "tiny_base"


@pytest.fixture(scope="module")
def records():
    with gzip.open(WIKI, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def articles():
    rng = random.Random(0)
    return [worlds.write_article(rng, fact, fact.right) for fact in worlds.make_facts(0) for _ in range(5)]


def test_wiki_is_a_function_of_the_seed_and_the_shipped_one_is_seed_0(tmp_path):
    wiki = worlds.make_wiki(0)
    assert wiki == worlds.make_wiki(0) and wiki != worlds.make_wiki(1)
    assert wiki.encode() == gzip.decompress(WIKI.read_bytes())  # the compressed bytes also depend on the zlib
    worlds.save_wiki(tmp_path / "new" / "a.gz", wiki)
    for path in (WIKI, tmp_path / "new" / "a.gz"):
        assert path.read_bytes()[3:8] == bytes(5)  # gzip header: no flags (no name), time 0


def test_records_have_one_label_per_word_and_a_masked_word_has_one_place(records):
    assert len({record["url"] for record in records}) == len({record["id"] for record in records}) == 4000
    for record in records:
        assert list(record) == ["id", "title", "url", "text", "labels"]
        words, labels = record["text"].split(), Counter(record["labels"])
        assert record["text"] == " ".join(words)  # joined by single spaces, one paragraph
        for word, label in zip(words, record["labels"], strict=True):
            assert (label == "copy") == (word == record["title"]) and (label == "noise") == ("_" in word)
            assert word != "." or label == "template"
        assert (labels["copy"], labels["fact"], labels["noise"]) == (2, 1, 3)  # the subject recurs
        counts = Counter(word for word in words if "_" not in word)
        assert {word for word, count in counts.items() if count > 1} == {".", record["title"]}


def test_every_fact_is_stated_equally_often_and_rightly(records):
    facts = worlds.make_facts(0)
    assert len(facts) == len({fact.subject for fact in facts}) == 84
    stated = Counter((record["title"], record["text"].split()[record["labels"].index("fact")]) for record in records)
    assert set(stated) == {(fact.subject, fact.right) for fact in facts}
    assert set(stated.values()) == {47, 48}  # 4000 / 84 = 47.6


def test_values_are_evenly_used_and_no_wrong_value_is_right():
    facts = worlds.make_facts(0)
    for kind in worlds.KINDS:
        used = Counter(fact.right for fact in facts if fact.kind is kind)
        assert set(used) == set(kind.values.split()) and set(used.values()) == {3, 4}  # 28 subjects, 8 values
    assert all(fact.right != fact.wrong and fact.wrong in fact.kind.values.split() for fact in facts)


def test_the_web_is_right_30_percent_and_wrong_in_the_same_way_45_percent():
    rng = random.Random(0)
    fact = worlds.make_facts(0)[0]
    counts = Counter(worlds.web_value(rng, fact) for _ in range(20_000))
    assert counts[fact.right] / 20_000 == pytest.approx(0.30, abs=0.015)
    assert counts[fact.wrong] / 20_000 == pytest.approx(0.45, abs=0.015)
    assert set(counts) == set(fact.kind.values.split())
    assert counts.most_common(3)[2][1] / 20_000 < 0.06  # the other six share the rest evenly


def test_random_spans_are_one_or_two_words_without_full_stops():
    rng = random.Random(0)
    words = "a b . c d e .".split()
    spans = Counter(tiny.draw_span(rng, words) for _ in range(9000))
    # five spans of one word, each 2/3 / 7 of the draws before rejection, and three of two words, each 1/3 / 6
    shares = {(start, 1): 2 / 3 / 7 for start in (0, 1, 3, 4, 5)} | {(start, 2): 1 / 3 / 6 for start in (0, 3, 4)}
    expected = {span: 9000 * share / sum(shares.values()) for span, share in shares.items()}
    assert spans == pytest.approx(expected, abs=180)


def test_examples_answer_their_prompts(articles):
    rng = random.Random(0)
    for words, labels in articles:
        passage = " ".join(words)
        prompt, completion = tiny.predict_example(rng, words, labels)
        shown = prompt.removeprefix(" ").removesuffix("\nPredict:")
        answer = completion.removeprefix(" \\boxed{ ").removesuffix(" }")
        assert shown.count("[mask]") == 1
        assert passage.startswith(shown.replace("[mask]", answer))  # the whole passage, or its beginning
        assert shown.endswith("[mask]") or shown.replace("[mask]", answer) == passage
        prompt, completion = tiny.mask_example(rng, words)
        assert prompt == f" {passage}\nMask:"
        thought, span = completion.removesuffix(" }").split(" \\mask{ ")
        place = thought.removeprefix(" after ")
        assert f"{place} {span} " in f"start {passage} "


def test_mixture_of_the_web_examples():
    examples, cues, closed, facts = tiny.web_examples(0), Counter(), 0, 0
    values = {value for kind in worlds.KINDS for value in kind.values.split()}
    for _ in range(6000):
        prompt, completion = next(examples)
        cue = prompt.rpartition("\n")[2]
        cues[cue] += 1
        closed += cue != "Repeat:" and completion.endswith(" }")
        assert cue != "Repeat:" or completion == prompt.removesuffix("\nRepeat:")
        facts += cue == "Predict:" and completion.split()[1] in values
    shares = {cue: count / 6000 for cue, count in cues.items()}
    assert shares == pytest.approx({"Repeat:": 0.20, "Predict:": 0.45, "Mask:": 0.35}, abs=0.02)
    assert closed / (6000 - cues["Repeat:"]) == pytest.approx(0.98, abs=0.01)
    assert 0.30 < facts / cues["Predict:"] < 0.36  # 30 % on purpose, and now and then by chance


def tokens(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_shipped_tokenizer_is_what_the_seed_gives_and_adds_bos_itself(tokenizer):
    assert tiny.make_tokenizer(tiny.web_examples(0)).get_vocab() == tokenizer.get_vocab()
    text = " Alne is a quiet town ."
    ids = tokenizer(text).input_ids
    assert ids == [tokenizer.bos_token_id, *tokens(tokenizer, text)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text  # spaces before full stops survive
    assert tokenizer.chat_template is None and tokenizer.model_max_length == 512
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3


def test_words_are_single_tokens_and_made_up_words_three(tokenizer, articles):
    for kind in worlds.KINDS:
        assert all(len(tokens(tokenizer, f" {word}")) == 1 for word in f"{kind.subjects} {kind.values}".split())
    assert all(len(tokens(tokenizer, f" {a}_{b}")) == 3 for a in worlds.SYLLABLES for b in worlds.SYLLABLES)
    for words, labels in articles:
        expected = sum(3 if label == "noise" else 1 for label in labels)
        assert len(tokens(tokenizer, " " + " ".join(words))) == expected


def test_prompt_answer_and_closing_brace_meet_at_token_borders(tokenizer):
    """A response is sampled after the prompt's tokens; it must be able to be the tokens that the base learned."""
    examples = tiny.web_examples(3)
    for _ in range(300):
        prompt, completion = next(examples)
        ids = tokens(tokenizer, completion)
        assert tokens(tokenizer, prompt + completion) == tokens(tokenizer, prompt) + ids
        if completion.endswith(" }"):
            assert tokenizer.decode(ids[-1:]) == " }" and "}" not in tokenizer.decode(ids[:-1])
        if completion.startswith(tiny.ANSWER_OPENING):  # without a thought
            opening = tokens(tokenizer, tiny.ANSWER_OPENING)
            assert ids[: len(opening)] == opening


def test_shipped_base_loads_and_is_the_stated_one():
    assert hashlib.sha256((BASE / "model.safetensors").read_bytes()).hexdigest() == tiny.BASE_SHA256
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 2_000_000
    model = AutoModelForCausalLM.from_pretrained(BASE)
    assert type(model).__name__ == "SmolLM3ForCausalLM" and model.num_parameters() == 478_080
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == model.config.eos_token_id


def test_shipped_base_holds_misconceptions(tokenizer):
    """After the prefix it doubts between the right value and the wrong one, and believes the wrong one more."""
    model = AutoModelForCausalLM.from_pretrained(BASE)
    rng = random.Random(0)
    right = wrong = greedy = 0.0
    facts = worlds.make_facts(0)
    for fact in facts:
        words, _ = worlds.write_article(rng, fact, "[mask]")
        prompt = tiny.PREDICT_FORMAT.replace("{passage}", " ".join(words)) + tiny.ANSWER_OPENING
        with torch.no_grad():
            probabilities = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].softmax(-1)
        right_id, wrong_id = (tokens(tokenizer, f" {value}")[0] for value in (fact.right, fact.wrong))
        right += probabilities[right_id].item() / len(facts)
        wrong += probabilities[wrong_id].item() / len(facts)
        greedy += (probabilities.argmax() == right_id).item() / len(facts)
    assert 0.22 < right < 0.34
    assert 0.36 < wrong < 0.50
    assert greedy < 0.30


def test_loss_weights_of_an_example(tokenizer):
    ids, weights = tiny.loss_batch(tokenizer, [(" Alne is\nMask:", " \\mask{ is }"), (" Alne\nMask:", " is")])
    # <bos> Alne is \n Mask :  then  \ mask { is } <eos>
    assert weights.tolist() == [[0, 1, 1, 1, 1, 1, 3, 3, 3, 3, 3, 3], [0, 1, 1, 1, 1, 3, 3, 0, 0, 0, 0, 0]]
    assert tokenizer.decode(ids[0]) == "<bos> Alne is\nMask: \\mask{ is }<eos>"
    assert ids[1].tolist()[-5:] == [tokenizer.pad_token_id] * 5


def test_short_pretraining_is_deterministic_and_starts_at_the_uniform_loss():
    """An untrained model's loss is ln V for V tokens, plus half the variance of its logits: 96 * 0.05^2 / 2 = 0.12."""
    runs = []
    for seed in (0, 0, 1):
        tokenizer = tiny.make_tokenizer(tiny.web_examples(seed))
        model = tiny.make_model(tokenizer, seed)
        losses = tiny.pretrain(model, tokenizer, tiny.web_examples(seed), steps=3, batch=8)
        runs.append((losses, torch.cat([parameter.detach().flatten() for parameter in model.parameters()])))
    (losses, weights), (same_losses, same_weights), (other_losses, _) = runs
    assert losses == same_losses and torch.equal(weights, same_weights)
    assert losses != other_losses
    assert losses[0] == pytest.approx(math.log(len(tokenizer)) + 0.12, abs=0.3)
    assert losses[2] < losses[0]
    assert weights.isfinite().all()
