"""Two copies of one model: what the trainer computes is what the sampler computes, and stays so."""

from contextlib import nullcontext

import pytest
import torch
from reference import DENSE, FAMILIES, load_plain, same_bits, tiny_config, weights
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, SmolLM3Config

import model
from config import Config, ConfigError
from model import build_policy, load_replica, load_tokenizer, refresh, empty_policy
from ops import VARLEN, pack
from ranks import Ranks, start_ranks

HUB = {  # the checkpoints' own config.json, what decides shapes
    "SmolLM3-3B": (
        SmolLM3Config,
        dict(vocab_size=128256, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
             num_attention_heads=16, num_key_value_heads=4, tie_word_embeddings=True, no_rope_layer_interval=4),
        3_075_098_624,
    ),
    "Qwen3-4B": (
        Qwen3Config,
        dict(vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
             num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True),
        4_022_468_096,
    ),
    "Qwen3-8B": (
        Qwen3Config,
        dict(vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
             num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False),
        8_190_735_360,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def mesh(ranks):
    return init_device_mesh("cpu", (ranks.world,))


def score(policy, tokens: list[list[int]], temperature=1.0):
    """Log-probs and entropies of all tokens but each sequence's first."""
    inputs = pack(tokens, torch.device("cpu"))
    starts = set(inputs["cu_seq_lens_q"].tolist())
    predicts = torch.tensor([n for n in range(inputs["input_ids"].shape[1]) if n + 1 not in starts])
    return policy(predicts=predicts, targets=inputs["input_ids"][0, predicts + 1], temperature=temperature, **inputs)


# -------------------------------------------------------------------------------------- the real models, without memory
@pytest.mark.parametrize("name", HUB)
def test_real_models_are_sharded_layer_by_layer_with_all_their_parameters(mesh, name):
    kind, sizes, parameters = HUB[name]
    policy = empty_policy(kind(**sizes), tiny_config(gradient_checkpointing=True), mesh, VARLEN)
    assert sum(parameter.numel() for parameter in policy.parameters()) == parameters
    assert sum(isinstance(module, FSDPModule) for module in policy.modules()) == sizes["num_hidden_layers"] + 1
    assert all(parameter.is_meta and parameter.dtype == torch.float32 for parameter in policy.parameters())
    tied = policy.get_output_embeddings().weight is policy.get_input_embeddings().weight
    assert tied == sizes["tie_word_embeddings"]


# ------------------------------------------------------------------------------------------------ load, policy, refresh
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_filled_policy_holds_the_checkpoint_and_refresh_gives_it_back(folders, ranks, family, dtype):
    config = tiny_config(folders[family], dtype=dtype)
    replica = load_replica(config, ranks)
    loaded = weights(replica)
    policy = build_policy(replica, config, ranks)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert {p.dtype for p in replica.parameters()} == {getattr(torch, dtype)}
    assert not any(p.requires_grad for p in replica.parameters()) and all(p.requires_grad for p in policy.parameters())
    for parameter in replica.parameters():  # whatever was there is overwritten, in place
        parameter.zero_()
    refresh(policy, replica)
    assert same_bits(weights(replica), loaded)


def test_refresh_tells_what_share_of_the_values_changed(folders, ranks):
    """Bfloat16 has steps of 1/128 above 1: a master that has moved by less than half of one changes nothing."""
    replica = load_replica(tiny_config(folders["smollm3"], dtype="bfloat16"), ranks)
    total = sum(parameter.numel() for parameter in replica.parameters())
    norm = replica.model.norm.weight.fill_(1.0)
    policy = build_policy(replica, tiny_config(folders["smollm3"], dtype="bfloat16"), ranks)
    assert refresh(policy, replica) == 0.0
    with torch.no_grad():
        policy.model.norm.weight.to_local().add_(0.0038)
    assert refresh(policy, replica) == 0.0
    with torch.no_grad():
        policy.model.norm.weight.to_local()[:3].add_(0.0002)
    assert refresh(policy, replica) == 3 / total and (norm > 1).sum() == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_filled_policy_computes_what_the_checkpoint_computes(folders, ranks, family):
    """Parameters and buffers: empty rotary frequencies would not be noticed by any loader."""
    config = tiny_config(folders[family])
    policy = build_policy(load_replica(config, ranks), config, ranks)
    tokens = [list(range(40)), [7], [9, 9, 9, 200]]
    logprobs, entropy = score(policy, tokens, temperature=0.7)
    expected, expected_entropy = [], []
    for row in tokens:
        scores = (load_plain(folders[family])(input_ids=torch.tensor([row])).logits[0] / 0.7).log_softmax(-1)[:-1]
        expected.append(scores.gather(-1, torch.tensor(row)[1:, None])[:, 0])
        expected_entropy.append(-(scores.exp() * scores).sum(-1))
    torch.testing.assert_close(logprobs, torch.cat(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropy, torch.cat(expected_entropy), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", DENSE)
def test_in_bfloat16_trainer_and_sampler_still_compute_the_same(folders, ranks, family):
    config = tiny_config(folders[family], dtype="bfloat16")
    replica = load_replica(config, ranks)
    policy = build_policy(replica, config, ranks)
    inputs = pack([list(range(40)), [9, 9, 9, 200]], ranks.device)
    with torch.no_grad():
        logits = replica(use_cache=False, **inputs).logits[0].float().log_softmax(-1)
        logprobs, _ = score(policy, [list(range(40)), [9, 9, 9, 200]])
    predicts = torch.tensor([n for n in range(43) if n != 39])
    expected = logits[predicts].gather(-1, inputs["input_ids"][0, predicts + 1, None])[:, 0]
    torch.testing.assert_close(logprobs, expected)  # the softmax is float32 on both sides


# ------------------------------------------------------------------------------------------------------ what is refused
@pytest.fixture
def driver(monkeypatch, tmp_path):
    """A machine with a GPU, as its driver's file tells."""
    monkeypatch.setattr(model, "DRIVER", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize("built, told", [("13.0", "CUDA 13.0: an older driver"), (None, "for no CUDA")])
def test_a_gpu_that_torch_cannot_use_is_no_reason_to_run_on_the_cpu(ranks, driver, monkeypatch, built, told):
    monkeypatch.setattr(torch.version, "cuda", built)
    with pytest.raises(ConfigError, match=f"there is a GPU, but torch .*{told}"):
        model.check_device(Config(model="m", data="d", dtype="bfloat16"), ranks)
    model.check_device(Config(model="m", data="d", dtype="float32"), ranks)  # the laptop run may
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        model.check_device(Config(model="m", data="d", dtype="bfloat16"), ranks)  # who hides the GPU means it
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(model, "DRIVER", model.DRIVER / "none")
    model.check_device(Config(model="m", data="d", dtype="bfloat16"), ranks)  # no GPU


def test_a_model_is_not_loaded_for_a_machine_that_will_not_do(ranks, monkeypatch):
    monkeypatch.setattr(AutoConfig, "from_pretrained", None)
    with pytest.raises(ConfigError, match="attention=flash_attention_2: needs CUDA"):
        load_replica(Config(model="m", data="d", attention="flash_attention_2"), ranks)


@pytest.mark.parametrize("capability, fits", [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bfloat16_needs_a_gpu_that_has_it(monkeypatch, capability, fits):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config, gpu = Config(model="m", data="d", dtype="bfloat16", attention="varlen"), torch.device("cuda", 0)
    with nullcontext() if fits else pytest.raises(ConfigError, match="dtype='bfloat16': not on a Tesla T4"):
        model.check_device(config, Ranks(0, 1, gpu))


def test_more_ranks_than_gpus_is_one_line(monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for local in ("4", "5", "7"):
        monkeypatch.setenv("LOCAL_RANK", local)
        with pytest.raises(SystemExit, match="2"):
            start_ranks()
    assert capfd.readouterr().err == (
        "nproc_per_node: no GPU for rank 4, 4 visible; CUDA_VISIBLE_DEVICES= runs on the CPU\n"
    )


def test_a_head_that_is_more_than_a_matrix_product_is_refused(folders, ranks, monkeypatch):
    plain = AutoModelForCausalLM.from_pretrained

    def capped(*words, **keys):
        model, found = plain(*words, **keys)
        model.config.final_logit_softcapping = 30.0
        return model, found

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", capped)
    with pytest.raises(ConfigError, match="head is not a plain matrix product.*final_logit_softcapping"):
        load_replica(tiny_config(folders["smollm3"]), ranks)


def test_the_chat_template_is_off_the_tokenizers_own_or_a_file(folders, tmp_path):
    folder = folders["smollm3"]
    assert load_tokenizer(tiny_config(folder, chat_template="auto")).chat_template is None  # it has none
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages[0].content }}!")
    tokenizer = load_tokenizer(tiny_config(folder, chat_template=str(file)))
    assert tokenizer.chat_template == "{{ messages[0].content }}!"
    tokenizer.save_pretrained(tmp_path / "chatty")
    assert load_tokenizer(tiny_config(tmp_path / "chatty", chat_template="auto")).chat_template
    assert load_tokenizer(tiny_config(tmp_path / "chatty", chat_template="none")).chat_template is None
