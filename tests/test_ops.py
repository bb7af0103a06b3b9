"""Attention over packed tokens and log-probs without logits, each against its plain version."""

import logging
import re
import sys
from functools import partial
from types import ModuleType, SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ops
from engine import cache
from grpo import Sample, pack_samples
from ops import VARLEN, apply_liger, choose_attention, pack, token_logprobs, varlen_attention
from rollout import Rollout

CPU = torch.device("cpu")

# --------------------------------------------------------------------------------------------------- the plain versions
def plain_attention(q, k, v, scale):
    """One sequence: q (Tq, heads, dim), k and v (Tk, kv heads, dim); the last query sees all keys."""
    queries, keys, repeats = len(q), len(k), q.shape[1] // k.shape[1]
    hidden = torch.arange(keys) > torch.arange(queries)[:, None] + keys - queries
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        scores = scale * q[:, head] @ k[:, head // repeats].T
        out[:, head] = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, head // repeats]
    return out


def plain_logprobs(hidden, weight, targets, temperature):
    """The whole (N, V) logits, log_softmax, gather."""
    logprobs = (hidden @ weight.T / temperature).log_softmax(-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


# -------------------------------------------------------------------------------------------------------------- packing
def test_a_micro_batch_goes_to_the_device_in_one_copy():
    """Counted on a device without data."""
    rows = [Rollout([1, 2, 3], [4, 5, 6][:count], [-0.5] * count, "", "eos") for count in (1, 3)]
    copies = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            copies.extend([function] if (kwargs or {}).get("device") == torch.device("meta") else [])
            return function(*args, **kwargs or {})

    with Count():
        batch = pack_samples([[Sample(row, 1.0, 0.5) for row in rows]], torch.device("meta"))
    assert len(copies) == 1 and batch.weights.is_meta and batch.inputs["shared_keys"].is_meta


def test_liger_names_no_backend_that_is_not_installed():
    """It would, in two lines of each process, where its kernels first run."""
    assert apply_liger(SimpleNamespace(config=SimpleNamespace(model_type="none of its models"))) is False
    assert not logging.getLogger("liger_kernel.backends.registry").isEnabledFor(logging.WARNING)


def test_pack_by_hand():
    packed = pack([[5, 6, 7], [8], [9, 4]], CPU)
    assert packed["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]  # each sequence starts at 0
    assert packed["cu_seq_lens_q"].tolist() == packed["cu_seq_lens_k"].tolist() == [0, 3, 4, 6]
    assert packed["cu_seq_lens_q"].dtype == torch.int32 and packed["max_length_q"] == packed["max_length_k"] == 3


# ------------------------------------------------------------------------------------------------------------ attention
def random_qkv(queries: list[int], keys: list[int], kv_heads=2, heads=4, dim=8):
    """One packed row of sequences with these many queries and keys, in the layout of transformers."""
    torch.manual_seed(0)
    q = torch.randn(1, heads, sum(queries), dim, requires_grad=True)
    k, v = (torch.randn(1, kv_heads, sum(keys), dim, requires_grad=True) for _ in range(2))
    borders = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (queries, keys)]
    return q, k, v, borders


def ours(q, k, v, cu_q, cu_k, **extra):
    return varlen_attention(None, q, k, v, scaling=0.3, cu_seq_lens_q=cu_q, cu_seq_lens_k=cu_k, **extra)[0]


@pytest.mark.parametrize("queries, keys, kv_heads", [
    *(([5, 1, 9, 3], [5, 1, 9, 3], kv_heads) for kv_heads in (4, 2, 1)),  # training: inside each sequence only
    ([1, 1, 1, 1], [7, 1, 12, 4], 2),  # decoding: from one query to the whole past
    ([3, 1, 4], [8, 6, 4], 2),  # a prefill in pieces: three new tokens after five old ones, one after five, all new
    ([2, 0, 3], [2, 0, 3], 2),  # a request without queries
])  # fmt: skip
def test_packed_attention_equals_the_plain_version_of_each_sequence(queries, keys, kv_heads):
    """Values and gradients."""
    q, k, v, borders = random_qkv(queries, keys, kv_heads)
    out = ours(q, k, v, *borders)
    rows = [x[0].transpose(0, 1).split(lengths) for x, lengths in ((q, queries), (k, keys), (v, keys))]
    expected = torch.cat([plain_attention(*one, 0.3) for one in zip(*rows, strict=True)])[None]
    torch.testing.assert_close(out, expected)
    noise = torch.randn_like(expected)
    found = torch.autograd.grad((out * noise).sum(), (q, k, v))
    torch.testing.assert_close(found, torch.autograd.grad((expected * noise).sum(), (q, k, v)))


# ------------------------------------------------------------------------------------------- decoding by a block table
@pytest.fixture
def pages():
    """A cache of 9 pages of 4 tokens; a step of requests of 6, 4 and 0 (padding) tokens, the new one counted."""
    torch.manual_seed(0)
    table = torch.tensor([[5, 2, -1], [7, -1, -1], [-1, -1, -1]], dtype=torch.int32)
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1, 2, 2], [0, 6, 10, 10]))
    shapes = {"k_pages": (9, 4, 2, 8), "v_pages": (9, 4, 2, 8), "q": (3, 4, 8), "k": (3, 2, 8), "v": (3, 2, 8)}
    places = ops.new_token_places(table, cu_k, page=4, spare=1)
    step = {"table": table, "cu_k": cu_k, "cu_q": cu_q, "places": places}
    return {name: torch.randn(shape) for name, shape in shapes.items()} | step


