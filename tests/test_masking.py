"""From the generator's words to the predictor's task, rule by rule."""

import random
import unicodedata
from collections import Counter
from types import SimpleNamespace

import pytest

from config import Config
from data import Corpus, Passage
from text.files import DataError
from eval import make_probe
from masking import Mask, labelled_mask, make_mask, mask_at, random_span, word_spans
from rewards import answerable, exact_match


def passage(text: str, labels: list[str] | None = None) -> SimpleNamespace:
    return SimpleNamespace(id="1", title="Title", url="", text=text, labels=labels)


def mask(words: str | None, text: str, **config) -> Mask:
    return make_mask(words, passage(text), Config(**config), random.Random(0))


def test_a_mask_by_hand():
    assert mask(" Rome\n", "Rome is old. Rome is big.") == Mask(words="Rome", masked="[mask] is old. [mask] is big.",
                                                                target="Rome", occurrences=2, start=0, label="content")


MAIN = [
    ("ell", "hello well", "h[mask]o w[mask]"), ("aa", "aaaa", "[mask][mask]"), ("aa", "aaaaa", "[mask][mask]a"),
    ("aba", "ababa", "[mask]ba"), ("a", "a", "[mask]"), ("start", "start and end", "[mask] and end"),
    ("end", "start and end", "start and [mask]"), ("1", "1, 2, 1", "[mask], 2, [mask]"),
    ("a.c", "abc a.c", "abc [mask]"), ("C++ (1985)", "In C++ (1985) it", "In [mask] it"),
    ("[a-z]*$", "x [a-z]*$ y", "x [mask] y"), (r"\d\1", r"5 \d\1 55", "5 [mask] 55"),
    ("{a}", "set {a} {b}", "set [mask] {b}"), ("{0}", "{0} {1}", "[mask] {1}"),
    ("北京", "我在北京。北京很大", "我在[mask]。[mask]很大"), ("Köln", "In Köln", "In [mask]"),
    ("naïve café", "a naïve café", "a [mask]"), ("🙂 ok", "so 🙂 ok", "so [mask]"),
    ("New York", "in New\nYork and New  York", "in [mask] and [mask]"), ("New\n York", "in New York", "in [mask]"),
    ("น้", "น้ำ น้", "น้ำ [mask]"), ("ｶ", "ｶﾞ ｶ", "ｶﾞ [mask]"), ("a 🇩", "a 🇩🇪 a 🇩", "a 🇩🇪 [mask]"),
    ("\u1112\u1161", "\u1112\u1161\u11ab \u1112\u1161", "\u1112\u1161\u11ab [mask]"),
    ("Rome", "Rome rome ROME", "[mask] rome ROME"), ("U.S.", "the U.S. and U.S.A.", "the [mask] and [mask]A."),
]  # fmt: skip
WORDS = [
    ("art", "art, artist, (art) smart", "[mask], artist, ([mask]) smart"),
    ("art", "art_1 1art art1 art-1 art", "art_1 1art art1 [mask]-1 [mask]"), ("é", "é né é", "[mask] né [mask]"),
    ("Rome", "Rome's and pre-Rome.", "[mask]'s and pre-[mask]."),
    ("New York", "New York, New Yorkers", "[mask], New Yorkers"), ("(b)", "a (b) c", "a [mask] c"),
    ("1", "1 11 1.1", "[mask] 11 [mask].[mask]"), ("北京", "我在北京。北京很大", "我在[mask]。[mask]很大"),
    ("क", "कि क", "कि [mask]"), ("कि", "कि किय कि।", "[mask] किय [mask]।"), ("นี่", "ที่นี่", "ที่[mask]"),
    ("Kordoba", "in Kor\u00addoba\u200b, Kor", "in [mask]\u200b, Kor"), ("می", "می‌خواهم می", "می‌خواهم [mask]"),
    ("Kor", "Kor\u00addoba Kor\u200d x", "Kor\u00addoba [mask]\u200d x"), ("o", "Sa\u0303o o", "Sa\u0303o [mask]"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "words", "text", "masked"), [
    *(("main", *row) for row in MAIN), *(("words", *row) for row in WORDS),
])  # fmt: skip
def test_main_rule_replaces_every_occurrence_and_words_rule_those_that_are_whole_words(rule, words, text, masked):
    result = mask(words, text, mask_rule=rule)
    assert (result.invalid, result.masked) == ("", masked)
    assert (result.occurrences, result.start) == (masked.count("[mask]"), masked.index("[mask]"))
    assert text[result.start :].startswith(result.target) and exact_match(words, result.target) == 1.0


