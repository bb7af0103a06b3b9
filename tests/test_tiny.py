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


def test_the_shipped_wiki_is_the_one_that_is_made(tmp_path):
    wiki = worlds.make_wiki()
    assert wiki.encode() == gzip.decompress(WIKI.read_bytes())  # the compressed bytes also depend on the zlib
    worlds.save_wiki(tmp_path / "a.gz", wiki)
    for path in (WIKI, tmp_path / "a.gz"):
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
    facts = worlds.FACTS
    assert len(facts) == len({fact.subject for fact in facts}) == 84
    stated = Counter((record["title"], record["text"].split()[record["labels"].index("fact")]) for record in records)
    assert set(stated) == {(fact.subject, fact.right) for fact in facts}
    assert set(stated.values()) == {47, 48}  # 4000 / 84 = 47.6


def tokens(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_shipped_tokenizer_is_the_one_that_is_made_and_adds_bos_itself(tokenizer):
    assert tiny.make_tokenizer(tiny.web_examples()).get_vocab() == tokenizer.get_vocab()
    text = " Alne is a quiet town ."
    ids = tokenizer(text).input_ids
    assert ids == [tokenizer.bos_token_id, *tokens(tokenizer, text)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text  # spaces before full stops survive
    assert tokenizer.chat_template is None and tokenizer.model_max_length == 512
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3


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
    facts = worlds.FACTS
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


def test_short_pretraining_is_deterministic_and_starts_at_the_uniform_loss():
    """An untrained model's loss is ln V for V tokens, plus half the variance of its logits: 96 * 0.05^2 / 2 = 0.12."""
    runs = []
    for _ in range(2):
        tokenizer = tiny.make_tokenizer(tiny.web_examples())
        model = tiny.make_model(tokenizer)
        losses = tiny.pretrain(model, tokenizer, tiny.web_examples(), steps=3, batch=8)
        runs.append((losses, torch.cat([parameter.detach().flatten() for parameter in model.parameters()])))
    (losses, weights), (same_losses, same_weights) = runs
    assert losses == same_losses and torch.equal(weights, same_weights)
    assert losses[0] == pytest.approx(math.log(len(tokenizer)) + 0.12, abs=0.3)
    assert losses[2] < losses[0]
    assert weights.isfinite().all()
