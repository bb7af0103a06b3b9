"""What a run costs: FLOPs, bytes and seconds by hand, parameter counts that are known, memory as it is allocated."""

import re
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from reference import REWARDS, ROOT, TINY_BASE, CaptureGradients, load_plain, make_groups, tiny_config, whole
from transformers import AutoConfig, AutoModelForCausalLM

import model
from bench import memory, plan
from bench.__main__ import main
from bench.memory import Shape, activation_bytes, decided, gpu_memory, layer_activation_bytes, shape_of
from bench.plan import (
    ARCHITECTURES, GPUS, Gpu, PlanOptions, Work, advice, architecture, decode_limit, decode_seconds, phases, read_words,
    response_lengths, train_flops,
)  # fmt: skip
from config import Config, ConfigError, read_config
from grpo import make_optimizer, make_samples, update
from ops import VARLEN, pack

# 100 parameters, one layer, one head of one dimension; a table of 10 words x 2 numbers
TOY = Shape(100, layers=1, hidden=2, intermediate=3, heads=1, kv_heads=1, head_dim=1, vocab=10, tied=True)
SLOW_MEMORY = Gpu("one byte a second", flops=1e30, bandwidth=1.0, memory=1e9)
SLOW_CORES = Gpu("one FLOP a second", flops=1.0, bandwidth=1e30, memory=1e9)


@pytest.fixture(scope="module")
def known() -> dict[str, Shape]:
    return {name: shape_of(architecture(name)) for name in ARCHITECTURES}


def test_the_models_of_our_configs_have_their_known_parameters(known):
    counts = {name.split("/")[1]: shape.parameters for name, shape in known.items()}
    assert counts == {"SmolLM3-3B-Base": 3_075_098_624, "Qwen3-0.6B-Base": 596_049_920,
                      "Qwen3-4B-Base": 4_022_468_096, "Qwen3-8B-Base": 8_190_735_360,
                      "Qwen3-30B-A3B-Base": 30_532_122_624, "SmolLM2-135M": 134_515_008}  # fmt: skip
    configs = [path for path in (ROOT / "configs").glob("*.yaml") if not path.name.startswith(("tiny", "ladder"))]
    assert {read_config([str(path)]).model for path in configs} == set(known)
    small, large = known["HuggingFaceTB/SmolLM3-3B-Base"], known["Qwen/Qwen3-8B-Base"]
    assert plan.cache_bytes(small) == 72 * 1024  # 2 x 36 layers x 4 heads x 128 x 2 bytes
    assert large.qk_norm and not large.tied and small.read(1) == small.parameters
    assert large.read(1) == large.parameters - 151936 * 4096  # rows of the embedding are looked up


def test_a_mixture_of_experts_by_hand(known):
    """48 layers of 128 experts, of which a token meets 8."""
    mixed = known["Qwen/Qwen3-30B-A3B-Base"]
    expert = 3 * 2048 * 768
    assert mixed.read(1) == mixed.parameters - 151936 * 2048 - 48 * 120 * expert == 3_041_867_776
    # half of the experts for each token: two tokens leave a quarter idle, many none
    toy = replace(TOY, layers=3, hidden=5, experts=8, experts_per_token=4, expert_width=2, parameters=100_000)
    assert [100_000 - toy.read(n) for n in (1, 2, 99)] == [3 * 4 * 30, 3 * 2 * 30, 0]
    # of two responses of 3 and 1 tokens the first step reads the experts of two tokens, the others those of one
    toy = replace(toy, kv_heads=0)  # no cache: only weights are read
    assert decode_seconds(toy, SLOW_MEMORY, 1, [3, 1], slots=2) == 2 * (toy.read(2) + 2 * toy.read(1))
    # what is kept of a token, and what moves in the backward pass, for each of the four experts that it is sent to
    dense = replace(toy, experts=0, intermediate=0)
    each = 2 * (2 * 5 + 4 * 2 + 1) + 4 + 32
    assert layer_activation_bytes(toy) == layer_activation_bytes(dense) + 4 * (8 + 1) + 4 * each
    moving = [activation_bytes(one, 1, False) - 3 * layer_activation_bytes(one) for one in (toy, dense)]
    assert moving[0] - moving[1] == 2 * 4 * (3 * 2 + 2 * 5)