def test_words_rule_needs_a_whole_word():
    for words, text in (("art", "smart artist"), ("aa", "aaaa")):
        assert mask(words, text, mask_rule="words").invalid == "not_in_passage"


@pytest.mark.parametrize(("rule", "possible"), [
    ("one_mask", {"[mask] smart art", "art sm[mask] art", "art smart [mask]"}),
    ("one_mask_words", {"[mask] smart art", "art smart [mask]"}),
])  # fmt: skip
def test_one_mask_rules_replace_one_occurrence_at_random(rule, possible):
    text, config = passage("art smart art"), Config(mask_rule=rule)
    results = [make_mask("art", text, config, random.Random(seed)) for seed in range(300)]
    counts = Counter(result.masked for result in results)
    assert set(counts) == possible and min(counts.values()) > 300 / len(possible) * 0.7
    assert all(result.start == result.masked.index("[mask]") for result in results)
    assert {result.occurrences for result in results} == {len(possible)}  # those that stay are counted, too


@pytest.mark.parametrize("rule", ["main", "one_mask", "words", "one_mask_words"])
def test_seven_occurrences_are_valid_and_eight_are_not(rule):
    seven, eight = mask("ox", "ox " * 7, mask_rule=rule), mask("ox", "ox " * 8, mask_rule=rule)
    assert (seven.invalid, seven.occurrences) == ("", 7)
    assert (eight.invalid, eight.occurrences, eight.masked) == ("too_many_occurrences", 8, "")
    assert mask("ox", "ox ox", mask_rule=rule, max_occurrences=1).invalid == "too_many_occurrences"


@pytest.mark.parametrize(("words", "cause"), [
    (None, "no_answer"), ("", "empty"), (" \n\u00a0", "empty"), (".", "not_answerable"), ("—", "not_answerable"),
    ('""', "not_answerable"), ("(…)", "not_answerable"),
    ("one two three four five six seven eight nine ten eleven", "too_many_words"), ("x" * 65, "too_long"),
    ("Lyon", "not_in_passage"), ("paris", "not_in_passage"), ("Paris—Lyon", "not_in_passage"),
    ("cafe\u0301", "not_in_passage"), ("[mask]", "not_in_passage"),
])  # fmt: skip
def test_invalid_masks_say_why(words, cause):
    text = 'Paris . — "" (…) café one two three four five six seven eight nine ten eleven ' + "x" * 65
    result = mask(words, text)
    assert (result.invalid, result.masked, result.target, result.start) == (cause, "", "", -1)


def test_caps_are_inclusive_and_can_be_switched_off():
    ten, eleven = " ".join("abcdefghij"), " ".join("abcdefghijk")
    assert mask(ten, eleven).invalid == "" and mask(eleven, eleven).invalid == "too_many_words"
    assert mask(eleven, eleven, max_span_words=0).invalid == ""
    assert mask("x" * 64, "x" * 64).invalid == "" and mask("x" * 65, "x" * 65).invalid == "too_long"
    assert mask("x" * 65, "x" * 65, max_span_chars=0).invalid == ""


LABELLED = passage("Bonn lies in Zoda, said moki. Bonn is Zoda",
                   "copy template template fact template noise copy template fact".split())  # fmt: skip


@pytest.mark.parametrize(("words", "label"), [
    ("Bonn", "copy"), ("lies in", "template"), ("Zoda", "fact"), ("Zod", "fact"), ("in Zoda", "fact"),
    ("Bonn is Zoda", "fact"), ("Bonn lies", "copy"), ("in Zoda, said moki", "noise"), ("moki. Bonn", "noise"),
    ("i", "noise"),
])  # fmt: skip
def test_label_of_a_mask(words, label):
    config = Config(labels="noise fact copy template")  # the hardest first
    assert make_mask(words, LABELLED, config, random.Random(0)).label == label


