"""The Triton kernel of a decoding step against the plain version; tests/test_ops.py runs it with TRITON_INTERPRET=1.

Lengths in, at and after a page; pages out of order; padding, which gives zeros; strides as in a cache. Not in bfloat16,
whose products the interpreter gets wrong.
"""

import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from engine.paged_decode import paged_decode  # noqa: E402
from engine.cache import _read_pages_plain

lengths = torch.tensor([31, 32, 33, 0, 100], dtype=torch.int32)
table = torch.arange(20, dtype=torch.int32).flip(0).view(5, 4)  # of pages of 32 tokens
table = table.masked_fill(torch.arange(0, 128, 32) >= lengths[:, None], -1)
for group, dim in product((1, 4, 8), (64, 128)):  # `group` query heads to each of two key-value heads
    q, (k, v) = torch.randn(2 * group, 5, dim).transpose(0, 1), torch.randn(20, 2, 32, 2, dim).unbind(1)
    for dtype, tolerance in ((torch.float32, 5e-6), (torch.float16, 5e-3))[: 2 if dim == 64 else 1]:
        problem = q.to(dtype), k.to(dtype), v.to(dtype), table, lengths
        found, expected = paged_decode(*problem, 0.3, parts=3), _read_pages_plain(*problem, None, None, 0.3)
        assert found.dtype == dtype and (found[lengths == 0] == 0).all()
        torch.testing.assert_close(found[lengths > 0], expected[lengths > 0], rtol=0, atol=tolerance)
    print(f"{group}x{dim}")
