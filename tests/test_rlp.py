"""RLP: where a text is cut, what a thought is sampled from and scored in, what it earns, how it is weighed."""

import random
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from reference import TINY_BASE, load_plain, tiny_config
from reference_checks import naive_score

from config import ConfigError
from grpo import Group
from methods import (
    MIN_PREFIX,
    THINK_CLOSE,
    THINK_OPEN,
    THOUGHT_PROMPT,
    Frame,
    Position,
    close_thought,
    draw_position,
    empty_thought_gain,
    information_gain,
    make_frame,
    rlp_advantages,
    thought_prompt,
    thought_samples,
)
from model import build_policy, build_reference, load_replica, load_tokenizer
from prompts import CLOSED, START, scan
from rollout import Rollout, generate

TEXT = "The moon turns around the earth, and the earth around the sun."  # the tests' tokenizer: one token per byte


@pytest.fixture(scope="module")
def tokenizer(folders):
    return load_tokenizer(tiny_config(folders["smollm3"]))


@pytest.fixture(scope="module")
def frame(tokenizer):
    return make_frame(tokenizer, THOUGHT_PROMPT, 1000)


def setting(folder, ranks, text_limit=1000, **changes):
    config = tiny_config(folder, **changes)
    replica = load_replica(config, ranks)
    policy, reference = build_policy(replica, config, ranks), build_reference(replica, config, ranks)
    return policy, reference, make_frame(load_tokenizer(config), THOUGHT_PROMPT, text_limit), config


def response(text: str, tokenizer, finish: str = "length", extra: tuple = ()) -> Rollout:
    ids = tokenizer(text).input_ids + list(extra)
    return Rollout([1, 2], ids, [-float(number) for number in range(len(ids))], text, finish)


# ------------------------------------------------------------------------------------------------ positions and prompts


def test_a_position_is_a_place_in_the_text_and_each_place_is_drawn(tokenizer, frame):
    ids = tokenizer(TEXT).input_ids
    drawn = [draw_position(TEXT, tokenizer, frame, random.Random(seed)) for seed in range(1500)]
    for position in drawn:
        t = len(position.prefix_ids)
        assert position == Position(ids[:t], ids[t])
    assert {len(position.prefix_ids) for position in drawn} == set(range(MIN_PREFIX, len(ids)))


def test_a_text_too_long_before_the_position_loses_its_beginning(tokenizer):
    frame = make_frame(tokenizer, "{passage}", 40)
    text = "".join(chr(97 + number % 26) for number in range(200))
    last = SimpleNamespace(randrange=lambda begin, end: end - 1)
    position, ids = draw_position(text, tokenizer, frame, last), tokenizer(text).input_ids
    assert position == Position(ids[-1 - frame.longest_prefix : -1], ids[-1])
    # the limit holds for what is sampled from, and for what is scored with an empty thought and the target
    assert len(thought_prompt(frame, position)) <= 40
    scored = frame.start_ids + position.prefix_ids + frame.open_ids + frame.close_ids + [position.target_id]
    assert len(scored) == 40


def test_a_text_without_a_position_is_refused(tokenizer, frame):
    with pytest.raises(ValueError, match="a text of 8 tokens has no position after 8"):
        draw_position("12345678", tokenizer, frame, random.Random(0))
    assert draw_position("123456789", tokenizer, frame, random.Random(0)).prefix_ids == tokenizer("12345678").input_ids


def test_a_prompt_is_the_request_around_the_text_and_opens_the_thought(tokenizer, frame):
    prompt = thought_prompt(frame, Position(tokenizer("Salt melts ").input_ids, 0))
    assert tokenizer.decode(prompt) == THOUGHT_PROMPT.replace("{passage}", "Salt melts ") + THINK_OPEN


def test_a_chat_template_takes_the_request_as_one_turn_and_the_thought_opens_the_answer(folders):
    tokenizer = load_tokenizer(tiny_config(folders["smollm3"]))
    tokenizer.chat_template = "[{{ messages[0].content }}]{% if add_generation_prompt %}A:{% endif %}"
    frame = make_frame(tokenizer, "Go on: {passage}!", 100)
    prompt = thought_prompt(frame, Position(tokenizer("Salt melts ").input_ids, 0))
    assert tokenizer.decode(prompt) == "[Go on: Salt melts !]A:<think>"


