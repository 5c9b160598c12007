"""Verifies a kernel of your own with fastnn's equivalence suite: a right one, and one that is subtly wrong.

python examples/verify_your_kernel.py
"""

import torch

from fastnn.testing import Case, Sample, verify


# 1. An op that the suite knows already: any function with the signature of torch's.
def blocked_matmul(a, b, block=64):
    """a @ b, summed over blocks of K."""
    result = a.new_zeros(a.shape[0], b.shape[1], dtype=torch.promote_types(a.dtype, torch.float32))
    for k in range(0, a.shape[1], block):
        result += a[:, k : k + block].to(result.dtype) @ b[k : k + block].to(result.dtype)
    return result.to(a.dtype)


def hurried_matmul(a, b):
    """The same with the inputs rounded to bfloat16 first: close enough for a glance, and for a loose tolerance."""
    return (a.bfloat16() @ b.bfloat16()).to(a.dtype)


report = verify(blocked_matmul, "mm", dtypes=[torch.float32, torch.bfloat16], out=False)
print("blocked_matmul:", "passed" if report else report.findings)
assert report

report = verify(hurried_matmul, "mm", dtypes=[torch.float32], out=False)
print("hurried_matmul:", "passed" if report else f"failed: {report.findings[0]}")
assert not report


# 2. An op of your own: say what it computes, on which shapes, and how exact it must be.
def squared_distances(x, y):
    """‖xᵢ − yⱼ‖² for every pair of rows."""
    return (x[:, None] - y[None]).square().sum(-1)


def expanded_distances(x, y):
    """The same by ‖x‖² − 2·x·y + ‖y‖²: faster, and wrong where the distance is small beside the norms."""
    return x.square().sum(1)[:, None] - 2 * x @ y.T + y.square().sum(1)[None]


def samples(make):
    for n, m, k in ((1, 1, 1), (7, 13, 31), (33, 17, 65), (3, 5, 1009)):
        yield Sample((make(n, k), make(m, k)))


distances = Case(
    name="squared_distances",
    peer=squared_distances,
    samples=samples,
    magnitude=lambda result, x, y: result.abs(),  # every term is positive: the sum of what is rounded is the result
    depth=lambda x, y: x.shape[-1] + 2,
    dtypes=(torch.float32,),
)

report = verify(squared_distances, distances)
assert report
report = verify(expanded_distances, distances)
print("expanded_distances:", "passed" if report else f"failed: {report.findings[0]}")
assert not report
