"""torch's own samples and error inputs (the OpInfo database)."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import SampleInput

import fastnn
import fastnn.functional as fF

from .support import FLOATS, SUM_UNIT, TORCH, UNIT, assert_within, double

CONVS = [f"conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3)]
POOLS = [f"{kind}_pool{dims}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for dims in (1, 2, 3)]
OURS = {
    **{f"nn.functional.{name}": getattr(fF, name) for name in POOLS},
    "nn.functional.linear": fF.linear,
    "nn.functional.bilinear": fF.bilinear,
    "nn.functional.batch_norm": fF.batch_norm,
    "nn.functional.cross_entropy": fF.cross_entropy,
    "softmax": fF.softmax,
    "log_softmax": fF.log_softmax,
    "nn.functional.softmin": fF.softmin,
    # The entry has the weight first.
    "nn.functional.embedding": lambda weight, indices, **kwargs: fF.embedding(indices, weight, **kwargs),
    "nn.functional.scaled_dot_product_attention": fF.scaled_dot_product_attention,
    "nn.functional.layer_norm": fF.layer_norm,
    "nn.functional.rms_norm": fF.rms_norm,
    "nn.functional.group_norm": fF.group_norm,
    "nn.functional.instance_norm": fF.instance_norm,
    "nn.functional.relu": fF.relu,
    "nn.functional.relu6": fF.relu6,
    "nn.functional.gelu": fF.gelu,
    "nn.functional.silu": fF.silu,
    "sigmoid": fF.sigmoid,
    "tanh": fF.tanh,
    "matmul": fastnn.matmul,
    "mm": fastnn.mm,
    "bmm": fastnn.bmm,
    "addmm": fastnn.addmm,
    "baddbmm": fastnn.baddbmm,
    "mv": fastnn.mv,
    **{f"nn.functional.{name}": getattr(fF, name) for name in CONVS},
}
if TORCH >= (2, 13):
    OURS["nn.functional.linear_cross_entropy"] = fF.linear_cross_entropy
ELEMENTWISE = (
    "nn.functional.relu",
    "nn.functional.relu6",
    "nn.functional.gelu",
    "nn.functional.silu",
    "sigmoid",
    "tanh",
)
ENTRIES = {op.name: op for op in op_db if op.name in OURS and op.variant_test_name == ""}
#: What there are CUDA kernels for.
ON_CUDA = (
    "nn.functional.linear",
    *("matmul", "mm", "bmm", "addmm", "baddbmm", "mv"),
    "nn.functional.scaled_dot_product_attention",
    *("softmax", "log_softmax", "nn.functional.softmin"),
    *("nn.functional.embedding", "nn.functional.cross_entropy"),
    *(f"nn.functional.{kind}_norm" for kind in ("layer", "rms", "batch", "group", "instance")),
    # Of others the samples are large; tests/kernels/test_conv.py has all.
    *(f"nn.functional.{name}" for name in ("conv1d", "conv2d", "conv_transpose2d")),
    *(f"nn.functional.{kind}_pool2d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg")),
    *ELEMENTWISE,
)
#: And Triton kernels.
ON_TRITON = tuple(name for name in ON_CUDA if "conv" not in name)
CASES = [
    *((name, dtype, "cpu") for name in OURS for dtype in FLOATS),
    *((name, dtype, "cuda") for name in ON_CUDA for dtype in FLOATS if dtype is not torch.float64),
    *((name, dtype, "triton") for name in ON_TRITON for dtype in FLOATS if dtype is not torch.float64),
]
IDS = [f"{name}-{str(dtype)[6:]}{'' if kernels == 'cpu' else f'-{kernels}'}" for name, dtype, kernels in CASES]
every_case = pytest.mark.parametrize(("name", "dtype", "kernels"), CASES, ids=IDS, indirect=["kernels"])


def test_every_function_has_an_entry():
    assert set(ENTRIES) == set(OURS)


@functools.cache
def many_samples(name):
    """Of the pools that have a thousand samples every n-th, in float32: n is odd, so that all values of every argument
    are among them."""
    found = list(ENTRIES[name].sample_inputs("cpu", torch.float32))
    return found[:: len(found) // 20 | 1]


def samples(name, dtype, requires_grad=False):
    if name.startswith("nn.functional.max_pool"):
        for sample in many_samples(name):
            yield SampleInput(
                sample.input.detach().to(dtype).requires_grad_(requires_grad), args=sample.args, kwargs=sample.kwargs
            )
        return
    # Where torch has no kernel for a dtype, its float32 samples rounded.
    there = dtype in ENTRIES[name].supported_dtypes("cpu")
    # Where the fixture `kernels` puts new tensors: on a GPU, if there is one to test.
    device = torch.get_default_device().type
    for sample in ENTRIES[name].sample_inputs(device, dtype if there else torch.float32, requires_grad=requires_grad):
        if sample.kwargs.get("dropout_p"):
            continue  # what is dropped differs from torch: tests/ops/test_attention.py
        if not there:
            sample.input = sample.input.detach().to(dtype).requires_grad_(requires_grad)
        yield sample


def magnitude_of(op, sample, exact):
    if "max_pool" in op.name:
        return exact.abs()
    if op.name in ELEMENTWISE:
        return torch.maximum(sample.input.detach().double().abs(), exact.abs())
    if "cross_entropy" in op.name:
        # A few times the largest logit and, of a sum or a mean, as much for each position.
        tensors = [t for t in (sample.input, *sample.args) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        size = sum(double(t, True).amax() for t in tensors if t.numel()) + 1
        weight = sample.kwargs.get("weight")
        largest = 1 if weight is None else double(weight).amax().clamp(min=1)
        # The linear layer's result is rounded to the dtype, as torch's is.
        rounded = UNIT[sample.input.dtype] / SUM_UNIT[sample.input.dtype] if "linear" in op.name else 1
        return (size**2 * largest * rounded * sample.input[..., 0].numel()).expand_as(exact)
    if "softm" in op.name and exact.numel():
        # The difference from the largest is rounded, and the exponential multiplies that; or it is the result.
        return 1 + exact.abs() if "log" in op.name else exact * (1 + 2 * double(sample.input).abs().amax())
    if "attention" in op.name:
        return magnitude_of_attention(*double((sample.input, *sample.args), True), dtype=sample.input.dtype)
    if op.name == "nn.functional.batch_norm":
        return magnitude_of_batch_norm(double(sample.input), *double(sample.args), **sample.kwargs)
    if op.name == "nn.functional.group_norm":
        return magnitude_of_groups(double(sample.input), *double(sample.args), **double(sample.kwargs))
    if op.name == "nn.functional.instance_norm":
        x, given = double(sample.input), double(sample.kwargs)
        return magnitude_of_groups(x, x.shape[1], given.get("weight"), given.get("bias"), given.get("eps", 1e-5))
    if op.name in ("nn.functional.layer_norm", "nn.functional.rms_norm"):
        return magnitude_of_rows(op.name, double(sample.input), *double(sample.args), **double(sample.kwargs))
    return op.op(double(sample.input, True), *double(sample.args, True), **double(sample.kwargs, True))


def dense(gradient):
    """An embedding's may be sparse."""
    return gradient if gradient is None or gradient.layout is torch.strided else gradient.to_dense()


