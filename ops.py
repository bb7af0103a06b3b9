"""What decides speed and memory: attention over packed tokens, log-probs without a logits tensor, Liger kernels.

One attention serves both sides of the loop. The trainer packs sequences one after the other into a row of N tokens; the
sampler (transformers' continuous batching) does the same with the queries of all its requests and keeps keys and values
in a paged cache. Both say where a sequence begins and ends by cumulative lengths, so the kernels need no mask and no
padding. A decoding step reads the cache in place, by block table:

    flash_attention_2/3   the flash-attn package, on CUDA, used by transformers itself
    flash_varlen          ours: torch's variable-length kernel on CUDA, plain SDPA on the CPU and in float32

Leaves out models: what is called here is wired up in model.py and rollout.py.
"""

import functools
import importlib
import inspect
import logging
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from engine.cache import decode_by_table, new_token_places, one_query_each, varlen_kernel

# Continuous batching builds no attention mask for names with "flash"; a digit would claim flash-attn's decode path.
VARLEN = "flash_varlen"
PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def choose_attention(wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """config.attention -> a name that transformers knows.

    Raises RuntimeError where flash-attn is asked for in vain, or is there but does not load.
    """
    usable = {"flash_attention_2": is_flash_attn_2_available(), "flash_attention_3": is_flash_attn_3_available()}
    flash = device.type == "cuda" and dtype != torch.float32  # its kernels know 16-bit types only
    if wanted == "varlen" or (wanted == "auto" and not (flash and usable["flash_attention_2"])):
        return VARLEN
    name = "flash_attention_2" if wanted == "auto" else wanted
    if not (flash and usable[name]):
        raise RuntimeError(f"attention={wanted}: needs CUDA, dtype bfloat16 and its package; try attention=auto")
    try:
        importlib.import_module(PACKAGES[name])
    except ImportError as error:  # compiled for another torch, which only shows here
        cause = f"{PACKAGES[name]} is installed but does not load"
        raise RuntimeError(f"attention={wanted}: {cause}; attention=varlen does without it: {error}") from None
    return name


def varlen_attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask=None, scaling: float | None = None, cache=None,
    cu_seq_lens_q: Tensor | None = None, cu_seq_lens_k=None, max_length_q=None, max_length_k=None,
    shared_keys: Tensor | None = None, package: str = "", **kwargs,
):  # fmt: skip
    """Causal attention inside each sequence of a packed row, in the form that transformers calls.

    query (1, heads, Tq, dim), key and value (1, kv heads, Tk, dim); cu_seq_lens (sequences + 1,) mark the borders.
    With a paged cache, the new keys and values are written to it and the whole past of each request comes back, or is
    read in place where a block table tells its pages; with
    shared_keys (see `pack`), a response gets copies of its prompt's. Then Tk > Tq, and the mask is aligned to the end:
    the last query of a sequence sees all its keys. package: of flash-attn, whose kernel to use, instead of torch's.
    Returns ((1, Tq, heads, dim), None). Raises NotImplementedError for what it would compute wrongly.
    """
    if cu_seq_lens_q is None:
        raise NotImplementedError(f"attention {VARLEN} needs cu_seq_lens: packed rows and paged generation only")
    if kwargs.get("sliding_window") is not None or kwargs.get("softcap") is not None:
        raise NotImplementedError(f"attention {VARLEN} knows no sliding window and no soft cap; install flash-attn")
    if isinstance(cache, PagedAttentionCache):
        kwargs.update(cu_seq_lens_k=cu_seq_lens_k, max_length_k=max_length_k)
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
        cu_seq_lens_k, max_length_k = kwargs["cu_seq_lens_k"], kwargs["max_length_k"]
        if kwargs.get("block_table") is not None:  # one query per request; nothing is written or gathered yet
            allocator = cache.layer_to_allocator[module.layer_idx]
            q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
            table, spare = kwargs["block_table"], allocator.write_trash_index // allocator.tokens_per_page
            if module.layer_idx == 0:  # once per forward: each layer has the same tables, and new contents each time
                cache.places = {}
            group = table.data_ptr()  # layers of one kind share a table; each gets a view of its own
            if group not in cache.places:
                cache.places[group] = new_token_places(table, cu_seq_lens_k, allocator.tokens_per_page, spare)
            pages = (kwargs["k_cache"], kwargs["v_cache"], table, cu_seq_lens_k)
            return decode_by_table(q, k, v, *pages, cache.places[group], cu_seq_lens_q, scaling)[None], None
    if shared_keys is not None:
        key, value = key.index_select(2, shared_keys), value.index_select(2, shared_keys)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (tokens, heads, dim)
    if q.is_cuda and q.dtype != torch.float32:
        borders = (cu_seq_lens_q.int(), cu_seq_lens_k.int(), int(max_length_q), int(max_length_k))
        out = _varlen(package, q, k, v, *borders, scale=scaling)
    else:
        out = _per_request(q, k, v, cu_seq_lens_q, cu_seq_lens_k, scaling)
    return out[None], None


