"""Attention over packed tokens and log-probs without logits, each against its plain version."""

import logging
import re
import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from reference import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation.continuous_batching import PagedAttentionCache

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
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        scores = scale * q[:, head] @ k[:, head // repeats].T
        for row in range(queries):
            scores = scores.masked_fill(
                (torch.arange(queries)[:, None] == row) & (torch.arange(keys) > keys - queries + row), -torch.inf
            )
        out[:, head] = scores.softmax(-1) @ v[:, head // repeats]
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
    assert packed["cu_seq_lens_q"].dtype == torch.int32
    assert packed["max_length_q"] == packed["max_length_k"] == 3


# ------------------------------------------------------------------------------------------------------------ attention


def random_qkv(queries: list[int], keys: list[int], heads=4, kv_heads=2, dim=8):
    """One packed row of sequences with these many queries and keys, in the layout of transformers."""
    torch.manual_seed(0)
    q = torch.randn(1, heads, sum(queries), dim, requires_grad=True)
    k, v = (torch.randn(1, kv_heads, sum(keys), dim, requires_grad=True) for _ in range(2))
    borders = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (queries, keys)]
    return q, k, v, borders


def compare(queries: list[int], keys: list[int], **heads):
    """Ours on the packed row against the plain version per sequence: values and gradients."""
    q, k, v, (cu_q, cu_k) = random_qkv(queries, keys, **heads)
    out, _ = varlen_attention(None, q, k, v, scaling=0.3, cu_seq_lens_q=cu_q, cu_seq_lens_k=cu_k)
    rows = [x[0].transpose(0, 1).split(lengths) for x, lengths in ((q, queries), (k, keys), (v, keys))]
    expected = torch.cat([plain_attention(*one, 0.3) for one in zip(*rows, strict=True)])[None]
    torch.testing.assert_close(out, expected)
    noise = torch.randn_like(expected)
    found = torch.autograd.grad((out * noise).sum(), (q, k, v))
    torch.testing.assert_close(found, torch.autograd.grad((expected * noise).sum(), (q, k, v)))


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
def test_packed_training_attends_inside_each_sequence_only(heads, kv_heads):
    compare([5, 1, 9, 3], [5, 1, 9, 3], heads=heads, kv_heads=kv_heads)


def test_decoding_attends_from_one_query_to_the_whole_past():
    compare([1, 1, 1, 1], [7, 1, 12, 4])


def test_a_prefill_in_pieces_sees_its_past_and_only_the_queries_before_it():
    compare([3, 1, 4], [8, 6, 4])  # three new tokens after five old ones; one after five; a fresh prompt


def test_a_request_without_queries_is_passed_over():
    q, k, v, _ = random_qkv([2, 3], [2, 3])
    borders = torch.tensor([0, 2, 2, 5]).int()
    out, _ = varlen_attention(None, q, k, v, scaling=0.3, cu_seq_lens_q=borders, cu_seq_lens_k=borders)
    borders = torch.tensor([0, 2, 5]).int()
    expected, _ = varlen_attention(None, q, k, v, scaling=0.3, cu_seq_lens_q=borders, cu_seq_lens_k=borders)
    assert torch.equal(out, expected)


def test_with_a_paged_cache_the_past_comes_from_it():
    """The cache hands back keys of the whole past with their own borders, which the attention then uses."""
    q, k, v, (cu_q, cu_k) = random_qkv([1, 1], [4, 6])

    class Cache(PagedAttentionCache):
        def __init__(self):
            pass

        def update(self, key_states, value_states, layer_idx, kwargs):
            assert (layer_idx, key_states.shape[2]) == (3, 2) and kwargs["cu_seq_lens_k"] == "of all layers"
            kwargs |= {"cu_seq_lens_k": cu_k, "max_length_k": 6}
            return k, v

    new = {"key": torch.zeros(1, 2, 2, 8), "value": torch.zeros(1, 2, 2, 8)}
    module = type("Layer", (), {"layer_idx": 3})
    borders = {"cu_seq_lens_q": cu_q, "cu_seq_lens_k": "of all layers", "max_length_q": 1, "max_length_k": 0}
    out, _ = varlen_attention(module, q, **new, scaling=0.3, cache=Cache(), **borders)
    expected, _ = varlen_attention(None, q, k, v, scaling=0.3, cu_seq_lens_q=cu_q, cu_seq_lens_k=cu_k)
    assert torch.equal(out, expected)


# ------------------------------------------------------------------------------------------- decoding by a block table


@pytest.fixture
def pages():
    """A cache of 9 pages of 4 tokens; a step of requests of 6, 4 and 0 (padding) tokens, the new one counted."""
    torch.manual_seed(0)
    cache = [torch.randn(9, 4, 2, 8) for _ in range(2)]
    table = torch.tensor([[5, 2, -1], [7, -1, -1], [-1, -1, -1]], dtype=torch.int32)
    q, k, v = torch.randn(3, 4, 8), torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1, 2, 2], [0, 6, 10, 10]))
    known = {"k_pages": cache[0], "v_pages": cache[1], "table": table, "cu_k": cu_k, "cu_q": cu_q}
    known["places"] = ops.new_token_places(table, cu_k, page=4, spare=1)
    return {"q": q, "k": k, "v": v} | known


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
    pytest.importorskip("torch.nn.attention.varlen")
    calls, (kernel, known) = [], cache.varlen_kernel()

    def spy(*args, **options):
        calls.append((args, options))
        return kernel(*args, **options)

    monkeypatch.setattr(cache, "varlen_kernel", lambda: (spy, known))
    meta = {name: value.to("meta") for name, value in pages.items() if name != "places"}
    lengths = meta["cu_k"].diff()
    out = cache._read_pages_torch(
        *(meta[name] for name in ("q", "k_pages", "v_pages", "table")), lengths, meta["cu_q"], meta["cu_k"], 0.3
    )
    assert out.shape == pages["q"].shape
    (*_, cu_q, cu_k, longest_q, longest_k), options = calls[0]
    assert (longest_q, longest_k) == (1, 3 * 4)  # of every step, else a CUDA graph would hold for one step only
    kinds = {x.dtype for x in (cu_q, cu_k, options["seqused_k"], options["block_table"])}
    assert kinds == {torch.int32} and options["num_splits"] == 1 and options["scale"] == 0.3
    assert options["seqused_k"] is lengths and "window_size" not in options


