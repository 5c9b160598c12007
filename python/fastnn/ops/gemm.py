"""Products of matrices: matmul, mm, bmm, mv, addmm, baddbmm, bilinear and int_mm.

All but int_mm take float32, float64, bfloat16 or float16 (both operands of one dtype) of any strides, without copies,
and accumulate in float32 (float64 for float64), rounding once to the operands' dtype. float32 obeys
``torch.get_float32_matmul_precision()``. Other dtypes (float64 as well on a GPU), sparse tensors, and devices without a
backend go to torch. On bad input each raises what torch raises (RuntimeError for shapes, dtypes and devices, TypeError
for what is no tensor), naming the argument. Denormal parts of a float32 may be flushed to zero where AMX does the work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from .. import _state
from ..backends import Kernels, cpu, reference, supports
from ._library import define
from ._out import write_out
from ._route import (
    LIBRARY,
    REFERENCE,
    TRANSFORM,
    Unsupported,
    autocast,
    autocast_device,
    describe,
    fall_back,
    is_autocast_enabled,
    is_dynamo_compiling,
    is_straight,
    needs_library,
    resolve,
    route,
    wants_grad,
)

_settings = _state.settings
_tensor_product = cpu.tensor_product
_kernels = Kernels()

# ---- the public functions ----------------------------------------------------------------------------------------


def matmul(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    """input @ other, as :func:`torch.matmul`.

    Shapes: (K) and (K) give a scalar; (..., M, K) and (K, N) or (..., K, N), batch dimensions broadcast, give
    (..., M, N); a vector stands for a row on the left and a column on the right, and its dimension is dropped.
    Raises RuntimeError for a scalar argument, inner sizes that differ, batches that do not broadcast, different dtypes.
    """
    if not is_dynamo_compiling():
        result = _tensor_product(cpu.MATMUL, input, other, None, 0, out)
        if type(result) is tuple:
            return _apply_product(input, other, result)
        if result is not None:
            return result
    try:
        _check_tensors(input=input, other=other)
        if input.dim() == 0 or other.dim() == 0:
            _wrong("expected at least one dimension each", input=input, other=other)
        inner = other.shape[-2] if other.dim() > 1 else other.shape[0]
        if input.shape[-1] != inner:
            _wrong("expected as many columns of input as rows of other", input=input, other=other)
        _broadcast_batch("input", input, "other", other)
        return _matmul("matmul", torch.matmul, input, other, out)
    except Unsupported as reason:
        return fall_back("matmul", reason.args[0], torch.matmul, input, other, **_out(out))


def mm(input: Tensor, mat2: Tensor, *, out: Tensor | None = None) -> Tensor:
    """(N, K) @ (K, M), as :func:`torch.mm`. Raises RuntimeError for other ranks, sizes that differ, mixed dtypes."""
    if not is_dynamo_compiling():
        result = _tensor_product(cpu.MM, input, mat2, None, 0, out)
        if type(result) is tuple:
            return _apply_product(input, mat2, result)
        if result is not None:
            return result
    try:
        _check_tensors(input=input, mat2=mat2)
        if input.dim() != 2 or mat2.dim() != 2:
            _wrong("expected two matrices", input=input, mat2=mat2)
        _check_inner(input=input, mat2=mat2)
        return _matmul("mm", torch.mm, input, mat2, out)
    except Unsupported as reason:
        return fall_back("mm", reason.args[0], torch.mm, input, mat2, **_out(out))


def bmm(input: Tensor, mat2: Tensor, *, out: Tensor | None = None) -> Tensor:
    """(B, N, K) @ (B, K, M), as :func:`torch.bmm`. Raises RuntimeError for other ranks or sizes, mixed dtypes."""
    if not is_dynamo_compiling():
        result = _tensor_product(cpu.BMM, input, mat2, None, 0, out)
        if type(result) is tuple:
            return _apply_product(input, mat2, result)
        if result is not None:
            return result
    try:
        _check_tensors(input=input, mat2=mat2)
        if input.dim() != 3 or mat2.dim() != 3 or input.shape[0] != mat2.shape[0]:
            _wrong("expected two batches of matrices, of one size", input=input, mat2=mat2)
        _check_inner(input=input, mat2=mat2)
        return _matmul("bmm", torch.bmm, input, mat2, out)
    except Unsupported as reason:
        return fall_back("bmm", reason.args[0], torch.bmm, input, mat2, **_out(out))


def mv(input: Tensor, vec: Tensor, *, out: Tensor | None = None) -> Tensor:
    """(N, K) @ (K), as :func:`torch.mv`. Raises RuntimeError for other ranks, sizes that differ, mixed dtypes."""
    try:
        _check_tensors(input=input, vec=vec)
        if input.dim() != 2 or vec.dim() != 1 or input.shape[1] != vec.shape[0]:
            _wrong("expected a matrix and a vector of as many elements as it has columns", input=input, vec=vec)
        return _matmul("mv", torch.mv, input, vec, out, casts=False)
    except Unsupported as reason:
        return fall_back("mv", reason.args[0], torch.mv, input, vec, **_out(out))


def addmm(
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: Tensor | None = None,
) -> Tensor:
    """beta · input + alpha · (mat1 @ mat2), as :func:`torch.addmm`.

    mat1 (N, K), mat2 (K, M), input broadcasts to (N, M) and is not read where beta is 0. Raises RuntimeError for other
    ranks, sizes that do not fit, or mixed dtypes.
    """
    if input is not None and _is_one(beta) and _is_one(alpha) and not is_dynamo_compiling():
        result = _tensor_product(cpu.MM, mat1, mat2, input, 0, out)
        if type(result) is tuple:
            return _apply_scaled(input, mat1, mat2, 1.0, 1.0, result)
        if result is not None:
            return result
    options = {"beta": beta, "alpha": alpha, **_out(out)}
    try:
        _check_tensors(mat1=mat1, mat2=mat2, input=input)
        if mat1.dim() != 2 or mat2.dim() != 2:
            _wrong("expected two matrices", mat1=mat1, mat2=mat2)
        _check_inner(mat1=mat1, mat2=mat2)
        return _scaled("addmm", input, mat1, mat2, beta, alpha, out)
    except Unsupported as reason:
        return fall_back("addmm", reason.args[0], torch.addmm, input, mat1, mat2, **options)


def baddbmm(
    input: Tensor,
    batch1: Tensor,
    batch2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: Tensor | None = None,
) -> Tensor:
    """beta · input + alpha · (batch1 @ batch2), as :func:`torch.baddbmm`.

    batch1 (B, N, K), batch2 (B, K, M), input broadcasts to (B, N, M) and is not read where beta is 0. Raises
    RuntimeError for other ranks, sizes that do not fit, or mixed dtypes.
    """
    options = {"beta": beta, "alpha": alpha, **_out(out)}
    try:
        _check_tensors(batch1=batch1, batch2=batch2, input=input)
        if batch1.dim() != 3 or batch2.dim() != 3 or batch1.shape[0] != batch2.shape[0]:
            _wrong("expected two batches of matrices, of one size", batch1=batch1, batch2=batch2)
        _check_inner(batch1=batch1, batch2=batch2)
        return _scaled("baddbmm", input, batch1, batch2, beta, alpha, out)
    except Unsupported as reason:
        return fall_back("baddbmm", reason.args[0], torch.baddbmm, input, batch1, batch2, **options)


def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """out[..., o] = Σ_ij input1[..., i] · weight[o, i, j] · input2[..., j] + bias[o], as
    :func:`torch.nn.functional.bilinear`.

    input1 (..., I), input2 (..., J) with equal leading dimensions, weight (O, I, J), bias (O). Computed as two products,
    over i and then over j; bfloat16 and float16 are made float32 before the first and rounded after the second. Raises
    RuntimeError for sizes that do not fit, or mixed dtypes.
    """
    try:
        _check_tensors(input1=input1, input2=input2, weight=weight, bias=bias)
        if weight.dim() != 3:
            _wrong("expected three dimensions (out, in1, in2)", weight=weight)
        if input1.dim() < 1 or input1.dim() != input2.dim() or input1.shape[:-1] != input2.shape[:-1]:
            _wrong("expected equal leading dimensions", input1=input1, input2=input2)
        if input1.shape[-1] != weight.shape[1] or input2.shape[-1] != weight.shape[2]:
            _wrong("expected weight (out, in1, in2) to match the inputs", input1=input1, input2=input2, weight=weight)
        if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
            _wrong("expected bias (out) to match weight (out, in1, in2)", bias=bias, weight=weight)
        where = route("gemm", input1, input2, weight, bias)
    except Unsupported as reason:
        return fall_back("bilinear", reason.args[0], torch.nn.functional.bilinear, input1, input2, weight, bias)
    if where == REFERENCE:
        return reference.bilinear(input1, input2, weight, bias)
    dtype = input1.dtype
    if dtype in (torch.bfloat16, torch.float16):
        input1, input2, weight = input1.float(), input2.float(), weight.float()
        bias = None if bias is None else bias.float()
    batch = input1.shape[:-1]
    rows = math.prod(batch)
    x1 = input1.reshape(rows, input1.shape[-1])
    x2 = input2.reshape(rows, input2.shape[-1])
    over_i = product(x1, weight).permute(1, 0, 2)  # (O, rows, J), then (rows, O, J)
    result = product(over_i, x2.unsqueeze(-1)).squeeze(-1)
    if bias is not None:
        result = result + bias
    return result.reshape(*batch, weight.shape[0]).to(dtype)


def int_mm(
    a: Tensor,
    b: Tensor,
    *,
    out_dtype: torch.dtype = torch.int32,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """row_scale · col_scale · (a @ b) + bias for 8-bit integers, summed exactly in int32.

    a (..., M, K) int8 or uint8, b (..., K, N) int8, batch dimensions broadcast. ``out_dtype`` int32 gives the sums
    themselves; float32, bfloat16 and float16 take ``row_scale`` (M), ``col_scale`` (N) and ``bias`` (N), each contiguous
    float32 or None. The sums wrap around like int32 where K · 255 · 128 passes 2³¹ (K over 65,793). Not differentiable.
    Raises TypeError for what is no tensor, RuntimeError for shapes and dtypes, ValueError for a scale with int32.
    """
    for name, value in (("a", a), ("b", b), ("row_scale", row_scale), ("col_scale", col_scale), ("bias", bias)):
        if not isinstance(value, Tensor) and (value is not None or name in "ab"):
            raise TypeError(f"fastnn.int_mm: {name}: expected a Tensor, got {type(value).__name__}")
        if value is not None and (value.layout is not torch.strided or value.device != a.device or value.is_nested):
            raise RuntimeError(
                f"fastnn.int_mm: {name}: expected a dense tensor on {a.device}, got {value.layout}, {value.device}"
            )
    if a.dtype not in (torch.int8, torch.uint8) or b.dtype is not torch.int8:
        raise RuntimeError(f"fastnn.int_mm: expected a int8 or uint8 and b int8, got {a.dtype} and {b.dtype}")
    if a.dim() < 2 or b.dim() < 2 or a.shape[-1] != b.shape[-2]:
        raise RuntimeError(
            f"fastnn.int_mm: expected a (..., M, K) and b (..., K, N), got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if out_dtype not in (torch.int32, torch.float32, torch.bfloat16, torch.float16):
        raise RuntimeError(f"fastnn.int_mm: out_dtype: expected int32, float32, bfloat16 or float16, got {out_dtype}")
    for name, value, size in (
        ("row_scale", row_scale, a.shape[-2]),
        ("col_scale", col_scale, b.shape[-1]),
        ("bias", bias, b.shape[-1]),
    ):
        if value is None:
            continue
        if out_dtype is torch.int32:
            raise ValueError(f"fastnn.int_mm: {name}: needs a floating-point out_dtype, got torch.int32")
        if value.dtype is not torch.float32 or tuple(value.shape) != (size,):
            raise RuntimeError(
                f"fastnn.int_mm: {name}: expected ({size}) float32, got {describe('a tensor', value)[9:]}"
            )
    if a.dim() > 2 or b.dim() > 2:
        try:
            torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        except RuntimeError:
            raise RuntimeError(
                f"fastnn.int_mm: batches do not broadcast: a {tuple(a.shape)}, b {tuple(b.shape)}"
            ) from None
    scales = [None if value is None else value.detach().contiguous() for value in (row_scale, col_scale, bias)]
    if _settings().backend == "reference":
        return reference.int_mm(a, b, *scales).to(out_dtype)
    reason = supports("int_mm", a, b)
    if reason is not None:
        raise RuntimeError(f"fastnn.int_mm: {reason}")
    return _kernels.int_mm(a, b, out_dtype, *scales)


# ---- checks ------------------------------------------------------------------------------------------------------


def _wrong(expected: str, **arguments: Any) -> None:
    names = ", ".join(describe(name, value) for name, value in arguments.items())
    raise Unsupported(f"{expected}, got {names}")


def _check_tensors(**arguments: Any) -> None:
    """One kind of tensors, on one device. An argument that is None is absent (bias alone may be)."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor) and not (value is None and name == "bias"):
            raise Unsupported(f"{name}: expected a Tensor, got {type(value).__name__}")
    first_name = first = None
    for name, value in arguments.items():
        if value is None:
            continue
        if value.is_nested:
            raise Unsupported(f"{name}: a nested tensor")
        if first is None:
            first_name, first = name, value
        elif value.dtype != first.dtype and not is_autocast_enabled(autocast_device(value)):
            _wrong("expected one dtype", **{first_name: first, name: value})
        elif value.device != first.device:
            reason = f"expected one device, got {first_name} on {first.device} and {name} on {value.device}"
            if value.is_meta or first.is_meta:
                # torch reads the memory that a meta tensor does not have in some of its products.
                raise RuntimeError(f"fastnn: {reason}")
            raise Unsupported(reason)