def test_text_ids_are_never_tokenized_again():
    """The tiny base's tokenizer merges and writes <bos>: ids that no tokenizer would make of their text survive."""
    tokenizer = load_tokenizer(tiny_config(TINY_BASE))
    frame = make_frame(tokenizer, "Text: {passage}\n", 100)
    letters = [tokenizer(char, add_special_tokens=False).input_ids[0] for char in "Finn grew"]
    assert tokenizer("Finn grew", add_special_tokens=False).input_ids != letters
    prompt = thought_prompt(frame, Position(letters, 0))
    begin = len(frame.head_ids)
    assert prompt[begin : begin + len(letters)] == letters
    assert tokenizer.decode(prompt) == "<bos>Text: Finn grew\n<think>" and prompt.count(tokenizer.bos_token_id) == 1
    assert frame.start_ids == [tokenizer.bos_token_id]
    assert tokenizer.bos_token_id not in draw_position("Finn grew up near mountains . Today Finn works as nurse .",
                                                       tokenizer, frame, random.Random(0)).prefix_ids  # fmt: skip


@pytest.mark.parametrize("template", ["no text", "{passage} twice {passage}"])
def test_a_template_without_its_one_passage_is_refused(tokenizer, template):
    with pytest.raises(ConfigError, match="rlp_prompt=.*{passage} once"):
        make_frame(tokenizer, template, 1000)


def test_a_limit_without_room_for_text_is_refused_with_the_least_that_would_do(tokenizer):
    with pytest.raises(ConfigError, match="max_prompt_tokens=20: must be at least (?P<least>[0-9]+)") as caught:
        make_frame(tokenizer, THOUGHT_PROMPT, 20)
    least = int(str(caught.value).split("at least ")[1].split(",")[0])
    frame = make_frame(tokenizer, THOUGHT_PROMPT, least)
    assert frame.longest_prefix == MIN_PREFIX
    assert len(thought_prompt(frame, Position([0] * MIN_PREFIX, 0))) == least


# ------------------------------------------------------------------------------------------------------------- thoughts


def closes_after(pieces: list[str]) -> int | None:
    """How many pieces a thought has when its closing tag is complete."""
    state = START
    for number, piece in enumerate(pieces, 1):
        state = scan(state, piece, THINK_CLOSE)
        if state == CLOSED:
            return number
    return None


@pytest.mark.parametrize(
    ("pieces", "closes"),
    [
        (list("a</th</think>b</think>"), 13),  # the first one; what only begins like it does not count
        (["a", "</think>", "b"], 2),  # a token of its own
        (["a", "</thi", "nk>\n", "b"], 3),  # part of tokens
        (["so</think>then"], 1),
        (["</thi", "a", "nk>"], None),
        (["<think>", "</think", "</ think>", "\\", "}"], None),
        (["<" * 9 + "/think>"], 1),
        ([], None),
    ],
)
def test_a_thought_closes_with_the_piece_that_completes_its_first_closing_tag(pieces, closes):
    assert closes_after(pieces) == closes


def thoughts(sampler, **more) -> list[Rollout]:
    prompts = [[number] * 3 for number in range(12)]
    return [group[0] for group in generate(sampler, prompts, 1, 12, THINK_CLOSE, 0, **more)]