def test_a_step_writes_the_new_key_behind_the_past_and_attends_to_both(pages):
    before = [pages[name].clone() for name in ("k_pages", "v_pages")]
    out = cache.decode_by_table(**pages, scale=0.3)
    for then, name, new in zip(before, ("k_pages", "v_pages"), "kv", strict=True):
        then[2, 1], then[7, 3], then[1, 0] = pages[new]  # token 6 is the second of page 2, token 4 the last of page 7
        assert torch.equal(pages[name], then)
    for row, (numbers, length) in enumerate([([5, 2], 6), ([7], 4)]):
        k, v = (pages[name][numbers].flatten(0, 1)[:length] for name in ("k_pages", "v_pages"))
        torch.testing.assert_close(out[row], plain_attention(pages["q"][row][None], k, v, 0.3)[0])


def test_what_the_kernel_is_given_is_what_the_installed_torch_takes(pages, monkeypatch):
    """No GPU here: the kernel's own registration checks names and types on tensors without data."""
    spy = Mock(wraps=cache.varlen_attn)
    monkeypatch.setattr(cache, "varlen_attn", spy)
    meta = {name: value.to("meta") for name, value in pages.items() if name != "places"}
    lengths = meta["cu_k"].diff()
    tensors = [meta[name] for name in ("q", "k_pages", "v_pages", "table")]
    out = cache._read_pages_torch(*tensors, lengths, meta["cu_q"], meta["cu_k"], 0.3)
    assert out.shape == pages["q"].shape
    (*_, cu_q, cu_k, longest_q, longest_k), options = spy.call_args
    assert (longest_q, longest_k) == (1, 3 * 4)  # of every step, else a CUDA graph would hold for one step only
    kinds = {x.dtype for x in (cu_q, cu_k, options["seqused_k"], options["block_table"])}
    assert kinds == {torch.int32} and options["num_splits"] == 1 and options["scale"] == 0.3
    assert options["seqused_k"] is lengths and "window_size" not in options


def wrong_kernel(fault: str, q, k_pages, v_pages, table, lengths, *rest):
    if fault == "refuses":
        raise RuntimeError("block_table needs something else\nand a trace")
    if fault == "reads its pages to the end":
        lengths = lengths.clamp(min=1024)
    if fault == "takes pages as they lie":
        table = torch.arange(table.numel(), dtype=torch.int32).view(table.shape)
    out = cache._read_pages_plain(q, k_pages, v_pages, table, lengths, *rest)
    if fault == "leaves rows unwritten":  # as torch's did where it split the keys
        out[1:] = torch.nan
    return out + 0.1 if fault == "is a little off" else out