@pytest.mark.parametrize(("words", "kind"), [
    ("rose", "content"), ("The town", "content"), ("The", "function"), ("in Köln", "name"), ("1,810", "number"),
    ("by 1,810", "number"), ("Old", "content"), ("Köln", "name"), ("by", "function"),
])  # fmt: skip
def test_without_labels_the_kind_of_word_is_told_by_its_form(words, kind):
    """A capital letter at the start of a sentence says nothing."""
    assert mask(words, "The town rose in Köln, by 1,810. Old maps say so.").label == kind


def test_function_words_alone_are_no_mask_if_the_config_says_so():
    text = "It is of the old town"
    assert mask("of the", text, mask_content=True).invalid == "function_words"
    assert not mask("the old", text, mask_content=True).invalid and not mask("of the", text).invalid
    assert not mask("of the", text, mask_content=True, function_words="le la").invalid


def test_mask_at_replaces_that_place_only_and_keeps_the_other_rules():
    result = mask_at(LABELLED, 30, 34, Config())
    assert result == Mask("Bonn", "", "Bonn lies in Zoda, said moki. [mask] is Zoda", "Bonn", 2, 30, "copy")
    nine = mask_at(passage("ox " * 9), 3, 5, Config())  # one place is replaced, so their number is no obstacle
    assert (nine.invalid, nine.masked, nine.occurrences) == ("", "ox [mask] " + "ox " * 7, 9)
    assert mask_at(passage("a . b"), 2, 3, Config()).invalid == "not_answerable"
    assert mask_at(passage("a . b"), 1, 2, Config()).invalid == "empty"
    assert mask_at(passage("a b c"), 0, 5, Config(max_span_words=2)).invalid == "too_many_words"
    assert mask_at(passage("abcde"), 0, 5, Config(max_span_chars=4)).invalid == "too_long"
    with pytest.raises(AssertionError, match="outside"):
        mask_at(passage("abc"), 2, 4, Config())


def test_labelled_mask_is_one_word_of_that_label():
    found = {
        label: Counter(labelled_mask(LABELLED, label, Config(), random.Random(seed)).masked for seed in range(100))
        for label in ("fact", "copy", "noise", "template")
    }
    assert set(found["fact"]) == {"Bonn lies in [mask], said moki. Bonn is Zoda",
                                  "Bonn lies in Zoda, said moki. Bonn is [mask]"}  # fmt: skip
    assert set(found["copy"]) == {"[mask] lies in Zoda, said moki. Bonn is Zoda",
                                  "Bonn lies in Zoda, said moki. [mask] is Zoda"}  # fmt: skip
    assert set(found["noise"]) == {"Bonn lies in Zoda, said [mask]. Bonn is Zoda"}  # the full stop is no part of it
    assert len(found["template"]) == 4
    assert labelled_mask(LABELLED, "fact", Config(), random.Random(0)).label == "fact"


def test_a_labelled_mask_needs_a_label_for_each_word_and_a_word_that_can_be_masked():
    rng, config = random.Random(0), Config()
    for text, labels in (("a b", None), ("a b", "copy noise"), ("a ...", "copy fact"), ("x" * 65, "fact")):
        assert labelled_mask(passage(text, labels and labels.split()), "fact", config, rng) is None
    with pytest.raises(ValueError):
        make_mask("a", passage("a b", ["copy"]), config, rng)



def test_random_spans_follow_spanberts_law():
    text, rng = passage(" ".join(f"w{number:04d}z" for number in range(200))), random.Random(5)
    lengths = [len(random_span(text, Config(max_span_chars=0), rng).words.split()) for _ in range(8000)]
    weights = [0.2 * 0.8 ** (k - 1) for k in range(1, 11)]
    law = [weight / sum(weights) for weight in weights]
    mean = sum(k * share for k, share in enumerate(law, 1))
    assert mean == pytest.approx(3.797, abs=1e-3)
    assert sum(lengths) / len(lengths) == pytest.approx(mean, abs=0.1)  # 3.3 standard errors
    for k in range(1, 11):
        assert lengths.count(k) / len(lengths) == pytest.approx(law[k - 1], abs=0.02)