@pytest.mark.parametrize("tag", [("</think>",), ("</th", "ink>")])
@pytest.mark.parametrize("mode", ["base model", "stop_at_answer off", "chat template"])
def test_a_sampled_thought_ends_with_the_token_that_completes_the_tag(folders, build_sampler, tag, mode):
    """Whatever the setting: the tag ends a thought by definition. A random model seldom writes one, so tokens of the
    lower half are declared to be (the beginning of) the tag, those of the upper half its end."""
    sampler = build_sampler(folders["smollm3"], stop_at_answer=mode != "stop_at_answer off")
    whole = thoughts(sampler, greedy=True)
    assert {one.finish for one in whole} == {"length"}
    sampler.tokenizer.chat_template = "{{ messages[0].content }}" if mode == "chat template" else None
    sampler.pieces |= {token: tag[0] if token < 128 else tag[-1] for token in range(256)}
    if len(tag) == 1:
        sampler.pieces |= {token: "a" for token in range(100, 256)}
    for cut, long in zip(thoughts(sampler, greedy=True), whole, strict=True):
        closes = closes_after([sampler.pieces[token] for token in long.completion_ids])
        assert cut.finish == ("answer" if closes else "length")
        assert cut.completion_ids == long.completion_ids[:closes]
        assert cut.sampler_logprobs == pytest.approx(long.sampler_logprobs[:closes], abs=1e-5)
        assert len(cut.sampler_logprobs) == len(cut.completion_ids)
    lengths = {len(one.completion_ids) for one in thoughts(sampler, greedy=True)}
    assert len(lengths) > 1 and min(lengths) < 12


FRAME = Frame([], [], [7], [7], [8], 100)


@pytest.mark.parametrize(
    ("sampled", "finish", "scored"),
    [
        ([5, 6, 8], "answer", [7, 5, 6, 8]),  # it closed itself
        ([5, 6], "length", [7, 5, 6, 8]),  # cut at the limit
        ([5, 0], "eos", [7, 5, 8]),  # ended the sequence, which does not end here
        ([0], "eos", [7, 8]),
    ],
)
def test_every_thought_is_closed_once_before_it_is_scored(sampled, finish, scored):
    thought = Rollout([1], sampled, [0.0] * len(sampled), "", finish)
    assert close_thought(thought, FRAME) == scored
    assert thought.completion_ids == sampled  # what is trained: sampled tokens, no others


# -------------------------------------------------------------------------------------------------------------- rewards


def test_the_reward_is_the_log_ratio_of_two_forwards_of_the_plain_model(folders, ranks):
    policy, reference, frame, config = setting(folders["smollm3"], ranks)
    other = load_replica(tiny_config(folders["smollm3"]), ranks)
    generator = torch.Generator().manual_seed(0)
    for parameter in other.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    moved = build_policy(other, config, ranks)
    positions = [Position(list(range(n)), 100 + n) for n in (9, 30, 12)]
    thoughts = [[[7, 8], [7, 5, 6, 8]], [[7, *range(40), 8], []], [[7, 5, 8], [7, 9, 8]]]
    found = information_gain(moved, reference, positions, thoughts, frame, config, ranks)
    trained, average = other, load_plain(config.model).eval()
    trained.config._attn_implementation = "sdpa"
    for position, group, gains in zip(positions, thoughts, found, strict=True):
        ((baseline,), _), = naive_score(average, [(position.prefix_ids, [position.target_id])])
        for thought, gain in zip(group, gains, strict=True):
            ((logprob,), _), = naive_score(trained, [(position.prefix_ids + thought, [position.target_id])])
            assert gain == pytest.approx(logprob - baseline, abs=1e-5)


def test_a_tokenizer_that_begins_texts_with_a_token_of_its_own_does_so_in_both_contexts(ranks):
    policy, reference, frame, config = setting(TINY_BASE, ranks)
    plain, (bos,) = load_plain(TINY_BASE).eval(), frame.start_ids
    contexts = [([bos, 40, 50, 60, 7, 8], [70]), ([bos, 40, 50, 60], [70])]
    ((informed,), _), ((baseline,), _) = naive_score(plain, contexts)
    gains = information_gain(policy, reference, [Position([40, 50, 60], 70)], [[[7, 8]]], frame, config, ranks)
    assert gains[0][0] == pytest.approx(informed - baseline, abs=1e-5)