@pytest.mark.parametrize("kernel, trouble", [
    (cache._read_pages_plain, "^$"),
    (partial(wrong_kernel, "leaves rows unwritten"), "its kernel is off by nan"),
    (partial(wrong_kernel, "reads its pages to the end"), r"its kernel is off by \d"),
    (partial(wrong_kernel, "takes pages as they lie"), r"its kernel is off by \d"),
    (partial(wrong_kernel, "is a little off"), "its kernel is off by 0.1"),
    (partial(wrong_kernel, "refuses"), "block_table needs something else$"),
])  # fmt: skip
def test_the_kernel_is_tried_before_it_is_trusted(kernel, trouble):
    assert re.search(trouble, cache._try_reader(kernel, CPU, torch.bfloat16, 4, 2, 16))


def test_on_a_cpu_and_in_float32_there_is_nothing_to_try(monkeypatch):
    monkeypatch.setattr(cache, "_try_reader", None)
    for device, dtype in ((CPU, torch.bfloat16), (torch.device("cuda", 0), torch.float32)):
        assert cache.table_reader(device, dtype, 4, 2, 16) == (cache._read_pages_plain, "")


@pytest.mark.parametrize("trouble", ["", "off by 3"])
def test_on_a_gpu_torchs_kernel_reads_the_pages_if_its_trial_passes(monkeypatch, trouble):
    trials = Mock(return_value=trouble)
    monkeypatch.setattr(cache, "_try_reader", trials)
    cache.table_reader.cache_clear()
    shape = torch.device("cuda", 0), torch.bfloat16, 8, 4, 24
    for _ in range(2):
        assert cache.table_reader(*shape) == ((None, trouble) if trouble else (cache._read_pages_torch, ""))
    trials.assert_called_once_with(cache._read_pages_torch, *shape)  # tried once
    cache.table_reader.cache_clear()


# ------------------------------------------------------------------------------------------------------- what is chosen
@pytest.mark.parametrize("extra", [{}, {"sliding_window": 8}, {"softcap": 30.0}])
def test_what_it_would_compute_wrongly_is_refused(extra):
    q, k, v, borders = random_qkv([3], [3])
    with pytest.raises(NotImplementedError):
        ours(q, k, v, *(borders if extra else (None, None)), **extra)


def test_attention_is_chosen_by_what_the_machine_has_and_flash_attn_not_for_float32(monkeypatch):
    assert choose_attention("auto", CPU, torch.bfloat16) == choose_attention("varlen", CPU, torch.bfloat16) == VARLEN
    with pytest.raises(RuntimeError, match="flash_attention_2.*CUDA"):
        choose_attention("flash_attention_2", CPU, torch.bfloat16)
    monkeypatch.setattr(ops, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(ops, "is_flash_attn_3_available", lambda: False)
    for name in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    gpu = torch.device("cuda", 0)
    assert choose_attention("auto", gpu, torch.bfloat16) == "flash_attention_2"
    assert choose_attention("auto", gpu, torch.float32) == choose_attention("varlen", gpu, torch.bfloat16) == VARLEN
    for wanted, dtype in (("flash_attention_2", torch.float32), ("flash_attention_3", torch.bfloat16)):
        with pytest.raises(RuntimeError, match=f"attention={wanted}: needs CUDA, dtype bfloat16 and its package"):
            choose_attention(wanted, gpu, dtype)
    monkeypatch.setattr(ops, "is_flash_attn_3_available", lambda: True)
    assert choose_attention("flash_attention_3", gpu, torch.bfloat16) == "flash_attention_3"


def test_a_flash_attn_for_another_torch_is_refused_at_the_start(monkeypatch, tmp_path):
    """Its metadata say that it is there; only loading it shows that it is of no use."""
    monkeypatch.setattr(ops, "is_flash_attn_2_available", lambda: True)
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="attention=auto: flash_attn is installed but does not load.*_ZN3c10"):
        choose_attention("auto", torch.device("cuda", 0), torch.bfloat16)
    assert choose_attention("varlen", torch.device("cuda", 0), torch.bfloat16) == VARLEN