def magnitude_of_attention(q, k, v, dtype):
    """Of the values, and what the roundings of the scores and of 16-bit probabilities do."""
    score = (q @ k.mT).amax() / q.shape[-1] ** 0.5
    coarse = {torch.bfloat16: 2**12, torch.float16: 2**9}.get(dtype, 0)
    return v.amax((-2, -1), keepdim=True) * (1 + score + coarse)


def values_and_indices(result):
    """The two results of a maximum with indices; of everything else the result, and None."""
    return result if isinstance(result, tuple) else (result, None)


def magnitude_of_batch_norm(x, mean, var, weight, bias, training=False, momentum=0.1, eps=1e-5):
    """(|x| + |mean|) |weight| / deviation + |bias|, by whichever statistics are taken."""
    if not x.numel():
        return x
    axes = [axis for axis in range(x.dim()) if axis != 1]
    if training:
        mean, var = x.mean(axes), x.var(axes, unbiased=False)
    scale = (1 if weight is None else weight.abs()) / (var + eps).sqrt()
    shape = (1, -1, *[1] * (x.dim() - 2))
    size = (x.abs() + mean.abs().view(shape)) * scale.view(shape)
    return size if bias is None else size + bias.abs().view(shape)


def magnitude_of_rows(name, x, shape, weight=None, bias=None, eps=None):
    """(|x| + |mean|) |weight| / deviation + |bias| of each row."""
    if not x.numel():
        return x
    axes = list(range(x.dim() - len(shape), x.dim()))
    mean = x.mean(axes, keepdim=True) if name == "nn.functional.layer_norm" else torch.zeros(())
    eps = eps if eps is not None else torch.finfo(torch.float32).eps if mean.dim() == 0 else 1e-5
    size = (x.abs() + mean.abs()) / ((x - mean).square().mean(axes, keepdim=True) + eps).sqrt()
    size = size if weight is None else size * weight.abs()
    return size if bias is None else size + bias.abs()