@pytest.mark.parametrize("base", ["random", "tiny_base"])
def test_without_tags_and_thought_nothing_is_gained_at_step_0(folders, ranks, base):
    """Both paths then read the same text with the same weights. With an empty pair of tags they do not."""
    policy, reference, frame, config = setting(TINY_BASE if base == "tiny_base" else folders["smollm3"], ranks)
    tokenizer = load_tokenizer(config)
    positions = [draw_position(TEXT[n:], tokenizer, frame, random.Random(n)) for n in range(5)]
    gains = information_gain(policy, reference, positions, [[[], []]] * 5, frame, config, ranks)
    assert [len(group) for group in gains] == [2] * 5
    assert max(abs(gain) for group in gains for gain in group) < 1e-5
    assert abs(empty_thought_gain(policy, reference, positions, frame, config, ranks)) > 0.01


def test_the_gain_of_an_empty_thought_is_that_of_its_tags(folders, ranks):
    policy, reference, frame, config = setting(folders["smollm3"], ranks)
    positions = [Position(list(range(n)), 100 + n) for n in (9, 30)]
    tags = [[frame.open_ids + frame.close_ids]] * 2
    gains = information_gain(policy, reference, positions, tags, frame, config, ranks)
    expected = fmean(gain for (gain,) in gains)
    assert empty_thought_gain(policy, reference, positions, frame, config, ranks) == pytest.approx(expected)
    assert load_tokenizer(config).decode(tags[0][0]) == "<think></think>"


def test_what_a_model_believes_does_not_depend_on_the_sampling_temperature(folders, ranks):
    gains = []
    for temperature in (0.7, 1.0):
        *models, frame, config = setting(folders["smollm3"], ranks, temperature=temperature)
        gains.append(information_gain(*models, [Position([1, 2], 3)], [[[7, 8]]], frame, config, ranks))
    assert gains[0] == gains[1]


# ----------------------------------------------------------------------------------------------- advantages and weights


def test_advantages_by_hand():
    """Mean 0.2; 4/3 of the distance to it."""
    assert rlp_advantages([0.9, 0.1, -0.3, 0.1]) == pytest.approx([2.8 / 3, -0.4 / 3, -2 / 3, -0.4 / 3])
    assert rlp_advantages([0.5, 0.5]) == [0, 0]


def test_an_advantage_is_the_distance_to_the_mean_of_the_others():
    rewards = [0.4, -1.2, 3.0, 0.1, 0.0]
    for index, advantage in enumerate(rlp_advantages(rewards)):
        others = rewards[:index] + rewards[index + 1 :]
        assert advantage == pytest.approx(rewards[index] - fmean(others))


def test_advantages_are_not_divided_by_the_standard_deviation():
    assert rlp_advantages([20.0, -20.0]) == pytest.approx([10 * one for one in rlp_advantages([2.0, -2.0])])


def test_every_thought_weighs_the_same_whatever_its_length():
    thoughts = [Rollout([1], [2] * length, [0.0] * length, "", "length") for length in (1, 4, 10, 5)]
    groups = [Group("pred", thoughts[:2], [0.5, 0.1]), Group("pred", thoughts[2:], [0.3, 0.3])]
    samples = thought_samples(groups)
    assert [sample.rollout for sample in samples] == thoughts  # none dropped, a group of equal rewards neither
    assert [sample.advantage for sample in samples] == pytest.approx([0.4, -0.4, 0, 0])
    assert [sample.weight for sample in samples] == pytest.approx([1 / 4, 1 / 16, 1 / 40, 1 / 20])


def test_a_thoughts_way_through_a_step(tokenizer, frame):
    """Scored closed, trained on what was sampled, and no more."""
    sampled = [response("so: ice</think>", tokenizer, "answer"), response("sal", tokenizer),
               response("no", tokenizer, "eos", (tokenizer.eos_token_id,))]  # fmt: skip
    scored = [tokenizer.decode(close_thought(one, frame)) for one in sampled]
    assert scored == ["<think>so: ice</think>", "<think>sal</think>", "<think>no</think>"]
    trained = [sample.rollout.completion_ids for sample in thought_samples([Group("pred", sampled, [1.0, 0.0, 0.0])])]
    assert [tokenizer.decode(ids) for ids in trained] == ["so: ice</think>", "sal", "no<|end|>"]
