"""Sampling: the sampler's log-probs are the trainer's, timing decides nothing, and failures are not swallowed."""

import copy
import random
import time
import weakref
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from reference import EOS, FAMILIES, ROOT, load_plain, naive_score, save_model, tiny_config, wiki_passages
from tokenizers import normalizers
from transformers.generation.continuous_batching import ContinuousBatchingManager, PagedAttentionCache

import ops
import rollout as rollout_module
from config import Config, ConfigError
from data import Passage
from engine import batching
from engine.checks import try_sampler
from grpo import Group, Sample, make_optimizer, make_samples, pack_samples, score, update
from model import build_policy, refresh
from ops import logprobs_of
from prompts import (
    BOXED_OPENING, CLOSED, START, chat_frame, check_prompts, encode, last_answer, leading_ids, mask_prompt,
    predict_prefix, predict_prompt, scan,
)  # fmt: skip
from rollout import derive_seed, generate, make_sampler, rollout

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
PROMPTS = [[1, 2, 3], list(range(40, 80)), [7], [200, 100, 50, 25, 12, 6]]


def sample(sampler, seed=0, prompts=PROMPTS, count=3, max_tokens=12, **more):
    return generate(sampler, prompts, count, max_tokens, BOXED_OPENING, seed, **more)

def tokens(groups) -> list[list[list[int]]]:
    return [[response.completion_ids for response in group] for group in groups]


@torch.no_grad()
def move(policy) -> None:
    """Weights far from where they were."""
    torch.manual_seed(0)
    for parameter in policy.parameters():
        parameter.to_local().add_(0.1 * torch.randn(parameter.shape))


@pytest.fixture
def sampler(build_sampler, folders):
    return build_sampler(folders["smollm3"])


@pytest.fixture(scope="module")
def wiki_prompts() -> list[str]:
    """Prompts of the mini-wiki, each with one word hidden: the tiny base has learnt to put a word in a box."""
    texts = [passage.text for passage in wiki_passages(8)]
    return [f" {text.replace(text.split()[3], '[mask]', 1)}\nPredict:" for text in texts]