def test_a_config_json_at_hand_comes_before_the_table_and_the_unknown_is_refused(folders, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, str(TINY_BASE), {"no": "such thing"})
    assert shape_of(architecture(str(TINY_BASE))) == Shape(478_080, 4, 96, 256, 4, 2, 24, 747, tied=True)
    mixed = architecture(str(folders["qwen3_moe"]))
    assert shape_of(mixed).parameters == load_plain(folders["qwen3_moe"]).num_parameters()
    mixed.mlp_only_layers = [1]
    with pytest.raises(ConfigError, match="qwen3_moe mixes experts in a way of its own"):
        shape_of(mixed)
    with pytest.raises(ConfigError, match="model='no/body': no config.json at hand"):
        architecture("no/body")


def test_lengths_have_their_mean_their_cap_and_their_seed():
    def lengths(mean, cap, sigma=0.6, seed=0):
        return sum(response_lengths(64, 8, cap, Work(mean_response=mean, sigma=sigma), seed), [])

    drawn = lengths(384, 1024)
    assert fmean(drawn) == pytest.approx(384, abs=0.5) and max(drawn) == 1024 and min(drawn) >= 1
    assert drawn == lengths(384, 1024) != lengths(384, 1024, seed=1)
    assert set(lengths(512, 1024, sigma=0.0)) == {512}
    assert set(lengths(99, 14)) == {14} and set(lengths(1, 14)) == {1}


def test_flops_by_hand():
    # forward of 10 tokens: 2 x 100 x 10 for the weights; 50 pairs x 4 FLOPs x 1 layer x 1 head x 1 dimension
    assert plan.forward_flops(TOY, 10) == 2000 + 200
    assert train_flops(TOY, [(4, [6]), (10, [])]) == 2 * (6 * 100 * 10 + 6 * 1 * 1 * 1 * 100)
    assert train_flops(replace(TOY, tied=False), [(4, [6])]) == 6 * (100 - 20) * 10 + 600
    # a prompt of 4 for two responses of 6: 16 tokens; the prompt's pairs once, each response's 6 queries on 4 + 3 keys
    assert train_flops(TOY, [(4, [6, 6])]) == 6 * 100 * 16 + 12 * (4 * 4 / 2 + 2 * 6 * 7)


def test_decoding_by_hand():
    # weights 200, a cached token 4 bytes: 3 and 2 tokens after prompts of 7 run together, then the one that waited
    first = (200 + 4 * 14) + (200 + 4 * 16) + (200 + 4 * (9 + 7)) + (200 + 4 * 8)
    assert decode_seconds(TOY, SLOW_MEMORY, 7, [3, 2, 2], slots=2) == first
    alone = [sum(200 + 4 * (7 + made) for made in range(length)) for length in (3, 2, 2)]
    assert decode_seconds(TOY, SLOW_MEMORY, 7, [3, 2, 2], slots=1) == sum(alone)
    # multiplying: 2 x 100 a response, 4 a pair; both run, then one, whose context is 4
    assert decode_seconds(TOY, SLOW_CORES, 3, [2, 1], slots=2) == (400 + 4 * 6) + (200 + 4 * 4)
    assert decode_seconds(TOY, SLOW_MEMORY, 3, [], slots=2) == 0


def test_the_slowest_rank_decides_and_as_many_run_as_the_cache_holds(monkeypatch):
    def limit(groups, room, gpus=1, at_once=100):
        monkeypatch.setattr(plan, "cache_room", lambda *_: room)
        return decode_limit(TOY, Config(max_requests=at_once), SLOW_MEMORY, gpus, 2, groups)

    assert limit([[2], [5], [2]], 999, gpus=2) == decode_seconds(TOY, SLOW_MEMORY, 2, [5], 1)  # the other: [2] and [2]
    many = [1, 3] * 4  # a running response has 2 + (1 + 9) / (2 x 4) = 3.25 tokens on average
    by_slots = [decode_seconds(TOY, SLOW_MEMORY, 2, many, slots) for slots in (4, 3, 2, 1)]
    assert [limit([many], 13), limit([many], 12), limit([many], 999, at_once=2), limit([many], 0)] == by_slots
    assert len(set(by_slots)) == 4