def _check_inner(**arguments: Tensor) -> None:
    a, b = arguments.values()
    if a.shape[-1] != b.shape[-2]:
        first, second = arguments
        _wrong(f"expected as many columns of {first} as rows of {second}", **arguments)


def _broadcast_batch(a_name: str, a: Tensor, b_name: str, b: Tensor) -> None:
    # Without `strict`, which Dynamo before torch 2.10 takes for true.
    for p, q in zip(reversed(a.shape[:-2]), reversed(b.shape[:-2])):  # noqa: B905
        if p != q and p != 1 and q != 1:
            _wrong("expected batch dimensions that broadcast", **{a_name: a, b_name: b})


def _out(out: Tensor | None) -> dict[str, Tensor]:
    return {} if out is None else {"out": out}


# ---- the way of a call -------------------------------------------------------------------------------------------


def _cast(out: Tensor | None, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The operands under autocast, which torch does not apply where there is an out=."""
    cast = autocast(*tensors) if out is None else tensors
    dtypes = {tensor.dtype for tensor in cast if tensor is not None}
    if len(dtypes) > 1:
        raise Unsupported(f"expected one dtype, got {', '.join(sorted(map(str, dtypes)))}")
    return cast


def _matmul(
    op: str, torch_function: Callable[..., Tensor], a: Tensor, b: Tensor, out: Tensor | None, casts: bool = True
) -> Tensor:
    """The product of checked operands of any rank from 1."""
    if casts:
        a, b = _cast(out, a, b)
    else:
        _cast(a, a, b)
    where = route("gemm", a, b)
    drop = ()
    if b.dim() == 1:
        b = b.unsqueeze(-1)
        drop = (-1,)
    if a.dim() == 1:
        a = a.unsqueeze(0)
        drop = (*drop, -2) if not drop else (-1, -1)

    def compute() -> Tensor:
        result = torch.ops.fastnn.matmul(a, b) if where == LIBRARY and casts else product(a, b, where)
        for dim in drop:
            result = result.squeeze(dim)
        return result

    if out is None:
        return compute()

    def write(out: Tensor) -> None:
        for dim in reversed(drop):
            out = out.unsqueeze(dim)
        _kernels.product(resolve(a), resolve(b), out)

    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    shape = [*batch, a.shape[-2], b.shape[-1]]
    for dim in drop:
        del shape[dim]
    return write_out(out, where, shape, a.dtype, (a, b), write, compute)


def product(a: Tensor, b: Tensor, where: str | None = None) -> Tensor:
    """The differentiable product of two matrices or batches of them, whose shapes and dtypes fit."""
    if where is None:
        try:
            where = route("gemm", a, b)
        except Unsupported as reason:
            return fall_back("matmul", reason.args[0], torch.matmul, a, b)
    if where == LIBRARY:
        return torch.ops.fastnn.product(a, b)
    if where == TRANSFORM:
        return _TransformedProduct.apply(a, b)
    if where == REFERENCE:
        return reference.matmul(a, b)
    a, b = resolve(a), resolve(b)
    if wants_grad(a, b):
        return _Product.apply(a, b)
    return _kernels.product(a, b)


def kernel_product(a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """alpha · (a @ b) in a backward, where most often no gradient of the gradient is asked for."""
    if alpha == 1 and not is_dynamo_compiling():
        result = _tensor_product(cpu.MATMUL, a, b, None, 0, None)
        if type(result) is tuple:
            return _apply_product(a, b, result)
        if result is not None:
            return result
    if is_straight("gemm", a, b):
        return _kernels.product(resolve(a), resolve(b), alpha=alpha)
    result = product(a, b)
    return result if alpha == 1 else alpha * result


def _reduce(grad: Tensor, shape: Sequence[int]) -> Tensor:
    """The gradient of what was broadcast: summed over the dimensions that were."""
    return grad if grad.shape == shape else grad.sum_to_size(shape)


def product_grads(
    ctx: Any, grad: Tensor, a: Tensor | None, b: Tensor | None, alpha: float = 1.0
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of alpha · (a @ b): grad @ bᵀ and aᵀ @ grad, summed over broadcast batches.

    ``ctx`` has ``needs`` (of a, of b) and ``shapes``; an operand that is not needed is None. Where b is one matrix for a
    batch, its gradient is one product over all rows rather than a batch to be summed.
    """
    grad_a = grad_b = None
    a_shape, b_shape = ctx.shapes
    if ctx.needs[0]:
        grad_a = _reduce(kernel_product(grad, b.mT, alpha), a_shape)
    if ctx.needs[1]:
        if len(b_shape) == 2 and len(a_shape) > 2:
            rows = math.prod(a_shape[:-1])
            a, grad = a.reshape(rows, a_shape[-1]), grad.reshape(rows, b_shape[-1])
            grad_b = kernel_product(a.mT, grad, alpha)
        else:
            grad_b = _reduce(kernel_product(a.mT, grad, alpha), b_shape)
    return grad_a, grad_b


def _save_operands(ctx: Any, a: Tensor, b: Tensor, needs: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    """Each operand is kept only where the other one's gradient is wanted."""
    ctx.needs = needs
    ctx.shapes = (a.shape, b.shape)
    return (a if needs[1] else None, b if needs[0] else None)


class _Product(Function):
    """``result`` holds the product where the short way has computed it."""

    @staticmethod
    def forward(ctx: FunctionCtx, a: Tensor, b: Tensor, result: tuple[Tensor] | None = None) -> Tensor:
        ctx.save_for_backward(*_save_operands(ctx, a, b, ctx.needs_input_grad[:2]))
        return _kernels.product(a, b) if result is None else result[0]

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*product_grads(ctx, grad, *ctx.saved_tensors), None)


# Function.apply asks for transforms, of which the short way knows that there are none.
_apply_product = super(Function, _Product).apply


class _TransformedProduct(Function):
    """For torch.func and forward mode."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return torch.ops.fastnn.product(a, b) if needs_library(a, b) else _on_plain(a, b)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        _setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return product_grads(ctx, grad, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: FunctionCtx, a_t: Tensor | None, b_t: Tensor | None) -> Tensor:
        a, b = ctx.saved_tensors
        result = None if a_t is None else product(a_t, b)
        if b_t is not None:
            by_b = product(a, b_t)
            result = by_b if result is None else result + by_b
        return result

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], a: Tensor, b: Tensor) -> tuple[Tensor, int]:
        return _vmap(info, in_dims, a, b)


def _vmap(info: Any, in_dims: tuple[int | None, int | None], a: Tensor, b: Tensor) -> tuple[Tensor, int]:
    """The mapped dimension becomes the first batch dimension; an operand without it is shared by broadcasting."""
    dims = [tensor.dim() - (dim is not None) for tensor, dim in zip((a, b), in_dims, strict=True)]
    sides = []
    for tensor, dim, own in zip((a, b), in_dims, dims, strict=True):
        if dim is not None:
            tensor = tensor.movedim(dim, 0)
            for _ in range(max(dims) - own):
                tensor = tensor.unsqueeze(1)
        sides.append(tensor)
    return product(*sides), 0


# ---- addmm and baddbmm -------------------------------------------------------------------------------------------


def _scaled(op: str, input: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float, out: Tensor | None) -> Tensor:
    """beta · input + alpha · (a @ b) of checked matrices or batches of them."""
    beta, alpha = _number("beta", beta), _number("alpha", alpha)
    input, a, b = _cast(out, input, a, b)
    shape = (*a.shape[:-1], b.shape[-1])
    broadcasts = input.dim() <= len(shape)
    for size, full in zip(reversed(input.shape), reversed(shape)):  # noqa: B905 - and no any(), for Dynamo
        broadcasts = broadcasts and (size == 1 or size == full)
    if not broadcasts:
        _wrong("expected input to broadcast to the product", input=input, mat1=a, mat2=b)
    where = route("gemm", input, a, b)

    def compute() -> Tensor:
        if where == LIBRARY:
            return torch.ops.fastnn.addmm(input, a, b, beta, alpha)
        if where == REFERENCE:
            return reference.addmm(input, a, b, beta=beta, alpha=alpha)
        if where == TRANSFORM:
            result = product(a, b, where)
            result = result if alpha == 1 else alpha * result
            return result if beta == 0 else result + (input if beta == 1 else beta * input)
        residual, x, y = resolve(input), resolve(a), resolve(b)
        if wants_grad(residual, x, y):
            return _Scaled.apply(residual, x, y, beta, alpha)
        return _scaled_kernel(residual, x, y, beta, alpha)

    if out is None:
        return compute()
    return write_out(
        out,
        where,
        shape,
        a.dtype,
        (input, a, b),
        lambda c: _scaled_kernel(resolve(input), resolve(a), resolve(b), beta, alpha, c),
        compute,
        in_place_of=input,
    )


def _is_one(value: Any) -> bool:
    return type(value) in (int, float) and value == 1


def _number(name: str, value: Any) -> float:
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise Unsupported(f"{name}: expected a real number, got {value!r}")
    return float(value)


def _scaled_kernel(input: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float, out: Tensor | None = None) -> Tensor:
    # With beta = 0 the added term is not read, so that its NaN do not matter.
    return _kernels.product(a, b, out, alpha=alpha, beta=beta, residual=None if beta == 0 else input)


class _Scaled(Function):
    """``result`` holds the sum where the short way has computed it."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        input: Tensor,
        a: Tensor,
        b: Tensor,
        beta: float,
        alpha: float,
        result: tuple[Tensor] | None = None,
    ) -> Tensor:
        _setup_scaled(ctx, (input, a, b, beta, alpha), None)
        return _scaled_kernel(input, a, b, beta, alpha) if result is None else result[0]

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_scaled_backward(ctx, grad), None)