# ------------------------------------------------------------------------------------------------- log-probs, entropies
@pytest.fixture
def head():
    """hidden (7, 16), weight (40, 16), targets (7,)."""
    torch.manual_seed(1)
    hidden, weight = torch.randn(7, 16), 0.3 * torch.randn(40, 16)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(40, (7,))


def test_logprobs_by_hand():
    """Logits 0 and ln 9 at temperature 2 are 0 and ln 3: probabilities 1/4 and 3/4."""
    hidden, weight = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [2.1972246]])
    logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([0, 1]), temperature=2.0)
    assert logprobs.tolist() == pytest.approx([-1.386294, -0.287682])  # ln 1/4, ln 3/4
    assert entropy.tolist() == pytest.approx([0.562335, 0.562335])  # 1/4 ln 4 + 3/4 ln 4/3


@pytest.mark.parametrize("chunk", [1, 3, 7, 1024])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_logprobs_entropies_and_gradients_equal_the_plain_version(head, chunk, temperature):
    hidden, weight, targets = head
    logprobs, entropy = token_logprobs(hidden, weight, targets, temperature, chunk)
    expected, expected_entropy = plain_logprobs(hidden, weight, targets, temperature)
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropy, expected_entropy)
    assert logprobs.dtype == entropy.dtype == torch.float32 and not entropy.requires_grad
    noise = torch.randn(len(targets))
    found = torch.autograd.grad((logprobs * noise).sum(), (hidden, weight))
    torch.testing.assert_close(found, torch.autograd.grad((expected * noise).sum(), (hidden, weight)))


def test_the_head_walks_over_few_bytes_of_its_logits():
    """Bytes per logit in bfloat16 beside the products, without data. Before: 78, with one read for logsumexp."""
    moved, products, rows, vocabulary = 0, [], 64, 4096

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal moved
            out, name = function(*args, **kwargs or {}), function.overloadpacket.__name__
            if name in ("mm", "addmm"):
                products.append((name, out.dtype))
            elif name not in ("t", "slice", "unsqueeze", "gather", "scatter_", "scatter_add_"):  # views, single entries
                sizes = [x.nbytes for x in (*args, out) if isinstance(x, torch.Tensor) and x.dim() == 2]
                moved += sum(size for size in sizes if size >= 2 * rows * vocabulary)
            return out

    hidden, weight = (torch.empty(n, 8, dtype=torch.bfloat16, device="meta") for n in (rows, vocabulary))
    hidden.requires_grad_(), weight.requires_grad_()
    with Count():
        logprobs, _ = token_logprobs(hidden, weight, torch.empty(rows, dtype=torch.long, device="meta"), 1.0)
        logprobs.sum().backward()
    assert moved / rows / vocabulary == 54
    assert products[-1] == ("addmm", torch.float32)  # adds to the head's gradient itself


def test_in_bfloat16_the_softmax_is_still_float32_and_chunks_do_not_bias_the_gradient(head):
    (hidden, weight), targets = (x.detach().bfloat16().requires_grad_() for x in head[:2]), head[2]
    logprobs, entropy = token_logprobs(hidden, weight, targets, 1.0, chunk=2)
    logits = (hidden @ weight.T).float()
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0])
    assert logprobs.dtype == entropy.dtype == torch.float32
    small = torch.autograd.grad(logprobs.sum(), weight)[0]
    large = torch.autograd.grad(token_logprobs(hidden, weight, targets, 1.0, chunk=1024)[0].sum(), weight)[0]
    assert small.dtype == torch.bfloat16 and torch.equal(small, large)  # summed in float32, rounded once
