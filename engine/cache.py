"""How a decoding step reads the paged cache in place, by block table: torch's kernel, or plain SDPA.

torch's kernel is taken if it is right on this machine (`table_reader`). ops.py calls `decode_by_table`.
"""

import functools
import inspect

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


@functools.cache
def varlen_kernel():
    """torch's own kernel, and its options for causal attention with grouped heads, named otherwise before 2.13."""
    known = inspect.signature(varlen_attn).parameters
    options = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    return varlen_attn, options | ({"enable_gqa": True} if "enable_gqa" in known else {})


def new_token_places(table: Tensor, cu_k: Tensor, page: int, spare: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where a decoding step writes each request's new key: (lengths, page number, offset in the page).

    table (requests, most pages): the numbers of each request's pages in order, then -1. cu_k (requests + 1,): borders
    of the requests' lengths, the new token counted. A request without length is padding (of a CUDA graph); its key goes
    to the page `spare`, which nobody reads.
    """
    lengths = cu_k.diff()
    last = (lengths - 1).clamp(min=0)
    number = table.gather(1, (last // page).long()[:, None])[:, 0]
    return lengths, number.masked_fill(lengths == 0, spare), last % page


def decode_by_table(
    q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, cu_k: Tensor, places: tuple,
    cu_q: Tensor, scale: float | None,
) -> Tensor:  # fmt: skip
    """One decoding step on a paged cache: writes each request's new key and value, attends to all it has, in place.

    q (requests, heads, dim), k and v (requests, kv heads, dim): the new tokens. k_pages, v_pages (pages, page, kv
    heads, dim): the layer's cache. table, cu_k, places: see new_token_places. Returns (requests, heads, dim).
    """
    lengths, *where = places
    k_pages[tuple(where)], v_pages[tuple(where)] = k, v
    read, _ = table_reader(q.device, q.dtype, q.shape[1], k.shape[1], q.shape[2])
    return read(q, k_pages, v_pages, table, lengths, cu_q, cu_k, scale)


def _read_pages_torch(q, k_pages, v_pages, table, lengths, cu_q, cu_k, scale) -> Tensor:
    longest = table.shape[1] * k_pages.shape[1]  # a bound that does not change from step to step, as a CUDA graph wants
    # No causal window: a last token sees everything. One split: torch's kernel is known to return wrong rows with more
    options = {"seqused_k": lengths, "block_table": table, "scale": scale, "num_splits": 1, "enable_gqa": True}
    return varlen_attn(q, k_pages, v_pages, cu_q.int(), cu_k.int(), 1, longest, **options)


def _read_pages_plain(q, k_pages, v_pages, table, lengths, cu_q, cu_k, scale) -> Tensor:
    longest, page = int(lengths.max()), k_pages.shape[1]
    table = table[:, : -(-longest // page)].clamp(min=0)
    k, v = (x.index_select(0, table.flatten()).unflatten(0, table.shape) for x in (k_pages, v_pages))
    return one_query_each(q, *(x.flatten(1, 2)[:, :longest] for x in (k, v)), lengths, scale)


@functools.cache
def table_reader(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> tuple:
    """(what reads the pages in `decode_by_table`, "") on this machine, or (None, why nothing does).

    torch's kernel refuses block tables on some GPUs, and has returned wrong rows without a word
    (pytorch/pytorch#194167, pytorch/torchtitan#3235). So it is tried against the plain version first.
    """
    if device.type != "cuda" or dtype == torch.float32:
        return _read_pages_plain, ""
    trouble = _try_reader(_read_pages_torch, device, dtype, heads, kv_heads, dim)
    return (None, trouble) if trouble else (_read_pages_torch, "")


def _try_reader(read, device, dtype, heads: int, kv_heads: int, dim: int) -> str:
    """What is wrong, if anything, on lengths in, at and after a page and long ones, pages out of order, padding."""
    page, most = 256, 22
    lengths = torch.tensor([most * page, 1, 700, 256, 257, 0, 5000, 1024], dtype=torch.int32, device=device)
    rows = len(lengths)
    table = torch.arange(most * rows, dtype=torch.int32, device=device).flip(0).view(rows, most)
    table = table.masked_fill(torch.arange(0, most * page, page, device=device) >= lengths[:, None], -1)
    generator = torch.Generator(device).manual_seed(0)
    sizes = (rows, heads, dim), (table.numel(), page, kv_heads, dim), (table.numel(), page, kv_heads, dim)
    q, k, v = (torch.randn(size, dtype=dtype, device=device, generator=generator) for size in sizes)
    cu_q, cu_k = (F.pad(x.cumsum(0), (1, 0)).int() for x in (torch.ones_like(lengths), lengths))
    try:
        found = read(q, k, v, table, lengths, cu_q, cu_k, None)
    except Exception as error:  # another torch, or a refusal
        return f"torch {torch.__version__}: {error}".splitlines()[0][:120]
    expected = _read_pages_plain(q, k, v, table, lengths, cu_q, cu_k, None)
    wrong = (found - expected)[lengths > 0].float().abs().max().item()
    return "" if wrong <= 0.03 else f"torch {torch.__version__}: its kernel is off by {wrong:.3g}"  # nan is not <= 0.03


def one_query_each(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, scale: float | None) -> Tensor:
    """q (requests, heads, dim), each against the first `keys` of its k and v (requests, longest, kv heads, dim)."""
    mask = (torch.arange(k.shape[1], device=q.device) < keys[:, None])[:, None, None, :]
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask, scale=scale, enable_gqa=True)[:, :, 0]