def test_masters_gradients_and_adam_take_what_is_calculated(ranks):
    config = tiny_config(TINY_BASE, max_mismatch=0.0)  # the responses are made up
    replica = model.load_replica(config, ranks)
    policy = model.build_policy(replica, config, ranks)
    samples, captured = make_samples(make_groups(load_plain(TINY_BASE), REWARDS), config), CaptureGradients(policy)
    optimizer = make_optimizer(policy, config)
    for stepper in (captured, optimizer):
        update(policy, stepper, samples, config, ranks, 0)
    adam = [whole(state[key]) for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    tensors = {"replica": replica.parameters(), "float32 masters": map(whole, policy.parameters()), "Adam": adam,
               "gradients": captured.gradients.values()}  # fmt: skip
    parts = gpu_memory(shape_of(replica.config), config, gpus=1)["training"]
    assert {name: sum(tensor.nbytes for tensor in group) for name, group in tensors.items()}.items() <= parts.items()
    halves = gpu_memory(shape_of(replica.config), replace(config, kl=0.1), gpus=2)["rollouts"]
    assert halves["float32 masters"] == halves["second copy"] == halves["Adam"] / 2 == 2 * 478_080
    assert "second copy" not in parts


def saved_bytes(hf_config, dtype, tokens: int) -> int:
    """What autograd keeps of one forward pass, parameters aside, each storage once."""
    net = AutoModelForCausalLM.from_config(hf_config, dtype=dtype, attn_implementation="sdpa").train()
    model.use_attention(net, VARLEN)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), *net.buffers())}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net.model(use_cache=False, **pack([[1] * tokens], torch.device("cpu")))
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["smollm3", "qwen3", "qwen3_moe"])
def test_a_layers_activations_are_those_that_autograd_keeps(family, dtype):
    sizes = dict(vocab_size=50, hidden_size=96, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2)
    sizes |= dict(bos_token_id=None, eos_token_id=1, pad_token_id=None)
    sizes |= {} if family == "smollm3" else {"head_dim": 32}
    if family == "qwen3_moe":
        sizes |= dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=40, norm_topk_prob=True)
    few, more = (AutoConfig.for_model(family, **sizes, num_hidden_layers=layers) for layers in (1, 3))
    measured = (saved_bytes(more, dtype, 64) - saved_bytes(few, dtype, 64)) / 2 / 64
    shape = shape_of(few)
    copy = shape.heads * shape.head_dim * dtype.itemsize  # the CPU's attention returns a transposed copy
    borders = 4 * shape.experts / 64  # where each expert's tokens end, once for all 64 tokens
    assert layer_activation_bytes(shape, dtype.itemsize) + copy + borders == measured


def test_memory_by_hand():
    assert layer_activation_bytes(TOY, liger=True) == 2 * (2 * (2 + 2) + 4) + (2 * 4 + 4) + 2 * 3 * 3
    moving = 2 * (3 * 3 + 2 * 2) + 2 * (4 + 6)
    layer, two = 2 * (2 * (6 + 2) + 4) + (2 * 4 + 4) + 2 * 3 * 4, replace(TOY, layers=2)
    assert activation_bytes(two, 10, checkpointing=False) == 10 * (2 * layer + moving)
    assert activation_bytes(two, 10, checkpointing=True) == 10 * (2 * 2 * 2 + layer + moving)
    training = gpu_memory(TOY, Config(tokens_per_micro_batch=4096), 1)["training"]
    # 1,024 tokens at a time: two float32 logits and one in bfloat16; the table's gradient in float32 and bfloat16
    assert training["log-prob head"] == 1024 * 10 * 10 + 20 * 6
    assert training["gathered weights"] == 22 * 8 + (100 - 20 - 2) * 10
    # 100 parameters in bfloat16 on two GPUs, without and with offload
    parts, left = (gpu_memory(TOY, Config(offload=on, tokens_per_micro_batch=4096), 2)["training"] for on in (0, 1))
    assert (parts["replica"], parts["float32 masters"], parts["gradients"], parts["Adam"]) == (200, 200, 200, 400)
    assert sum(parts.values()) - sum(left.values()) == 800 and left["replica"] == 200