# ---- sampler and trainer agree
def both_logprobs(policy, groups, sampler) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all completion tokens: the sampler's, as it returned them, and the trainer's own forward pass."""
    bundles = [[Sample(response, 1.0, 1.0)] for group in groups for response in group]
    batch = pack_samples(bundles, sampler.ranks.device)
    options = {"predicts": batch.predicts, "targets": batch.targets, "temperature": sampler.config.temperature}
    with torch.no_grad():
        return batch.sampler_logprobs, policy(**options, **batch.inputs)[0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_samplers_logprobs_are_the_trainers(build_sampler, folders, ranks, family, temperature):
    sampler = build_sampler(folders[family], temperature=temperature)
    policy = build_policy(sampler.replica, sampler.config, ranks)
    own, trainers = both_logprobs(policy, sample(sampler), sampler)
    assert len(own) > 60
    torch.testing.assert_close(own, trainers, rtol=0, atol=1e-4)


def test_after_a_refresh_no_key_or_value_of_the_old_weights_survives(build_sampler, folders, ranks):
    """The same prompts before and after, long enough to fill pages of the cache, which the sampler would know again."""
    sampler = build_sampler(folders["qwen3_tied"])
    policy = build_policy(sampler.replica, sampler.config, ranks)
    prompts = [[token % 256 for token in range(begin, begin + 100)] for begin in (0, 40, 90)]
    before = rollout(sampler, prompts, 3, 12, BOXED_OPENING, (0, "predict"))
    torch.testing.assert_close(*both_logprobs(policy, before, sampler), rtol=0, atol=1e-4)
    move(policy)
    own, moved = both_logprobs(policy, before, sampler)
    assert (own - moved).abs().mean() > 0.5  # what stale keys and values would be off by, about
    refresh(policy, sampler.replica)
    after = rollout(sampler, prompts, 3, 12, BOXED_OPENING, (0, "predict"))
    torch.testing.assert_close(*both_logprobs(policy, after, sampler), rtol=0, atol=1e-4)


@pytest.mark.parametrize("stale", [False, True])
def test_a_sampler_with_stale_keys_stops_the_run_before_the_update(build_sampler, folders, ranks, stale):
    """The weights move and all of them go to the sampler, but for those that make keys and values."""
    sampler = build_sampler(folders["qwen3_tied"], max_mismatch=Config.max_mismatch)
    policy = build_policy(sampler.replica, sampler.config, ranks)
    move(policy)
    old = {name: x.clone() for name, x in sampler.replica.named_parameters() if "k_proj" in name or "v_proj" in name}
    refresh(policy, sampler.replica)
    if stale:
        sampler.replica.load_state_dict(old, strict=False)
    groups = rollout(sampler, PROMPTS, 4, 12, BOXED_OPENING, (0, "predict"))
    samples = make_samples([Group("pred", group, [1.0, 0.0, 0.0, 1.0]) for group in groups], sampler.config)
    optimizer, before = make_optimizer(policy, sampler.config), [x.to_local().clone() for x in policy.parameters()]
    stop = pytest.raises(RuntimeError, match="nats a token from the trainer.*use_cuda_graph.*liger.*attention")
    with stop if stale else nullcontext():
        assert update(policy, optimizer, samples, sampler.config, ranks, 0)["mismatch_kl"] < 1e-6
    changed = [not was.equal(now.to_local()) for was, now in zip(before, policy.parameters(), strict=True)]
    assert not any(changed) if stale else all(changed)


def test_a_phases_cache_is_gone_when_it_ends(sampler, monkeypatch):
    """Each phase makes its own, of what memory is free then, and the update that follows has all of it."""
    made, original = [], PagedAttentionCache.__init__

    def noted(self, *words, **keys):
        assert [one for one in made if one() is not None] == []
        made.append(weakref.ref(self))
        original(self, *words, **keys)

    monkeypatch.setattr(PagedAttentionCache, "__init__", noted)
    for _ in range(3):
        sample(sampler)
        assert made[-1]() is None
    assert len(made) == 3


def test_given_tokens_are_scored_as_the_plain_model_does_whatever_is_packed_together(build_sampler, folders, ranks):
    rng = random.Random(0)
    sequences = [[rng.randrange(256) for _ in range(length)] for length in (30, 2, 17, 40, 5)]
    pairs = [(row[:1], row[1:]) for row in sequences]
    expected = naive_score(load_plain(folders["qwen3_tied"]), pairs)
    for budget in (45, 1000):
        sampler = build_sampler(folders["qwen3_tied"], tokens_per_micro_batch=budget)
        scores = score(partial(logprobs_of, sampler.replica), pairs, sampler.config, ranks)
        for (found, _), (plain, _) in zip(scores, expected, strict=True):
            assert found == pytest.approx(plain, abs=1e-4)


def test_greedy_tokens_are_those_of_the_ordinary_generate(sampler, folders):
    model = load_plain(folders["smollm3"]).eval()
    for prompt, group in zip(PROMPTS, sample(sampler, greedy=True, count=1), strict=True):
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        plain = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **options)
        assert group[0].completion_ids == plain[0, len(prompt) :].tolist()


# ---- what comes back
@pytest.mark.parametrize("crowd", [{}, {"max_requests": 3}])
def test_reading_the_cache_by_block_table_changes_no_token_and_no_logprob(build_sampler, folders, monkeypatch, crowd):
    """Against the plain version, which gathers each request's keys at every step; responses grow over several pages."""
    sampler, steps = build_sampler(folders["smollm3"], **crowd), []
    by_table, find_places, found_places = ops.decode_by_table, ops.new_token_places, []
    monkeypatch.setattr(ops, "new_token_places", lambda *args: found_places.append(1) or find_places(*args))
    monkeypatch.setattr(ops, "decode_by_table", lambda *args: steps.append(len(args[0])) or by_table(*args))
    found = sample(sampler, max_tokens=70)
    assert len(steps) > 60 * sampler.replica.config.num_hidden_layers and max(steps) == crowd.get("max_requests", 12)
    assert len(found_places) * sampler.replica.config.num_hidden_layers == len(steps)  # once per forward, not per layer
    steps.clear()
    monkeypatch.setattr(rollout_module, "decoding", lambda replica: "gathered: asked for")
    assert sample(sampler, max_tokens=70) == found and not steps