def magnitude_of_groups(x, groups, weight=None, bias=None, eps=1e-5):
    if not x.numel():
        return x
    rows = x.reshape(x.shape[0], groups, -1)
    size = magnitude_of_rows("nn.functional.layer_norm", rows, rows.shape[-1:], None, None, eps).reshape(x.shape)
    shape = (1, -1, *[1] * (x.dim() - 2))
    size = size if weight is None else size * weight.abs().view(shape)
    return size if bias is None else size + bias.abs().view(shape)


def terms_of(op, sample):
    if op.name.removeprefix("nn.functional.") in CONVS:
        # The channels that a result is a sum over, all groups of them, and the taps.
        weight = sample.args[0]
        return 2 + weight.numel() // weight.shape["transpose" in op.name]
    tensors = [t for t in (sample.input, *sample.args) if isinstance(t, torch.Tensor)]
    return 8 + 2 * max((size for t in tensors for size in t.shape), default=1)


def samples_for(kernels, name, dtype, **kwargs):
    """All; but Triton's interpreter is slow, and its 16-bit types, which only load and store otherwise than float32, share
    them."""
    found = samples(name, dtype, **kwargs)
    if kernels != "triton" or dtype is torch.float32:
        return found
    found = list(found)
    return found[dtype is torch.float16 :: 2] or found


@every_case
def test_samples(name, dtype, kernels):
    op, count = ENTRIES[name], 0
    for sample in samples_for(kernels, name, dtype):
        result, indices = values_and_indices(OURS[name](sample.input, *sample.args, **sample.kwargs))
        like = sample.input if dtype in op.supported_dtypes("cpu") else sample.input.float()
        # What scales a table in place would do it again.
        again = like.clone() if "max_norm" in sample.kwargs else like
        torchs, expected = values_and_indices(op.op(again, *sample.args, **sample.kwargs))
        assert (indices is None) == (expected is None)
        if indices is not None:
            assert torch.equal(indices, expected)
            assert indices.stride() == expected.stride()
        assert result.shape == torchs.shape
        assert result.stride() == torchs.stride()
        assert result.dtype == (torchs.dtype if like is sample.input else dtype)
        # An embedding's table was scaled by now, in its own dtype.
        kwargs = {name: value for name, value in double(sample.kwargs).items() if name != "max_norm"}
        exact, _ = values_and_indices(op.op(double(sample.input), *double(sample.args), **kwargs))
        assert_within(result, exact, magnitude_of(op, sample, exact), terms_of(op, sample))
        count += 1
    assert count


@every_case
def test_gradients_of_samples(name, dtype, kernels):
    """The gradients, against those that torch computes in float64."""
    op = ENTRIES[name]
    loose = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for sample in samples_for(kernels, name, dtype, requires_grad=True):
        inputs = [t for t in (sample.input, *sample.args) if isinstance(t, torch.Tensor)]
        # Running statistics have no gradient.
        wide = [double(t).requires_grad_(t.requires_grad) for t in inputs]
        wide_args = iter(wide[1:])
        args = [next(wide_args) if isinstance(a, torch.Tensor) else a for a in sample.args]
        result, _ = values_and_indices(OURS[name](sample.input, *sample.args, **sample.kwargs))
        exact, _ = values_and_indices(op.op(wide[0], *args, **double(sample.kwargs)))
        if not exact.requires_grad:
            assert not result.requires_grad
            continue
        direction = torch.randn_like(exact).to(dtype)
        wanted = [t for t in inputs if t.requires_grad]
        exact_wanted = [w for w, t in zip(wide, inputs, strict=True) if t.requires_grad]
        found = torch.autograd.grad(result, wanted, direction, allow_unused=True)
        expected = torch.autograd.grad(exact, exact_wanted, direction.double(), allow_unused=True)
        for g, e in zip(map(dense, found), map(dense, expected), strict=True):
            if e is None:
                assert g is None or not g.any()
                continue
            assert g.shape == e.shape
            assert g.dtype == dtype
            scale = e.abs().max().item() if e.numel() else 0
            if "attention" in name and dtype in (torch.bfloat16, torch.float16):
                # The result that the derivative is taken at is rounded, beside keys and values up to 9.
                scale += 10
            torch.testing.assert_close(g.double(), e, rtol=loose, atol=loose * max(scale, 1))