ALL_ATTENTION_FUNCTIONS.register(VARLEN, varlen_attention)
# transformers' own call of flash-attn knows no shared keys; these call the same kernels
SHARED = {VARLEN: VARLEN, "flash_attention_2": "flash_shared_two", "flash_attention_3": "flash_shared_three"}
for _name, _package in PACKAGES.items():
    ALL_ATTENTION_FUNCTIONS.register(SHARED[_name], functools.partial(varlen_attention, package=_package))


def _varlen(package: str, q, k, v, *borders, scale: float | None) -> Tensor:
    """On CUDA, 16-bit types: flash-attn's kernel, or torch's without a package."""
    if not package:
        kernel, options = varlen_kernel()  # without the keyword it takes grouped heads as they are (torch 2.11)
        return kernel(q, k, v, *borders, scale=scale, **options)
    out = importlib.import_module(package).flash_attn_varlen_func(q, k, v, *borders, softmax_scale=scale, causal=True)
    return out[0] if isinstance(out, tuple) else out  # some versions of 3 return the normalisers too


def _per_request(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float | None) -> Tensor:
    """On the CPU, and for float32 on CUDA: requests of one query (decoding) in one padded call, longer ones (prefill,
    training) one by one."""
    queries, keys = cu_q.diff(), cu_k.diff()
    if bool((queries == 1).all()):
        # (requests, longest): index of each request's keys, the surplus clamped to a valid row
        rows = (cu_k[:-1, None] + torch.arange(int(keys.max()), device=q.device)).clamp(max=len(k) - 1)
        k, v = (x.index_select(0, rows.flatten()).unflatten(0, rows.shape) for x in (k, v))
        return one_query_each(q, k, v, keys, scale)
    out = []
    queries, keys = queries.tolist(), keys.tolist()
    # split, whose backward is one concatenation; a slice's would fill a whole tensor with zeros for each sequence
    for one_q, one_k, one_v in zip(q.split(queries), k.split(keys), v.split(keys), strict=True):
        tokens, seen = len(one_q), len(one_k)
        if tokens == 0:
            continue
        one = [x.transpose(0, 1)[None] for x in (one_q, one_k, one_v)]  # (1, heads, tokens, dim)
        fresh = tokens == seen  # no past: the kernel's own causal mask is aligned
        mask = None if fresh else torch.ones(tokens, seen, dtype=torch.bool, device=q.device).tril(seen - tokens)
        y = F.scaled_dot_product_attention(*one, attn_mask=mask, is_causal=fresh, scale=scale, enable_gqa=True)
        out.append(y[0].transpose(0, 1))
    return torch.cat(out)


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """(tokens, vocabulary), the largest tensor of an update: not walked over to divide it by 1, or to widen it."""
    logits = hidden @ weight.t()
    return logits if temperature == 1 else logits.float().div_(temperature)