@pytest.mark.parametrize("attention, dtype, use_cuda_graph, trouble, graph", [
    ("flash_attention_2", torch.bfloat16, True, "", True), ("flash_varlen", torch.bfloat16, True, "", True),
    ("flash_varlen", torch.bfloat16, True, "an old torch", False),
    ("flash_varlen", torch.float32, True, "", False),  # SDPA, which asks the GPU for lengths
    ("flash_attention_2", torch.bfloat16, False, "", False), ("flash_varlen", torch.bfloat16, False, "", False),
])  # fmt: skip
def test_on_a_gpu_decoding_runs_in_cuda_graphs_where_its_kernel_can(
    sampler, monkeypatch, attention, dtype, use_cuda_graph, trouble, graph
):
    layer = sampler.replica.model.layers[0].self_attn
    heads, kv_heads = (one.out_features // layer.head_dim for one in (layer.q_proj, layer.k_proj))

    def table_reader(device, *shape):
        assert (device.type, *shape) == ("cuda", dtype, heads, kv_heads, layer.head_dim)
        return None, trouble

    monkeypatch.setattr(batching, "table_reader", table_reader)
    shape = copy.copy(sampler.replica.config)
    shape._attn_implementation = attention
    replica = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, config=shape)
    config = replace(sampler.config, use_cuda_graph=use_cuda_graph)
    assert rollout_module.batching_settings(config, replica, PROMPTS, 12, 12, 0).cuda_graph_booleans == (False, graph)


@pytest.mark.parametrize("crowd", [{}, {"max_requests": 3}])
def test_each_prompt_gets_its_own_responses_in_order_though_some_wait_their_turn(build_sampler, folders, crowd):
    sampler, prompts = build_sampler(folders["smollm3"], **crowd), PROMPTS * 3
    groups = sample(sampler, prompts=prompts)
    assert [[response.prompt_ids for response in group] for group in groups] == [[prompt] * 3 for prompt in prompts]
    for response in (response for group in groups for response in group):
        assert 1 <= len(response.completion_ids) <= 12
        assert len(response.sampler_logprobs) == len(response.completion_ids)
        assert all(logprob <= 0 for logprob in response.sampler_logprobs)
        assert response.text == sampler.tokenizer.decode(response.completion_ids, skip_special_tokens=True)
    assert len({tuple(ids) for group in tokens(groups) for ids in group}) > 18  # responses of a group differ
    assert sample(sampler, prompts=[]) == []
    with pytest.raises(ValueError, match="empty prompt"):
        sample(sampler, prompts=[[1], []])


def test_a_response_ends_with_an_end_of_sequence_or_at_its_length(sampler):
    sampler.eos_ids |= set(range(0, 256, 16))  # a random model seldom says the real one
    responses = [response for group in sample(sampler, count=8) for response in group]
    assert {response.finish for response in responses} == {"eos", "length"}
    for response in responses:
        *others, last = response.completion_ids
        assert not sampler.eos_ids & set(others)
        assert response.finish == ("eos" if last in sampler.eos_ids else "length")
        assert response.finish == "eos" or len(response.completion_ids) == 12


# ---- noise
def test_slow_admission_changes_no_token_and_torchs_own_generator_is_left_as_it_was(sampler, monkeypatch):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = tokens(sample(sampler))
    assert torch.equal(torch.rand(4), expected)
    add = ContinuousBatchingManager.add_request
    monkeypatch.setattr(ContinuousBatchingManager, "add_request", lambda *a, **k: add(*a, **k) or time.sleep(0.02))
    assert tokens(sample(sampler)) == first


def test_noise_depends_on_seed_step_and_phase_for_ever(build_sampler, folders):
    def draw(seed=0, noise=(0, "propose")):
        return tokens(rollout(build_sampler(folders["smollm3"], seed=seed), PROMPTS, 3, 12, BOXED_OPENING, noise))

    first = draw()
    assert draw() == first
    assert first not in (draw(seed=1), draw(noise=(1, "propose")), draw(noise=(0, "predict")))
    assert derive_seed(0, "probe") == derive_seed(0, "probe") != derive_seed("0", "probe")
    seeds = {derive_seed(0, step, "propose", rank, 2) for step in range(100) for rank in range(2)}
    assert len(seeds) == 200 and 0 <= min(seeds) and max(seeds) < 2**31


# ---- stop at the answer
@pytest.fixture
def tiny_base(build_sampler):
    """(config keys) -> a sampler on the shipped base, which was pretrained to answer in boxes."""
    return lambda **changes: build_sampler(ROOT / "assets/tiny_base", **changes)