def test_auto_stores_activations_where_they_fit_nine_tenths_of_the_memory():
    auto, *fixed = (Config(gradient_checkpointing=value) for value in ("auto", True, False))
    need = sum(gpu_memory(TOY, fixed[1], 2)["training"].values())
    assert [decided(TOY, auto, 2, need / 0.9 + more) for more in (-1, 1)] == fixed


def test_auto_is_decided_before_the_model_is_wrapped_and_on_a_cpu_by_its_free_memory(folders, ranks, monkeypatch):
    config = tiny_config(folders["smollm3"], gradient_checkpointing="auto")
    replica = model.load_replica(config, ranks)
    with pytest.raises(AssertionError, match="decide_checkpointing comes first"):
        model.build_policy(replica, config, ranks)
    decide = memory.decide_checkpointing
    stored, recomputed = (replace(config, gradient_checkpointing=on) for on in (False, True))
    assert decide(replica.config, config, ranks) == stored and memory.memory_of(ranks) > 1e8
    monkeypatch.setattr(memory, "memory_of", lambda ranks: 1e6)
    assert decide(replica.config, config, ranks) == recomputed
    assert all(decide(replica.config, told, ranks) is told for told in (stored, recomputed))


def test_a_run_that_cannot_fit_warns_and_a_cpu_has_no_bound(monkeypatch, ranks):
    config, hf_config = Config(gradient_checkpointing=True), architecture("HuggingFaceTB/SmolLM3-3B-Base")
    assert memory.memory_warnings(hf_config, config, ranks) == []
    ranks = replace(ranks, device=torch.device("cuda"))
    monkeypatch.setattr(memory, "memory_of", lambda ranks: 24e9)
    rollouts, training = memory.memory_warnings(hf_config, config, ranks)
    assert rollouts.startswith("WARNING: this GPU has 24 GB; rollouts would take 44 by calculation")
    assert "; training would take " in training


def test_cache_room_by_hand():
    config = Config(cache_memory=0.5, max_requests=4)
    gpu = SLOW_MEMORY._replace(memory=1e9 + 2000)  # context 1e9, replica 200, masters 400, Adam 800: 600 are left
    # half of it, less logits of four requests: 4 x (4 x 10 + 2 x 2); a token takes 4, 4 to be read and 16 of indices
    assert plan.cache_room(TOY, config, 1, gpu) == (300 - 176) // 24
    assert plan.cache_room(TOY, replace(config, offload=True), 1, gpu) == (900 - 176) // 24  # no masters, no Adam
    assert plan.cache_room(TOY, config, 1, gpu._replace(memory=1e9)) == 0


def test_responses_of_a_step():
    def counts(**changes):
        config = Config(passages_per_step=2, masks_per_passage=4, predictions_per_mask=8, max_mask_tokens=9, **changes)
        return phases(config)

    assert counts() == [("propose", 2, 4, 9), ("predict", 8, 8, 4096)]
    assert counts(method="random_span") == counts(method="random_token") == [("predict", 9, 8, 4096)]
    assert counts(method="rlp", warmup_steps=1) == counts(method="rlvr") == [("predict", 2, 8, 4096)]
    assert counts(method="sft") == counts(method="cpt") == []


def ideal(*words) -> dict:
    """The plan of a step of twelve responses of 2 tokens to prompts of 3."""
    work = ("passages_per_step=2 masks_per_passage=2 predictions_per_mask=2 gpus=1 prompt=3 mean_response=2 sigma=0 "
            "gradient_checkpointing=true")  # fmt: skip
    options, config = read_words([*work.split(), *words], PlanOptions)
    return plan.ideal_seconds(TOY, config, options, GPUS["h100"], options.gpus, options.kept)