@pytest.mark.parametrize("name", [name for name in OURS if ENTRIES[name].error_inputs_func is not None])
def test_errors(name):
    op = ENTRIES[name]
    for error in op.error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises(Exception) as ours:
            OURS[name](sample.input, *sample.args, **sample.kwargs)
        assert type(ours.value) is error.error_type


# avg_pool2d takes an out= that its documentation does not have.
@pytest.mark.parametrize("name", [n for n in OURS if ENTRIES[n].supports_out and "pool" not in n])
def test_out(name):
    op = ENTRIES[name]
    for sample in samples(name, torch.float32):
        expected = OURS[name](sample.input, *sample.args, **sample.kwargs)
        for out in (torch.full_like(expected, torch.nan), torch.empty(0)):
            assert OURS[name](sample.input, *sample.args, **sample.kwargs, out=out) is out
            torch.testing.assert_close(out, expected, rtol=0, atol=0)
        strided = torch.full((*expected.shape, 2), torch.nan)[..., 0]
        OURS[name](sample.input, *sample.args, **sample.kwargs, out=strided)
        torch.testing.assert_close(strided, expected, rtol=1e-5, atol=1e-5)
        with pytest.raises(RuntimeError):
            OURS[name](sample.input, *sample.args, **sample.kwargs, out=torch.empty(0, dtype=torch.int32))
        with pytest.raises(RuntimeError):
            op.op(sample.input, *sample.args, **sample.kwargs, out=torch.empty(0, dtype=torch.int32))


def test_signatures():
    """The parameter names and defaults are torch's."""
    import inspect

    assert str(inspect.signature(fF.relu)).replace("'", "").startswith("(input: Tensor, inplace: bool = False)")
    # torch's convolutions are builtins, whose signatures are known by their docstrings.
    for name in CONVS:
        parameters = [
            str(p).split(":")[0] + f"={p.default}" for p in inspect.signature(getattr(fF, name)).parameters.values()
        ]
        theirs = getattr(F, name).__doc__.split("(", 1)[1].split(")")[0]
        defaults = [p if "=" in p else f"{p}={inspect.Parameter.empty}" for p in theirs.split(", ")]
        assert parameters == defaults, name
    python = [(getattr(fF, name), getattr(F, name)) for name in ("adaptive_avg_pool2d", "adaptive_avg_pool3d")]
    for ours, torchs in ((fF.relu, F.relu), (fF.relu6, F.relu6), (fF.silu, F.silu), *python):
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(torchs).parameters)
    x, w, b = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)
    torch.testing.assert_close(fF.linear(input=x, weight=w, bias=b), F.linear(input=x, weight=w, bias=b))
    image = x.view(1, 2, 3)
    for pools in (F, fF):
        pools.max_pool1d(
            input=image, kernel_size=2, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
        )
        pools.avg_pool2d(
            input=image,
            kernel_size=2,
            stride=None,
            padding=0,
            ceil_mode=False,
            count_include_pad=True,
            divisor_override=None,
        )
        pools.adaptive_max_pool2d(input=image, output_size=1, return_indices=False)
    fF.scaled_dot_product_attention(
        query=x, key=x, value=x, attn_mask=None, dropout_p=0.0, is_causal=True, scale=None, enable_gqa=False
    )
    fF.bilinear(input1=x, input2=x, weight=torch.randn(2, 3, 3), bias=None)
    fF.gelu(input=x, approximate="tanh")
    fastnn.matmul(input=x, other=w.t(), out=None)
    fastnn.mm(input=x, mat2=w.t(), out=None)
    fastnn.bmm(input=x[None], mat2=w.t()[None], out=None)
    fastnn.addmm(input=b, mat1=x, mat2=w.t(), beta=1, alpha=1, out=None)
    fastnn.baddbmm(input=b, batch1=x[None], batch2=w.t()[None], beta=1, alpha=1, out=None)
    fastnn.mv(input=x, vec=x[0], out=None)