_apply_scaled = super(Function, _Scaled).apply


def _setup_scaled(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    input, a, b, ctx.beta, ctx.alpha = inputs
    ctx.input_shape = input.shape
    ctx.save_for_backward(*_save_operands(ctx, a, b, ctx.needs_input_grad[1:3]))


def _scaled_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    by_input = None
    if ctx.needs_input_grad[0]:
        by_input = _reduce(grad if ctx.beta == 1 else grad * ctx.beta, ctx.input_shape)
    return (by_input, *product_grads(ctx, grad, *ctx.saved_tensors, ctx.alpha), None, None)


# ---- torch.library -----------------------------------------------------------------------------------------------


def _on_plain(a: Tensor, b: Tensor) -> Tensor:
    if _settings().backend == "reference":
        return reference.matmul(a, b)
    return _kernels.product(resolve(a), resolve(b))


def _fake(a: Tensor, b: Tensor) -> Tensor:
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    torch._check(a.shape[-1] == b.shape[-2], lambda: f"fastnn::matmul: {tuple(a.shape)} and {tuple(b.shape)}")
    return a.new_empty((*batch, a.shape[-2], b.shape[-1]))


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*_save_operands(ctx, *inputs, ctx.needs_input_grad[:2]))


def _scaled_on_plain(input: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    if _settings().backend == "reference":
        return reference.addmm(input, a, b, beta=beta, alpha=alpha)
    return _scaled_kernel(resolve(input), resolve(a), resolve(b), beta, alpha)


def _vmap_scaled(
    info: Any, in_dims: tuple[int | None, ...], input: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float
) -> tuple[Tensor, int]:
    result, _ = _vmap(info, in_dims[1:3], a, b)
    if in_dims[1] is None and in_dims[2] is None:
        result = result.expand(info.batch_size, *result.shape)
    if in_dims[0] is not None:
        input = input.movedim(in_dims[0], 0)
        for _ in range(result.dim() - input.dim()):
            input = input.unsqueeze(1)
    return (alpha * result if beta == 0 else alpha * result + beta * input), 0


# The same product twice: matmul takes part in autocast; product, of which mv, bilinear and the derivatives are made, does
# not, as in torch.
for _name, _autocast in (("matmul", True), ("product", False)):
    define(
        f"{_name}(Tensor a, Tensor b) -> Tensor",
        impl=_on_plain,
        fake=_fake,
        setup_context=_setup_context,
        backward=lambda ctx, grad: product_grads(ctx, grad, *ctx.saved_tensors),
        vmap=_vmap,
        autocast=_autocast,
    )
define(
    "addmm(Tensor input, Tensor a, Tensor b, float beta, float alpha) -> Tensor",
    impl=_scaled_on_plain,
    fake=lambda input, a, b, beta, alpha: _fake(a, b),
    setup_context=_setup_scaled,
    backward=_scaled_backward,
    vmap=_vmap_scaled,
    autocast=True,
)