class _ChunkedLogprobs(torch.autograd.Function):
    """log-softmax of hidden @ weight.T / temperature at the targets, `chunk` tokens at a time, recomputed in backward.

    The plain version stands in tests/test_ops.py. Per token t with logits z = h W^T / T:
        logprob_t = z_target - logsumexp(z),   d logprob_t / dz = onehot(target) - softmax(z)
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        lse, entropy = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for begin in range(0, len(targets), chunk):
            rows = slice(begin, begin + chunk)
            logits = _logits(hidden[rows], weight, temperature)
            most = logits.amax(-1).float()
            exps = torch.sub(logits, most[:, None]).exp_()  # float32, whatever the logits are
            total = exps.sum(-1)
            lse[rows] = total.log() + most
            logprobs[rows] = logits.gather(-1, targets[rows, None])[:, 0] - lse[rows]
            entropy[rows] = lse[rows] - exps.mul_(logits).sum(-1) / total
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, lse = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        # float32: the sum of many chunks, each rounded to bfloat16, would be biased
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for begin in range(0, len(targets), ctx.chunk):
            rows = slice(begin, begin + ctx.chunk)
            logits, slope = _logits(hidden[rows], weight, ctx.temperature), grad[rows, None] / ctx.temperature
            probs, where = torch.sub(logits, lse[rows, None]).exp_(), targets[rows, None]
            at_target = slope - probs.gather(-1, where) * slope
            d_logits = torch.mul(probs, -slope, out=logits if logits.dtype == hidden.dtype else hidden.new_empty(0))
            d_logits.scatter_(-1, where, at_target.to(hidden.dtype))
            torch.mm(d_logits, weight, out=d_hidden[rows])
            if d_logits.device.type != "cpu" and d_logits.dtype != torch.float32:
                torch.addmm(d_weight, d_logits.t(), hidden[rows], out_dtype=torch.float32, out=d_weight)
            else:
                d_weight.addmm_(d_logits.t().float(), hidden[rows].float())
        return d_hidden, d_weight.to(weight.dtype), None, None, None


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int = 1024):
    """hidden (N, H), weight (V, H), targets (N,) -> log-probs (N,) with gradient, entropies (N,) without; float32 nats.

    The largest tensor is (chunk, V); the (N, V) logits never exist.
    """
    return _ChunkedLogprobs.apply(hidden, weight, targets, temperature, chunk)


def policy_forward(self, *args, forward=None, **inputs):
    """Inside FSDP: `logprobs_of`, or another function of the model that a method brings, with the other arguments."""
    return (forward or logprobs_of)(self, *args, **inputs)


def logprobs_of(
    self, input_ids: Tensor, position_ids: Tensor, predicts: Tensor, targets: Tensor, temperature: float, **attention
):
    """Replaces the causal model's forward, so that FSDP gathers the head's weight around it and logits never exist.

    input_ids, position_ids (1, N) packed; predicts (M,) the positions whose next token is trained, targets (M,) those
    tokens. Returns log-probs (M,) with gradient and entropies (M,) without, float32.
    """
    decoder = getattr(self, self.base_model_prefix)
    hidden = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False, **attention).last_hidden_state[0]
    return token_logprobs(hidden[predicts], self.get_output_embeddings().weight, targets, temperature, self.head_chunk)


def apply_liger(model) -> bool:
    """Swap rotary, RMSNorm and SwiGLU of a model for Liger's fused kernels, in place. False if Liger does not know it.

    Must be given to trainer and sampler alike, else their log-probs drift apart. Liger's fused loss is left out: the
    loss here needs per-token log-probs and entropies.
    """
    from liger_kernel.backends import set_impl
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    set_impl("nvidia-triton")  # with CuTe installed, long rows with gradient would be rotated unlike the sampler's
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)  # it names every backend that is not installed
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)
    if apply is None:
        return False
    # Its experts read a number back from the GPU in each layer, which CUDA graphs cannot hold; transformers' do not
    experts = getattr(model.config, "num_experts", 0)
    switches = {"rope": True, "rms_norm": True, "swiglu": not experts}
    switches |= {"cross_entropy": False, "fused_linear_cross_entropy": False}
    known = inspect.signature(apply).parameters
    apply(**{name: on for name, on in switches.items() if name in known}, model=model)
    return True


def pack(sequences: list[list[int]], device: torch.device, prefixes: list[int | None] | None = None) -> dict:
    """Token lists -> one row (1, N), with positions that restart and the borders that keep sequences apart.

    prefixes: per sequence, None or the number of the sequence that it continues: a response its prompt. It begins at
    that one's end and sees all of it, so that the responses to a prompt share one pass over it. Then shared_keys (Tk,)
    says which tokens' keys each sequence sees, one sequence after the other.

    >>> pack([[5, 6, 7], [8, 9]], torch.device("cpu"))["position_ids"]
    tensor([[0, 1, 2, 0, 1]])
    >>> row = pack([[5, 6, 7], [8, 9], [4]], torch.device("cpu"), [None, 0, 0])
    >>> row["position_ids"], row["shared_keys"]
    (tensor([[0, 1, 2, 3, 4, 3]]), tensor([0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5]))
    """
    lengths = [len(sequence) for sequence in sequences]
    begins = [0, *accumulate(lengths)]
    rows = [torch.arange(begin, end) for begin, end in pairwise(begins)]
    before = prefixes or [None] * len(rows)
    seen = [row if one is None else torch.cat([rows[one], row]) for row, one in zip(rows, before, strict=True)]
    positions = [row - row[0] + len(keys) - len(row) for row, keys in zip(rows, seen, strict=True)]
    shared = {} if prefixes is None else {"shared_keys": torch.cat(seen)}
    tensors = {
        "input_ids": torch.tensor([token for sequence in sequences for token in sequence])[None],
        "position_ids": torch.cat(positions)[None],
        "cu_seq_lens_q": torch.tensor(begins, dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([0, *accumulate(map(len, seen))], dtype=torch.int32),
    } | shared
    return move(tensors, device) | {"max_length_q": max(lengths), "max_length_k": max(map(len, seen))}


def move(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """From the CPU to the device in one copy, out of page-locked memory for a GPU: nothing waits for it."""
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())  # eight bytes first: all are aligned
    whole = torch.cat([tensors[name].flatten().view(torch.uint8) for name in order])
    whole = (whole.pin_memory() if device.type == "cuda" else whole).to(device, non_blocking=True)
    parts = zip(order, whole.split([tensors[name].nbytes for name in order]), strict=True)
    return {name: part.view(tensors[name].dtype).view(tensors[name].shape) for name, part in parts}