def first_row_only(q, *rest):
    """What torch's kernel did where it split the keys: one row right, the others never written."""
    out = torch.full_like(q, torch.nan)
    out[0] = cache._read_pages_plain(q, *rest)[0]
    return out


def no_lengths(q, k_pages, v_pages, table, lengths, *rest):
    """A kernel that reads its pages to the end."""
    return cache._read_pages_plain(q, k_pages, v_pages, table, lengths.clamp(min=1024), *rest)


def no_table(q, k_pages, v_pages, table, *rest):
    """A kernel that takes pages as they lie."""
    plain = torch.arange(table.numel(), dtype=torch.int32).view(table.shape)
    return cache._read_pages_plain(q, k_pages, v_pages, plain, *rest)


def a_little_off(*problem):
    return cache._read_pages_plain(*problem) + 0.1


def refusing(*_):
    raise RuntimeError("block_table needs something else\nand a trace")


@pytest.mark.parametrize(
    "kernel, trouble",
    [
        (cache._read_pages_plain, "^$"),
        (cache._read_pages_triton, "No module|driver"),  # no GPU here
        (first_row_only, "its kernel is off by nan"),
        (no_lengths, r"its kernel is off by \d"),
        (no_table, r"its kernel is off by \d"),
        (a_little_off, "its kernel is off by 0.1"),
        (refusing, "block_table needs something else$"),
    ],
)
def test_the_kernel_is_tried_before_it_is_trusted(kernel, trouble):
    assert re.search(trouble, cache._try_reader(kernel, 6, CPU, torch.bfloat16, 4, 2, 16))


def test_on_a_cpu_and_in_float32_there_is_nothing_to_try(monkeypatch):
    monkeypatch.setattr(cache, "_try_reader", None)
    for device, dtype in ((CPU, torch.bfloat16), (torch.device("cuda", 0), torch.float32)):
        assert cache.table_reader(device, dtype, 4, 2, 16) == (cache._read_pages_plain, "")


@pytest.fixture
def tried(monkeypatch):
    """(verdict on (reader, rows, splits)) -> (what is taken on a GPU for heads of that number, trials)."""

    def choose(verdict):
        trials = []

        def try_reader(read, rows, *shape):
            splits = read.keywords["splits"][rows] if isinstance(read, partial) else 1
            trials.append((read, rows, *shape))
            return verdict(read, rows, splits)

        monkeypatch.setattr(cache, "_try_reader", try_reader)
        cache.table_reader.cache_clear()
        for _ in range(2):
            taken = cache.table_reader(torch.device("cuda", 0), torch.bfloat16, 8, 4, 24)
        cache.table_reader.cache_clear()
        return taken, trials

    return choose