@pytest.mark.parametrize("greedy, prompts, chat", [(True, 8, None), (True, 8, CHAT), (False, 1, None)])
def test_a_response_ends_with_the_token_that_closes_its_answer(tiny_base, wiki_prompts, greedy, prompts, chat):
    """Greedy for many, and sampled for a lone one: a response that ends changes the noise of those beside it."""
    stopping, rambling = tiny_base(stop_at_answer=True), tiny_base(stop_at_answer=False)
    encoded = [encode(stopping.tokenizer, prompt) for prompt in wiki_prompts[:prompts]]
    options = {"prompts": encoded, "count": 1, "max_tokens": 20, "greedy": greedy}
    stopping.tokenizer.chat_template = rambling.tokenizer.chat_template = chat
    stopped, whole = ([group[0] for group in sample(one, **options)] for one in (stopping, rambling))
    answered = [response for response in stopped if response.finish == "answer"]
    assert len(answered) > prompts / 2
    assert not any(response.finish == "answer" for response in whole)
    for short, long in zip(stopped, whole, strict=True):
        assert short.completion_ids == long.completion_ids[: len(short.completion_ids)]
        assert short.sampler_logprobs == pytest.approx(long.sampler_logprobs[: len(short.completion_ids)], abs=1e-5)
    for response in answered:
        *before, last = [stopping.piece(token) for token in response.completion_ids]
        assert last_answer("".join([*before, last]), "boxed") is not None
        assert last_answer("".join(before), "boxed") is None


def test_an_answer_that_the_prompt_opened_closes_with_its_brace(tiny_base, wiki_prompts):
    sampler = tiny_base(predict_prefix=r" \boxed{", predict_prompt="{passage}")
    prefix = predict_prefix(sampler.config)
    encoded = [predict_prompt(sampler, prompt, thought=False) for prompt in wiki_prompts]
    groups = sample(sampler, prompts=encoded, count=1, max_tokens=20, greedy=True, prefix=prefix)
    answered = [response for (response,) in groups if response.finish == "answer"]
    assert len(answered) > 4
    for response in answered:
        assert response.text.count("}") == 1 and last_answer(prefix + response.text, "boxed") is not None


def test_forked_responses_stop_each_at_its_own_answer(tiny_base, wiki_prompts):
    sampler = tiny_base()
    encoded = [encode(sampler.tokenizer, prompt) for prompt in wiki_prompts]
    for response in (one for group in sample(sampler, prompts=encoded, count=6, max_tokens=20) for one in group):
        state, closed = START, []
        for number, token in enumerate(response.completion_ids):
            state = scan(state, sampler.piece(token), BOXED_OPENING)
            closed += [number] if state == CLOSED else []
        assert closed == ([len(response.completion_ids) - 1] if response.finish == "answer" else [])


# ---- failures are loud
def test_a_failing_request_raises_names_the_rank_and_leaves_nothing_to_the_next_phase(sampler):
    first, forward, left = tokens(sample(sampler)), sampler.replica.forward, []

    def breaks(*words, **keys):
        left.pop()
        if not left:
            raise ValueError("out of luck")
        return forward(*words, **keys)

    for calls in (1, 4):
        left[:], sampler.replica.forward = range(calls), breaks
        with pytest.raises(RuntimeError, match="rank 0: a generation request failed: .*out of luck"):
            sample(sampler)
        sampler.replica.forward = forward
    assert tokens(sample(sampler)) == first


# ---- prompts as tokens
@pytest.mark.parametrize("template, text", [(None, "Hide: é"), (CHAT, "<user>Hide: é<assistant>")])
def test_a_prompt_is_plain_text_or_one_user_turn_and_the_prefix_opens_the_answer(sampler, template, text):
    sampler.tokenizer.chat_template = template
    for prefix in ("", r" \boxed{"):
        ids = encode(sampler.tokenizer, "Hide: é", prefix)
        assert sampler.tokenizer.decode(ids) == text + prefix and len(ids) == len((text + prefix).encode())


def test_a_tokenizer_that_appends_its_end_token_does_not_end_prompts(sampler):
    ids = {"a": [5], "Hide": [7, 8]}

    def tokenizer(text, add_special_tokens=True):
        return SimpleNamespace(input_ids=[0, *ids[text], 1] if add_special_tokens else ids[text])

    tokenizer.chat_template = None
    assert leading_ids(tokenizer) == [0] and encode(tokenizer, "Hide") == [0, 7, 8]


@pytest.mark.parametrize("template, message", [
    ({"rag": CHAT, "tool_use": CHAT}, "templates rag, tool_use and none is called default"),
    ("{{ messages[0].content }}{{ messages[0].content }}", "does not write a user turn as it stands, once"),
    ("{{ raise_exception('no system turn') }}", "cannot be rendered"),
])  # fmt: skip
def test_a_template_that_cannot_serve_is_refused_by_its_key(sampler, template, message):
    sampler.tokenizer.chat_template = template
    with pytest.raises(ConfigError, match="chat_template.*" + message):
        chat_frame(sampler.tokenizer)