def test_ideal_seconds_by_hand():
    step, h100 = ideal(), GPUS["h100"]
    assert (step["responses"], step["response_tokens"], step["trained_tokens"]) == (12, 24, 60)
    seconds = {
        "prefill": (2 + 4) * (2 * 100 * 3 + 4 * 4.5) / h100.flops,
        "propose": (248 + 264) / h100.bandwidth,  # four at once: 200 + 4 x 3 x 4 bytes, then contexts of 4
        "predict": (200 + 8 * 12 + 200 + 8 * 16) / h100.bandwidth,
        "update": 12 * (6 * 100 * 5 + 6 * 25) / h100.flops,  # twelve sequences of 5 tokens
        "recomputing layers": 12 * (2 * 80 * 5 + 2 * 25) / h100.flops,  # without the head of 20 parameters
        "optimizer, refresh": 100 * (28 + 4 + 2) / h100.bandwidth,
    }
    assert step["seconds"] == pytest.approx(seconds)
    stored = ideal("gradient_checkpointing=false")
    assert stored["seconds"] | {"recomputing layers": stored["recomputing"]} == step["seconds"] != stored["seconds"]
    fewer = ideal("train_generator=false", "kept=0.5")
    assert fewer["trained_tokens"] == 20 and fewer["seconds"]["update"] == pytest.approx(seconds["update"] / 3)


def test_scoring_is_counted_where_a_second_copy_scores():
    penalty, thoughts, given = ideal("kl=0.1")["seconds"], ideal("method=rlp")["seconds"], ideal("method=cpt")
    assert penalty["scoring"] == pytest.approx(penalty["update"] / 3)
    baseline = 2 * (2 * 100 * 3 + 4 * 4.5) / GPUS["h100"].flops
    assert thoughts["scoring"] == pytest.approx(thoughts["update"] / 3 + baseline)
    assert given["responses"] == 0 and given["trained_tokens"] == 6
    assert set(given["seconds"]) == {"update", "recomputing layers", "optimizer, refresh"}


@pytest.mark.parametrize("words, gpu, gpus, verdict", [
    ("smollm3.yaml", "h100", 8, "fits: "),
    ("qwen3-8b.yaml", "h100", 1, "GB in rollouts; change offload, gpus, gpu or model"),
    ("smollm3.yaml gradient_checkpointing=false tokens_per_micro_batch=32768", "h100", 8,
     "GB in training; change gradient_checkpointing, tokens_per_micro_batch, gpus, gpu or model"),
    ("smollm3.yaml tokens_per_micro_batch=200000", "h100", 8, "GB in training; change tokens_per_micro_batch, off"),
    ("smollm3.yaml cache_memory=0.005", "h100", 8, "a request of 5,632; change cache_memory, gpus, gpu or model"),
    ("qwen3-0.6b-24gb.yaml", "rtx4090", 1, "fits: "),
    ("qwen3-4b.yaml", "h100", 8, "fits: "),
    ("qwen3-30b-a3b.yaml", "h200", 8, "fits: "),
    ("qwen3-30b-a3b.yaml", "h100", 8, "GB in training; change tokens_per_micro_batch, gpus, gpu or model"),
    ("qwen3-30b-a3b.yaml max_prompt_tokens=4096", "h100", 8, "GB in training; change gpus, gpu or model"),
    ("qwen3-30b-a3b.yaml offload=false", "h200", 2, "GB in rollouts; change offload, gpus, gpu or model"),
    ("qwen3-8b.yaml kl=0.1", "h100", 1, "GB in rollouts; change gpus, gpu or model"),
])  # fmt: skip
def test_a_plan_says_whether_it_fits_and_what_to_change(known, monkeypatch, words, gpu, gpus, verdict):
    monkeypatch.chdir(ROOT / "configs")
    config = read_config(words.split())
    planned = decided(known[config.model], config, gpus, GPUS[gpu].memory)
    said = advice(known[config.model], planned, gpus, GPUS[gpu])
    assert verdict in said and said.startswith(("fits", "does not fit: "))
    if verdict == "fits: " and config.gradient_checkpointing == "auto":  # then layers are stored, as these configs say
        assert not planned.gradient_checkpointing