def test_few_requests_get_the_most_splits_that_are_right(tried):
    """Four key-value heads: 256 programs, and one that is wrong with eight splits."""
    (read, trouble), trials = tried(lambda read, rows, splits: "off" if splits == 8 else "")
    assert trouble == "" and read.keywords["splits"] == {1: 16, 2: 16, 4: 16, 8: 4, 16: 4, 32: 2}
    assert read.func is cache._read_pages_torch and len(set(trials)) == len(trials)  # each is tried once


def test_the_rows_of_a_step_say_how_often_its_keys_are_split(monkeypatch):
    given = []
    monkeypatch.setattr(cache, "varlen_kernel", lambda: (lambda *_, num_splits, **__: given.append(num_splits), {}))
    pages, table, borders = torch.zeros(9, 4, 2, 8), torch.zeros(5, 3).int(), torch.zeros(1)
    for rows in (1, 2, 3, 4, 5):
        q = torch.zeros(rows, 4, 8)
        cache._read_pages_torch(q, pages, pages, table, None, borders, borders, None, splits={1: 16, 4: 8})
    assert given == [16, 1, 8, 8, 1]  # 2 and 8 rows were not found right


def test_where_torch_reads_no_block_table_the_triton_kernel_does(tried):
    ours = cache._read_pages_triton
    assert tried(lambda read, rows, splits: "" if read is ours else "2.11")[0] == (ours, "")
    assert tried(lambda read, rows, splits: "no triton" if read is ours else "2.11")[0] == (None, "2.11")


def test_an_older_torch_gets_grouped_heads_as_they_are(monkeypatch):
    """2.11: no keyword for them. Keys are not repeated: what would be copied is as large as the queries."""

    def varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        return key.shape, value.shape, window_size

    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=varlen_attn))
    cache.varlen_kernel.cache_clear()
    q, k = torch.zeros(5, 8, 16), torch.zeros(5, 2, 16)
    assert ops._varlen("", q, k, k, None, None, 5, 5, scale=0.3) == (k.shape, k.shape, (-1, 0))
    cache.varlen_kernel.cache_clear()


def test_the_triton_kernel_equals_the_plain_version(command, monkeypatch):
    """Under Triton's interpreter, in a process of its own: what was imported without it cannot run in it."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = command([ROOT / "tests/kernel_checks.py"], limit=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{heads}x{dim}" for heads in (1, 4, 8) for dim in (64, 128)]


def test_with_a_block_table_the_attention_is_the_steps_own(pages):
    """What transformers hands over, laid out for decode_by_table; scaled as the model wants it."""

    class Cache(PagedAttentionCache):
        def __init__(self):
            self.layer_to_allocator = {0: SimpleNamespace(write_trash_index=4, tokens_per_page=4)}

        def update(self, key_states, value_states, layer_idx, kwargs):
            kwargs |= {"k_cache": pages["k_pages"], "v_cache": pages["v_pages"], "block_table": pages["table"]}
            kwargs |= {"cu_seq_lens_k": pages["cu_k"], "max_length_k": 1}
            return key_states, value_states

    copies = pages | {name: value.clone() for name, value in pages.items() if name != "places"}
    query, key, value = (pages[name].transpose(0, 1)[None] for name in "qkv")
    borders = {"cu_seq_lens_q": pages["cu_q"], "cu_seq_lens_k": None, "max_length_q": 1, "max_length_k": None}
    out, _ = varlen_attention(SimpleNamespace(layer_idx=0), query, key, value, scaling=0.3, cache=Cache(), **borders)
    assert torch.equal(out[0], cache.decode_by_table(**copies, scale=0.3))


# ------------------------------------------------------------------------------------------------------- what is chosen


@pytest.mark.parametrize("extra", [{}, {"sliding_window": 8}, {"softcap": 30.0}])
def test_what_it_would_compute_wrongly_is_refused(extra):
    q, k, v, (borders, _) = random_qkv([3], [3])
    known = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders} if extra else {}
    with pytest.raises(NotImplementedError):
        varlen_attention(None, q, k, v, scaling=0.3, **known, **extra)


def test_attention_is_chosen_by_what_the_machine_has():
    assert choose_attention("auto", CPU, torch.bfloat16) == choose_attention("varlen", CPU, torch.bfloat16) == VARLEN
    with pytest.raises(RuntimeError, match="flash_attention_2.*CUDA"):
        choose_attention("flash_attention_2", CPU, torch.bfloat16)


def test_flash_attn_is_taken_on_a_gpu_that_has_it_but_not_for_float32(monkeypatch):
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
