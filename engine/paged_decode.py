"""One decoding step on a paged cache in Triton: for hosts without flash-attn whose torch reads no block tables.

One program per request, key-value head and part of the past. It scores the query heads that share the key-value head
against its part, page by page, with a running softmax; the parts are put together in torch. No GPU has run it. On the
CPU: TRITON_INTERPRET=1 (tests/test_ops.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _decode_part(
    q, k, v, table, lengths, out, lse, scale, q_row, q_head, k_page, k_token, k_head, v_page, v_token, v_head, width,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    span = tl.cdiv(tl.cdiv(length, PARTS), BLOCK) * BLOCK  # a block lies in one page
    begin = part * span
    end = tl.minimum(begin + span, length)
    # (16, DIM): tl.dot takes no fewer rows; those beyond the group are zeros
    members, dims, within = tl.arange(0, 16), tl.arange(0, DIM), tl.arange(0, BLOCK)
    real = members[:, None] < GROUP
    heads = head * GROUP + members[:, None]
    query = tl.load(q + row * q_row + heads * q_head + dims[None, :], mask=real, other=0.0)
    most = tl.full((16,), -1e30, tl.float32)
    total = tl.zeros((16,), tl.float32)
    mixed = tl.zeros((16, DIM), tl.float32)
    for first in range(begin, end, BLOCK):
        page = tl.load(table + row * width + first // PAGE).to(tl.int64)
        places, seen = (first % PAGE + within)[:, None], first + within < end
        key_at = k + page * k_page + places * k_token + head * k_head + dims[None, :]
        value_at = v + page * v_page + places * v_token + head * v_head + dims[None, :]
        key = tl.load(key_at, mask=seen[:, None], other=0.0)
        value = tl.load(value_at, mask=seen[:, None], other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, -1e30)
        higher = tl.maximum(most, tl.max(scores, 1))
        weights = tl.where(seen[None, :], tl.exp(scores - higher[:, None]), 0.0)
        fade = tl.exp(most - higher)
        total = total * fade + tl.sum(weights, 1)
        mixed = mixed * fade[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        most = higher
    spot = (part * tl.num_programs(0) + row) * HEADS + head * GROUP + members
    tl.store(out + spot[:, None] * DIM + dims[None, :], mixed / tl.maximum(total, 1e-30)[:, None], mask=real)
    # -1e30 of a part without a token: it gets no weight, and a request of padding gets zeros, not NaN
    tl.store(lse + spot, tl.where(total > 0, most + tl.log(tl.maximum(total, 1e-30)), -1e30), mask=members < GROUP)


def paged_decode(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, scale: float | None = None,
    parts: int = 0,
) -> Tensor:  # fmt: skip
    """q (requests, heads, dim), each against the first `lengths` tokens that its row of `table` points to.

    k_pages, v_pages (pages, page, kv heads, dim), the page a multiple of 16; table (requests, most pages) int32.
    lengths (requests,) int32, 0 for padding, whose result is 0. dim: a power of 2. At most 16 query heads share a
    key-value head. scale: of the scores; None: 1 / sqrt(dim). parts: into which each past is cut; 0: by the number of
    requests. Returns (requests, heads, dim).
    """
    (rows, heads, dim), (_, page, kv_heads, _) = q.shape, k_pages.shape
    group, block = heads // kv_heads, min(64, page)
    assert group <= 16 and page % block == 0 and dim & (dim - 1) == 0, "heads, a page or a dim that it does not know"
    assert q.stride(2) == k_pages.stride(3) == v_pages.stride(3) == table.stride(1) == 1
    parts = parts or max(1, min(16, 256 // (rows * kv_heads)))  # few requests would leave most of a GPU idle
    out = torch.empty(parts, rows, heads, dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(parts, rows, heads, dtype=torch.float32, device=q.device)
    _decode_part[rows, kv_heads, parts](
        q, k_pages, v_pages, table, lengths, out, lse, dim**-0.5 if scale is None else scale,
        *q.stride()[:2], *k_pages.stride()[:3], *v_pages.stride()[:3], table.stride(0),
        HEADS=heads, GROUP=group, DIM=dim, PAGE=page, BLOCK=block, PARTS=parts,
    )  # fmt: skip
    return (lse.softmax(0)[..., None] * out).sum(0).to(q.dtype)