def test_a_template_that_writes_the_time_is_rendered_once(sampler):
    """The frame of a run's first part serves the resumed one, whatever the clock says."""
    sampler.tokenizer.chat_template = "<{{ strftime_now('%H:%M:%S.%f') }}>{{ messages[0].content }}"
    frame = chat_frame(sampler.tokenizer)
    assert encode(sampler.tokenizer, "Hide", frame=frame) == encode(sampler.tokenizer, "Hide", frame=frame)
    assert sampler.tokenizer.decode(encode(sampler.tokenizer, "Hide", frame=("<09:00>", ""))) == "<09:00>Hide"


def test_the_configs_prompts_hold_the_passage(build_sampler, folders):
    sampler = build_sampler(folders["smollm3"], mask_prompt="M {passage} m", predict_prompt="P {passage} p")
    decode = sampler.tokenizer.decode
    assert decode(mask_prompt(sampler, "{x}")) == "M {x} m"
    assert decode(predict_prompt(sampler, "a [mask]")) == "P a [mask] p"
    assert decode(predict_prompt(sampler, "a [mask]", thought=False)) == r"P a [mask] p \boxed{"


def test_a_template_that_leaves_no_room_for_the_longest_passage_is_refused_and_so_is_a_short_context(sampler):
    """One token per byte: 10 of the longer template and 64 of the passage; then responses of 8 beside 74."""
    keys = {"mask_prompt": "M {passage} m", "predict_prompt": "P {passage} predict", "max_passage_tokens": 64}
    sampler.config = replace(sampler.config, max_prompt_tokens=74, **keys)
    sampler.replica.config.max_position_embeddings = 82
    check_prompts(sampler)
    sampler.replica.config.max_position_embeddings = 81
    with pytest.raises(ConfigError, match="max_prompt_tokens=74.* 81 positions"):
        check_prompts(sampler)
    sampler.config.max_prompt_tokens = 73
    with pytest.raises(ConfigError, match="max_prompt_tokens=73: must be at least 74"):
        check_prompts(sampler)


def test_every_known_end_is_an_end_and_a_model_without_one_is_refused(tmp_path, ranks, build_sampler):
    """The tokenizer's, the checkpoint's and, where there is a chat template, its end of turn."""

    def ends() -> set[int]:
        return make_sampler(sampler.replica, sampler.tokenizer, tiny_config(tmp_path), ranks).eos_ids

    sampler = build_sampler(save_model("smollm3", tmp_path))
    assert sampler.eos_ids == ends() == {sampler.tokenizer.convert_tokens_to_ids(EOS)} == {256}
    sampler.replica.generation_config.eos_token_id = [256, 9]
    sampler.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    sampler.replica.resize_token_embeddings(258)
    assert ends() == {256, 9}
    sampler.tokenizer.chat_template = CHAT
    assert ends() == {256, 9, sampler.tokenizer.convert_tokens_to_ids("<|im_end|>")} == {256, 9, 257}
    tokenizer, embeddings = SimpleNamespace(eos_token_id=None, chat_template=None), SimpleNamespace(num_embeddings=300)
    for eos in (None, 128001):  # nowhere, or only as an architecture's default beyond the vocabulary
        plain = SimpleNamespace(eos_token_id=eos)
        replica = SimpleNamespace(generation_config=plain, config=plain, get_input_embeddings=lambda: embeddings)
        with pytest.raises(ConfigError, match="names an end-of-sequence token"):
            make_sampler(replica, tokenizer, sampler.config, ranks)


def test_a_tokenizer_or_a_model_that_cannot_serve_is_refused_before_the_first_rollout(sampler, build_sampler, folders):
    """A tokenizer that writes in lower case, one with more tokens than the model, a model with a sliding window."""
    passages = [Passage("0", "", "", "Titan is a moon.")] * 3
    try_sampler(sampler, passages)
    sampler.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ConfigError, match="changes text, so no answer could match: 'Titan"):
        try_sampler(sampler, passages)
    sampler.tokenizer.add_tokens(["more"])
    with pytest.raises(ConfigError, match="^model=.* has 'more', number 257, but it has 257 embeddings"):
        try_sampler(sampler, passages)
    sampler = build_sampler(folders["qwen3_tied"])
    sampler.replica.model.layers[0].self_attn.sliding_window = 8
    with pytest.raises(ConfigError, match="^model=.*attention flash_varlen knows no sliding window"):
        try_sampler(sampler, [])
