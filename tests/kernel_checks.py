"""The Triton kernel of a decoding step against the plain version; tests/test_ops.py runs it with TRITON_INTERPRET=1.

Lengths in, at and after a page; pages out of order; padding, which gives zeros; strides as in a cache. Not in bfloat16,
whose products the interpreter gets wrong.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from kernels.paged_decode import paged_decode  # noqa: E402
from ops import _read_pages_plain  # noqa: E402


def check(group: int, dim: int) -> None:
    """`group` query heads to each of two key-value heads."""
    page, most, lengths = 32, 4, torch.tensor([31, 32, 33, 0, 100], dtype=torch.int32)
    rows = len(lengths)
    table = torch.arange(rows * most, dtype=torch.int32).flip(0).view(rows, most)
    table = table.masked_fill(torch.arange(0, most * page, page) >= lengths[:, None], -1)
    generator = torch.Generator().manual_seed(group * dim)
    q = torch.randn(2 * group, rows, dim, generator=generator).transpose(0, 1)
    k, v = torch.randn(rows * most, 2, page, 2, dim, generator=generator).unbind(1)
    for dtype, tolerance in ((torch.float32, 5e-6), (torch.float16, 5e-3))[: 2 if dim == 64 else 1]:
        problem = q.to(dtype), k.to(dtype), v.to(dtype), table, lengths
        found, expected = paged_decode(*problem, 0.3, parts=3), _read_pages_plain(*problem, None, None, 0.3)
        assert found.dtype == dtype and (found[lengths == 0] == 0).all()
        torch.testing.assert_close(found[lengths > 0], expected[lengths > 0], rtol=0, atol=tolerance)


for group in (1, 4, 8):
    for dim in (64, 128):
        check(group, dim)
        print(f"{group}x{dim}")