def test_random_spans_start_anywhere():
    text, rng = passage("aa bb cc dd ee"), random.Random(1)
    starts = Counter(random_span(text, Config(max_span_words=1), rng).start for _ in range(2000))
    assert sorted(starts) == [0, 3, 6, 9, 12] and min(starts.values()) > 320


def test_random_spans_are_valid_and_drop_outer_punctuation():
    text, rng = 'He (born in "Ulm", 1879) said: "E = mc²" – and, later, "no!"' + " the" * 8, random.Random(2)
    for rule in ("main", "words", "one_mask"):
        spans = [random_span(passage(text), Config(mask_rule=rule), rng) for _ in range(500)]
        assert all(span.invalid == "" and answerable(span.target) for span in spans)
        assert all(span.words[0] not in '("– ' and span.words[-1] not in ',":!) –' for span in spans)
        assert "the" not in {span.words for span in spans}  # eight times
        assert {"Ulm", "1879"} <= {span.words for span in spans}


@pytest.mark.parametrize("text", ["", " ", "... – !", "the " * 8 + "."])
def test_random_span_gives_up_where_nothing_can_be_masked(text):
    result = random_span(passage(text), Config(max_span_words=1), random.Random(0))
    assert result.invalid and result.masked == ""


CHINESE = "石门镇位于一条大河的北岸，距离金沙镇大约三十公里，四周都是低矮的山丘和稻田。这个镇在1465年因为丝绸而兴盛。"
THAI = "เมืองนี้ตั้งอยู่ริมแม่น้ำสายใหญ่ทางเหนือของประเทศ มีตลาดและวัดเก่าแก่"
HINDI = "यह नगर नदी के तट पर स्थित है और यहाँ के लोग चावल की खेती करते हैं। नगर की स्थापना सन 1782 में हुई थी।"


def test_words_are_what_stands_between_spaces_or_a_character_with_its_marks():
    for text in ("Rome, is (old).\n\x1c½ x", HINDI, "한국어 낱말 둘", "… !", ""):
        assert [text[a:b] for a, b in word_spans(text)] == text.split()
    cut = {"在1465年，「石」（a b）": "在 1465 年，「 石」（ a b）", "กำลังที่ ดี": "กำ ลั ง ที่ ดี", "かﾞ、ー。": "かﾞ、 ー。"}
    cut["a\u0303石\u0303b"] = "a\u0303 石\u0303 b"
    for text, words in cut.items():
        assert [text[a:b] for a, b in word_spans(text)] == words.split()


@pytest.mark.parametrize("rule", ["main", "words", "one_mask_words"])
@pytest.mark.parametrize("text", [CHINESE, THAI, HINDI])
def test_random_spans_in_all_scripts_have_one_to_ten_words_and_whole_letters(text, rule):
    rng, config = random.Random(0), Config(mask_rule=rule, max_occurrences=9)
    spans = [random_span(passage(text), config, rng) for _ in range(400)]
    assert all(span.invalid == "" for span in spans)
    lengths = [len(word_spans(span.target)) for span in spans]
    assert (min(lengths), max(lengths)) == (1, 10) and 2.5 < sum(lengths) / 400 < 4.5
    for span in spans if rule != "main" else ():  # no vowel sign is left behind the mask
        assert unicodedata.category(f"{text} "[span.start + len(span.target)]) not in ("Mn", "Mc")


def test_text_in_which_no_probe_mask_can_be_drawn_is_one_data_error():
    corpus = Corpus([], [Passage("1", "", "", "… ! " * 6), Passage("2", "", "", "— " * 10)], {})
    with pytest.raises(DataError, match="no probe mask can be drawn from 2 held-out passages"):
        make_probe(corpus, None, Config(data="x"))


def test_questions_that_are_all_longer_than_a_prompt_are_a_data_error(build_sampler, folders):
    sampler = build_sampler(folders["smollm3"], max_prompt_tokens=20)
    with pytest.raises(DataError, match="change max_prompt_tokens"):
        make_probe(Corpus([], [Passage("1", "", "", "What is 1 ?" * 9, answer="1")], {}), sampler, sampler.config)