@pytest.fixture
def planned(monkeypatch, capsys):
    """What the command prints."""
    monkeypatch.chdir(ROOT)
    return lambda *words: main(["plan", *words]) or capsys.readouterr().out


def test_the_plan_adds_up(planned):
    text = planned("configs/smollm3.yaml", "mean_response=1024")
    assert "3,075,098,624 parameters; 8 x NVIDIA H100" in text and "2,304 responses" in text and "  fits" in text
    rows = dict(re.findall(r"^  (\S.*?) +([\d.]+)(?: +[\d.]+)?$", text.split("seconds a step")[1], re.M))
    parts = [float(rows[name]) for name in ("prefill", "propose", "predict", "update", "optimizer, refresh")]
    assert float(rows["step"]) == pytest.approx(sum(parts), abs=0.03)
    assert float(rows["GPU hours, 2000 steps"]) == pytest.approx(float(rows["step"]) * 2000 * 8 / 3600, rel=0.01)
    refused = planned("configs/smollm3.yaml", "gpus=1", "gpu=rtx3090")
    assert "does not fit" in refused and "seconds a step" not in refused


def test_the_plan_with_offload(planned):
    text = planned("configs/qwen3-30b-a3b.yaml", "gpu=h200")
    assert "30,532,122,624 parameters" in text and "GPU hours" in text
    rows = dict(re.findall(r"^  (\S.*?) {2,}[\d.]+ {2,}([\d.]+)", text, re.M))
    assert rows["replica"] == "61.06" and rows["all of it, in training"] == "108.65" and "Adam" not in rows
    assert "host memory per node of 8 GPUs: 916 GB in the run, 489 GB while" in text
    assert "; a checkpoint: 427 GB\n" in text
    unsaved = planned("configs/qwen3-30b-a3b.yaml", "gpu=h200", "save_every=0")
    assert "GPUs: 489 GB in the run, 489 GB while" in unsaved


@pytest.mark.parametrize("gpu, taken", [("rtx3090", "recomputed"), ("h100", "stored")])
def test_the_plan_says_what_auto_takes_and_what_either_way_costs(planned, gpu, taken):
    words = ["configs/qwen3-0.6b-24gb.yaml", "gpus=1", f"gpu={gpu}", "tokens_per_micro_batch=8192"]
    auto, also = planned(*words), planned(*words, f"gradient_checkpointing={str(taken != 'stored').lower()}")
    assert f"gradient_checkpointing=auto: activations of 8,192 tokens are {taken}\n" in auto
    assert auto.partition("auto:")[2] == also.partition(f"{str(taken != 'stored').lower()}:")[2]
    assert re.search(r"activations +10.6\d +1.\d+\n", auto)  # GB, stored and recomputed, whatever is taken
    assert ("recomputing layers" in auto) == (taken == "recomputed")


def test_a_plan_for_a_cpu_goes_by_its_measured_rates_and_says_minutes(planned, monkeypatch):
    one, share = plan.measure_cpu(1), plan.measure_cpu(100)
    assert one.flops > max(1e8, 5 * share.flops) and one.bandwidth > max(1e8, 5 * share.bandwidth)
    assert one.memory > 50 * share.memory
    monkeypatch.setitem(GPUS, "cpu", None)  # put back at the end
    minutes = []
    for rate in (1e11, 5e10):
        monkeypatch.setattr(plan, "measure_cpu", lambda ranks, rate=rate: Gpu("rank", rate, rate / 10, 20e9 / ranks))
        text = planned("configs/smollm2-135m.yaml", "gpu=cpu", "gpus=2", "steps=120")
        assert "of 10, if live all at once" in text and "GPU hours" not in text and "bfloat16" not in text
        minutes.append(int(re.search(r"minutes, 120 steps +(\d+)", text)[1]))
    assert minutes[1] == pytest.approx(2 * minutes[0], abs=1) and minutes[0] > 0
