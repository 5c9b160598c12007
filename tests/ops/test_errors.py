"""Bad input: torch's exception type, the argument's name, never a crash."""

import contextlib
import functools
import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastnn
import fastnn.functional as fF
from fastnn import _state

bn, torch_bn = fF.batch_norm, F.batch_norm
X, W, B, ONES = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5), torch.ones(4)

# (ours, torch's, arguments, what the message has to name)
CASES = {
    "linear: weight None": (fF.linear, F.linear, (X, None), "weight"),
    "linear: input list": (fF.linear, F.linear, ([1.0], W), "input"),
    "linear: bias list": (fF.linear, F.linear, (X, W, [1.0]), "bias"),
    "linear: sizes": (fF.linear, F.linear, (X, torch.randn(5, 3)), "weight"),
    "linear: bias size": (fF.linear, F.linear, (X, W, torch.randn(3)), "bias"),
    "linear: scalar input": (fF.linear, F.linear, (torch.tensor(1.0), W), "input"),
    "linear: weight rank": (fF.linear, F.linear, (X, W[None]), "weight"),
    "linear: batch of weights": (fF.linear, F.linear, (torch.randn(2, 3, 4), torch.randn(2, 5, 4)), "weight"),
    "linear: weight dtype": (fF.linear, F.linear, (X, W.double()), "weight"),
    "linear: integer weight": (fF.linear, F.linear, (X, W.int()), "weight"),
    "linear: bias dtype": (fF.linear, F.linear, (X, W, B.double()), "bias"),
    "linear: quantized": (
        fF.linear,
        F.linear,
        (torch.quantize_per_tensor(X, 0.1, 0, torch.quint8), W),
        "quint8",
    ),
    "matmul: scalar": (fastnn.matmul, torch.matmul, (X, torch.tensor(1.0)), "other"),
    "matmul: sizes": (fastnn.matmul, torch.matmul, (X, X), "other"),
    "matmul: batches": (fastnn.matmul, torch.matmul, (torch.randn(2, 3, 4), torch.randn(3, 4, 5)), "batch"),
    "matmul: dtypes": (fastnn.matmul, torch.matmul, (X, W.t().double()), "other"),
    "matmul: not a tensor": (fastnn.matmul, torch.matmul, (X, 3), "other"),
    "mm: vector": (fastnn.mm, torch.mm, (X, B), "mat2"),
    "mm: sizes": (fastnn.mm, torch.mm, (X, W), "mat2"),
    "bmm: matrices": (fastnn.bmm, torch.bmm, (X, W.t()), "input"),
    "bmm: batches": (fastnn.bmm, torch.bmm, (torch.randn(2, 3, 4), torch.randn(3, 4, 5)), "mat2"),
    "mv: sizes": (fastnn.mv, torch.mv, (X, B), "vec"),
    "mv: ranks": (fastnn.mv, torch.mv, (B, B), "input"),
    "addmm: input": (fastnn.addmm, torch.addmm, (torch.randn(3), X, W.t()), "input"),
    "addmm: input None": (fastnn.addmm, torch.addmm, (None, X, W.t()), "input"),
    "addmm: dtype": (fastnn.addmm, torch.addmm, (B.double(), X, W.t()), "input"),
    "addmm: ranks": (fastnn.addmm, torch.addmm, (B, X[0], W.t()), "mat1"),
    "baddbmm: ranks": (fastnn.baddbmm, torch.baddbmm, (B, X, W.t()), "batch1"),
    "bilinear: weight": (fF.bilinear, F.bilinear, (X, X, torch.randn(2, 4, 5)), "weight"),
    "bilinear: batches": (fF.bilinear, F.bilinear, (X, X[:2], torch.randn(2, 4, 4)), "input1"),
    "batch_norm: one value": (bn, torch_bn, (X[:1], None, None, None, None, True), "input"),
    "batch_norm: vector": (bn, torch_bn, (B, None, None, None, None, True), "input"),
    "batch_norm: list": (bn, torch_bn, ([1.0], None, None), "input"),
    "batch_norm: no statistics": (bn, torch_bn, (X, None, None), "running_mean"),
    "batch_norm: half the statistics": (bn, torch_bn, (X, ONES, None, None, None, True), "running_var"),
    "batch_norm: mean size": (bn, torch_bn, (X, B, ONES), "running_mean"),
    "batch_norm: var size": (bn, torch_bn, (X, ONES, B), "running_var"),
    "batch_norm: weight size": (bn, torch_bn, (X, ONES, ONES, B), "weight"),
    "batch_norm: bias size": (bn, torch_bn, (X, ONES, ONES, None, B), "bias"),
    "batch_norm: bias list": (bn, torch_bn, (X, ONES, ONES, None, [1.0]), "bias"),
    "batch_norm: weight rank": (bn, torch_bn, (X, ONES, ONES, torch.ones(3, 4)), "weight"),
    "batch_norm: weight dtype": (bn, torch_bn, (X, ONES, ONES, ONES.double()), "weight"),
    "batch_norm: mixed dtypes": (bn, torch_bn, (X.bfloat16(), ONES, ONES, ONES.bfloat16()), "weight"),
    "batch_norm: half weights": (bn, torch_bn, (X, ONES, ONES, ONES.bfloat16()), "weight"),
    "batch_norm: integers": (bn, torch_bn, (X.int(), None, None, None, None, True), "int32"),
    "batch_norm: momentum": (bn, torch_bn, (X, ONES, ONES, None, None, True, None), "momentum"),
    "batch_norm: eps": (bn, torch_bn, (X, ONES, ONES, None, None, True, 0.1, None), "eps"),
    "batch_norm: eps -1": (bn, torch_bn, (X, ONES, ONES, None, None, True, 0.1, -1.0), "eps"),
    "batch_norm: training": (bn, torch_bn, (X, ONES, ONES, None, None, 1), "training"),
    "batch_norm: running_mean with grad": (bn, torch_bn, (X, torch.ones(4, requires_grad=True), ONES), "running_mean"),
    "relu: list": (fF.relu, F.relu, ([1.0],), "input"),
    "relu: bool": (fF.relu, F.relu, (torch.tensor([True]),), "bool"),
    "relu6: list": (fF.relu6, F.relu6, ([1.0],), "input"),
    "relu6: bool": (fF.relu6, F.relu6, (torch.tensor([True]),), "bool"),
    "relu6: expanded in place": (fF.relu6, F.relu6, (torch.randn(1).expand(4), True), "input"),
    "gelu: long": (fF.gelu, F.gelu, (torch.arange(3),), "int64"),
    "relu: expanded in place": (fF.relu, F.relu, (torch.randn(1).expand(4), True), "input"),
    "relu: leaf in place": (fF.relu, F.relu, (torch.randn(4, requires_grad=True), True), "input"),
}
# Images and filters, and a call each that is wrong: what is changed, and what the message has to name.
I, K = torch.randn(2, 4, 5, 6), torch.randn(6, 4, 3, 3)
T = torch.randn(4, 6, 3, 3)
CONVOLUTIONS = {
    "kernel larger than the input": ((I[..., :2], K), {}, "weight"),
    "kernel larger than the padded input": ((I[..., :1, :1], K, None, 1, (0, 1)), {}, "weight"),
    "dilated past the input": ((I, K), {"dilation": 3}, "dilation"),
    "channels": ((I, torch.randn(6, 3, 3, 3)), {}, "input"),
    "channels that groups do not divide": ((I, K), {"groups": 3}, "groups"),
    "filters that groups do not divide": ((I, torch.randn(5, 2, 3, 3)), {"groups": 2}, "groups"),
    "groups 0": ((I, K), {"groups": 0}, "groups"),
    "groups -1": ((I, K), {"groups": -1}, "groups"),
    "groups 1.5": ((I, K), {"groups": 1.5}, "groups"),
    "stride 0": ((I, K), {"stride": 0}, "stride"),
    "stride -1": ((I, K), {"stride": (1, -1)}, "stride"),
    "three strides": ((I, K), {"stride": (1, 1, 1)}, "stride"),
    "stride 1.5": ((I, K), {"stride": 1.5}, "stride"),
    "stride None": ((I, K), {"stride": None}, "stride"),
    "dilation 0": ((I, K), {"dilation": 0}, "dilation"),
    "dilation -1": ((I, K), {"dilation": -1}, "dilation"),
    "padding -1": ((I, K), {"padding": -1}, "padding"),
    "padding full": ((I, K), {"padding": "full"}, "padding"),
    "padding same and strided": ((I, K), {"padding": "same", "stride": 2}, "padding"),
    "three paddings": ((I, K), {"padding": (1, 1, 1)}, "padding"),
    "input rank": ((I[0, 0], K), {}, "input"),
    "five dimensions": ((I[None], K), {}, "input"),
    "weight rank": ((I, K[0]), {}, "weight"),
    "weight dtype": ((I, K.double()), {}, "weight"),
    "input dtype": ((I.bfloat16(), K), {}, "weight"),
    "integer weight": ((I, K.int()), {}, "weight"),
    "bias dtype": ((I, K, torch.randn(6).double()), {}, "bias"),
    "bias size": ((I, K, torch.randn(4)), {}, "bias"),
    "bias rank": ((I, K, torch.randn(1, 6)), {}, "bias"),
    "sparse weight": ((I, K.to_sparse()), {}, "weight"),
    "sparse input": ((I.to_sparse(), K), {}, "input"),
    "weight None": ((I, None), {}, "weight"),
    "input list": (([1.0], K), {}, "input"),
    "bias list": ((I, K, [1.0]), {}, "bias"),
    "no kernel": ((I, K[..., :0]), {}, "weight"),
    "no filters": ((I, K[:0]), {}, "weight"),
    "quantized": ((torch.quantize_per_tensor(I, 0.1, 0, torch.quint8), K), {}, "quint8|dtype|quantized"),
}
TRANSPOSED = {
    "channels": ((I, torch.randn(3, 6, 3, 3)), {}, "input"),
    "channels that groups do not divide": ((I, T), {"groups": 3}, "groups"),
    "no size left": ((I[..., :1, :1], T), {"padding": 3}, "input"),
    "output padding past stride and dilation": ((I, T), {"output_padding": 1}, "output_padding"),
    "output padding -1": ((I, T), {"output_padding": -1}, "output_padding"),
    "stride 0": ((I, T), {"stride": 0}, "stride"),
    "padding -1": ((I, T), {"padding": -1}, "padding"),
    "padding same": ((I, T), {"padding": "same"}, "padding"),
    "dilation 0": ((I, T), {"dilation": 0}, "dilation"),
    "bias size": ((I, T, torch.randn(4)), {}, "bias"),
    "input rank": ((I[0, 0], T), {}, "input"),
    "weight dtype": ((I, T.double()), {}, "weight"),
}
CASES.update(
    {
        f"{function}: {name}": (
            functools.partial(getattr(fF, function), **options),
            functools.partial(getattr(F, function), **options),
            arguments,
            named,
        )
        for function, table in (("conv2d", CONVOLUTIONS), ("conv_transpose2d", TRANSPOSED))
        for name, (arguments, options, named) in table.items()
    }
)


#: What torch computes before these versions, which have checks of their own for it: that is the answer then.
CHECKED_SINCE = {"batch_norm: half the statistics": "2.8", "batch_norm: eps -1": "2.10"}


@pytest.mark.parametrize("name", CASES)
def test_bad_arguments(name):
    ours, torchs, arguments, named = CASES[name]
    if torch.__version__ < CHECKED_SINCE.get(name, "0"):
        torch.testing.assert_close(ours(*arguments), torchs(*arguments), rtol=0, atol=0, equal_nan=True)
        return
    with pytest.raises(Exception) as expected:
        torchs(*arguments)
    with pytest.raises(type(expected.value), match=named) as found:
        ours(*arguments)
    assert type(found.value) is type(expected.value)
    assert "fastnn." in str(found.value)


def outs():
    yield "dtype", torch.empty(3, 5, dtype=torch.float64)
    yield "overlap", torch.empty(1, 5).expand(3, 5)
    yield "requires grad", torch.empty(3, 5, requires_grad=True)
    yield "not a tensor", [1.0]
    yield "sparse", torch.zeros(3, 5).to_sparse()


@pytest.mark.parametrize("name", [name for name, _ in outs()])
def test_bad_out(name):
    (out,) = (value for key, value in outs() if key == name)
    for ours, torchs, arguments in (
        (fastnn.mm, torch.mm, (X, W.t())),
        (fastnn.matmul, torch.matmul, (X, W.t())),
        (fastnn.addmm, torch.addmm, (B, X, W.t())),
    ):
        with pytest.raises(Exception) as expected:
            torchs(*arguments, out=out)
        with pytest.raises(type(expected.value), match="out"):
            ours(*arguments, out=out)


def test_out_of_another_shape_is_resized_with_torchs_warning():
    out = torch.zeros(2, 2)
    with pytest.warns(UserWarning, match="An output with one or more elements was resized"):
        fastnn.mm(X, W.t(), out=out)
    torch.testing.assert_close(out, X @ W.t())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastnn.mm(X, W.t(), out=torch.empty(0))


def test_out_that_shares_memory_with_an_input():
    """torch computes something; here the result is right."""
    a, b = torch.randn(6, 6), torch.randn(6, 6)
    for out_of in (lambda a, b: a, lambda a, b: b.t(), lambda a, b: a.t()):
        x, y = a.clone(), b.clone()
        expected = x.double() @ y.double()
        out = out_of(x, y)
        fastnn.mm(x, y, out=out)
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    buffer = torch.randn(8, 6)
    expected = buffer[:6].double() @ b.double()
    fastnn.mm(buffer[:6], b, out=buffer[2:])
    torch.testing.assert_close(buffer[2:].double(), expected, rtol=1e-4, atol=1e-4)


def test_meta_mixed_with_memory():
    """torch's vector product reads the memory that the meta tensor does not have."""
    meta = torch.ones(2, 1, device="meta")
    for call in (
        lambda: fastnn.matmul(torch.ones(2), meta),
        lambda: fastnn.mm(meta, torch.ones(1, 3)),
        lambda: fastnn.addmm(torch.ones(3), torch.ones(2, 2), meta.expand(2, 3)),
    ):
        with pytest.raises(RuntimeError, match="expected one device"):
            call()


def test_out_counts_as_a_change():
    out = torch.zeros(3, 5)
    version = out._version
    fastnn.mm(X, W.t(), out=out)
    assert out._version > version


FALLBACKS = {
    "integers": lambda: (fastnn.mm, torch.mm, (X.long(), W.t().long())),
    "complex": lambda: (fastnn.matmul, torch.matmul, (X.cfloat(), W.t().cfloat())),
    "sparse weight": lambda: (fF.linear, F.linear, (X, W.to_sparse())),
    "sparse input": lambda: (fastnn.mm, torch.mm, (X.to_sparse_csr(), W.t())),
    "vector weight": lambda: (fF.linear, F.linear, (X, W[0])),
    "bias that broadcasts": lambda: (fF.linear, F.linear, (X, W, torch.randn(1))),
    "batch norm of rows": lambda: (bn, torch_bn, (X, ONES, ONES, ONES[None])),
    "integer sigmoid": lambda: (fF.sigmoid, torch.sigmoid, (torch.arange(3),)),
    "complex silu": lambda: (fF.silu, F.silu, (X.cfloat(),)),
    "complex convolution": lambda: (fF.conv2d, F.conv2d, (I.cfloat(), K.cfloat())),
    "integer convolution": lambda: (fF.conv1d, F.conv1d, (I[0].long(), torch.ones(3, 5, 2).long())),
    "subclass": lambda: (fastnn.mm, torch.mm, (X.as_subclass(Mine), W.t())),
}


class Mine(torch.Tensor):
    pass


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("name", FALLBACKS)
def test_what_torch_takes_goes_to_torch_and_is_counted(name):
    ours, torchs, arguments = FALLBACKS[name]()
    _state.reset_fallbacks()
    result, expected = ours(*arguments), torchs(*arguments)
    assert type(result) is type(expected)
    torch.testing.assert_close(result.to_dense(), expected.to_dense(), check_layout=False)
    ((op, reason),) = _state.fallbacks()
    assert op == ours.__name__
    assert reason
    with fastnn.strict(), pytest.raises(fastnn.FallbackError, match="would run in torch"):
        ours(*arguments)


def test_negated_views():
    """A conjugate's imaginary part is negated when it is read, not in memory."""
    z = torch.randn(4, 4, dtype=torch.cfloat)
    x = z.conj().imag
    assert x.is_neg()
    torch.testing.assert_close(fastnn.mm(x, x), x.clone() @ x.clone())
    torch.testing.assert_close(fF.linear(x, x, x[0]), F.linear(x.clone(), x.clone(), x[0].clone()))
    torch.testing.assert_close(fF.gelu(x), F.gelu(x.clone()))
    torch.testing.assert_close(
        fF.conv1d(x, x[..., None], x[0]), F.conv1d(x.clone(), x.clone()[..., None], x[0].clone())
    )
    negative = torch._neg_view(torch.ones(2, 2))
    assert torch.equal(fastnn.mm(negative, torch.eye(2)), -torch.ones(2, 2))
    assert torch.equal(fF.relu(negative), torch.zeros(2, 2))


def test_addmm_bad_scale():
    for name in ("alpha", "beta"):
        with pytest.raises(TypeError):
            torch.addmm(B, X, W.t(), **{name: torch.ones(2)})
        with pytest.raises(TypeError, match=name):
            fastnn.addmm(B, X, W.t(), **{name: torch.ones(2)})


def without_memory():
    """Tensors of an ordinary type that have no memory: the zeros of forward mode, and what escaped a transform."""
    yield torch._efficientzerotensor(3, 4)
    escaped = []
    torch.func.functionalize(lambda x: escaped.append(x) or x)(X.clone())
    yield escaped[0]
    torch.func.vmap(lambda x: escaped.append(x) or x)(torch.randn(2, 3, 4))
    yield escaped[1]


@pytest.mark.parametrize("which", range(3))
def test_tensors_without_memory(which):
    calls = (
        (lambda x: fF.linear(x, W, B), lambda x: F.linear(x, W, B)),
        (lambda x: fastnn.mm(x, W.t()), lambda x: torch.mm(x, W.t())),
        (lambda x: fastnn.mm(W, x.t()), lambda x: torch.mm(W, x.t())),
        (fF.relu, torch.relu),
        (fF.gelu, F.gelu),
        (fF.silu, F.silu),
        (fF.relu6, F.relu6),
        (lambda x: fF.conv1d(x, W[..., None]), lambda x: F.conv1d(x, W[..., None])),
        (lambda x: fF.conv1d(x.t(), x[..., None], B[:3]), lambda x: F.conv1d(x.t(), x[..., None], B[:3])),
    )
    for ours, torchs in calls:
        x = list(without_memory())[which]
        try:
            expected = torchs(x)
        except Exception as error:
            with pytest.raises(type(error)):
                ours(x)
        else:
            torch.testing.assert_close(ours(x) + 0, expected + 0)


def test_gradients_without_memory():
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    result = fF.linear(x, w)
    zeros = torch.autograd.grad(result, (x, w), torch._efficientzerotensor(3, 5))
    assert all(not (z + 0).any() for z in zeros)
    i, k = I.clone().requires_grad_(), K.clone().requires_grad_()
    result = fF.conv2d(i, k)
    zeros = torch.autograd.grad(result, (i, k), torch._efficientzerotensor(result.shape))
    assert all(not (z + 0).any() for z in zeros)
    y = X.clone().requires_grad_()
    (zero,) = torch.autograd.grad(fF.gelu(y), y, torch._efficientzerotensor(3, 4))
    assert not (zero + 0).any()


def test_interruptions_are_not_swallowed():
    class Interrupts(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Interrupts():
        fastnn.mm(X, W.t())


def test_int_mm_bad_arguments():
    a, b = torch.ones(2, 3, dtype=torch.int8), torch.ones(3, 4, dtype=torch.int8)
    with pytest.raises(TypeError, match="b:"):
        fastnn.int_mm(a, None)
    for bad in (
        (a.float(), b),
        (a, b.to(torch.uint8)),
        (a, a),
        (a[0], b),
        (a.to_sparse(), b),
        (a.expand(2, 2, 3), b.expand(3, 3, 4)),
    ):
        with pytest.raises(RuntimeError, match="fastnn"):
            fastnn.int_mm(*bad)
    with pytest.raises(ValueError, match="row_scale"):
        fastnn.int_mm(a, b, row_scale=torch.ones(2))
    with pytest.raises(RuntimeError, match="col_scale"):
        fastnn.int_mm(a, b, out_dtype=torch.float32, col_scale=torch.ones(3))
    with pytest.raises(RuntimeError, match="out_dtype"):
        fastnn.int_mm(a, b, out_dtype=torch.float64)


def test_gelu_bad_approximate():
    with pytest.raises(RuntimeError, match="approximate"):
        fF.gelu(X, approximate="erf")


def test_linear_act_bad_activation():
    with pytest.raises(ValueError, match="activation"):
        fF.linear_act(X, W, B, "swish")


DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.bool, torch.cfloat)
tensors = st.builds(
    lambda shape, dtype, layout: _laid_out(torch.ones(shape, dtype=dtype), layout),
    st.lists(st.integers(0, 4), max_size=4),
    st.sampled_from(DTYPES),
    st.sampled_from(("dense", "transposed", "expanded", "sparse", "meta")),
)
things = st.one_of(tensors, tensors, tensors, tensors, st.sampled_from((None, 1, 2.5, "x", [1.0])))
FUNCTIONS = (
    (fF.linear, F.linear, 3),
    (fF.bilinear, F.bilinear, 4),
    (fastnn.matmul, torch.matmul, 2),
    (fastnn.mm, torch.mm, 2),
    (fastnn.bmm, torch.bmm, 2),
    (fastnn.mv, torch.mv, 2),
    (fastnn.addmm, torch.addmm, 3),
    (fastnn.baddbmm, torch.baddbmm, 3),
    (fF.relu, F.relu, 1),
    (fF.batch_norm, F.batch_norm, 5),
    (
        functools.partial(fF.batch_norm, training=True),
        functools.partial(F.batch_norm, training=True),
        5,
    ),
    (fF.gelu, F.gelu, 1),
    (fF.sigmoid, torch.sigmoid, 1),
)


def _laid_out(x, layout):
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1)
    if layout == "expanded" and x.dim():
        return x[:1].expand(x.shape) if x.shape[0] else x
    if layout == "sparse":
        return x.to_sparse()
    return x.to("meta") if layout == "meta" else x


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(which=st.sampled_from(FUNCTIONS), data=st.data())
def test_anything(which, data):
    """Whatever the arguments: torch's result, or torch's exception type."""
    ours, torchs, count = which
    arguments = [data.draw(things) for _ in range(count)]
    on = {a.is_meta for a in arguments if isinstance(a, torch.Tensor)}
    if len(on) == 2:
        # Mixed with meta tensors torch computes some things, out of memory that is not there, and refuses others.
        with contextlib.suppress(Exception):
            ours(*arguments)
        return
    try:
        expected = torchs(*arguments)
    except Exception as error:
        # Of meta tensors alone torch computes some things and refuses others by no rule.
        if True in on:
            with contextlib.suppress(Exception):
                ours(*arguments)
            return
        with pytest.raises(type(error)):
            ours(*arguments)
        return
    result = ours(*arguments)
    assert (result.shape, result.dtype, result.device, result.layout) == (
        expected.shape,
        expected.dtype,
        expected.device,
        expected.layout,
    )
    if not expected.is_meta:
        torch.testing.assert_close(result.to_dense(), expected.to_dense(), equal_nan=True)


# ---- convolutions ------------------------------------------------------------------------------------------------


def run_both(ours, torchs, tensors, options, transposed=False):
    """Result and gradients of both, or the exception that torch raises, of whose type fastnn's has to be."""
    results = []
    for function in (torchs, ours):
        leaves = [t.detach().requires_grad_() for t in tensors]
        try:
            y = function(*leaves, **options)
            results.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)))
        except Exception as error:
            if function is torchs:
                with pytest.raises(type(error)) as found:
                    ours(*tensors, **options)
                assert type(found.value) is type(error)
                return None
            raise
    return results


@pytest.mark.parametrize(
    ("function", "shapes", "options"),
    [
        ("conv2d", [(0, 3, 5, 6), (4, 3, 3, 3), (4,)], {}),
        ("conv2d", [(0, 4, 5, 6), (4, 2, 3, 3)], {"groups": 2, "stride": 2, "padding": 1}),
        ("conv1d", [(0, 3, 5), (4, 3, 3), (4,)], {"padding": "same"}),
        ("conv3d", [(0, 3, 5, 6, 4), (4, 3, 3, 3, 2)], {}),
        ("conv_transpose1d", [(0, 3, 5), (3, 4, 3), (4,)], {"stride": 2}),
        ("conv_transpose2d", [(0, 3, 5, 6), (3, 4, 3, 3)], {}),
        ("conv2d", [(2, 0, 5, 6), (4, 0, 3, 3)], {}),
        ("conv2d", [(2, 0, 5, 6), (0, 0, 3, 3)], {}),
        ("conv2d", [(2, 3, 0, 6), (4, 3, 3, 3)], {"padding": 2}),
        ("conv2d", [(2, 3, 0, 6), (4, 3, 1, 1), (4,)], {}),
        ("conv1d", [(2, 3, 0), (4, 3, 3)], {"padding": 1}),
        ("conv1d", [(3, 0), (4, 3, 1)], {}),
        ("conv_transpose1d", [(2, 3, 0), (3, 4, 3)], {}),
        ("conv_transpose2d", [(2, 0, 5, 6), (0, 4, 3, 3)], {}),
        ("conv2d", [(2, 3, 5, 6), (4, 3, 0, 3)], {}),
    ],
)
def test_convolutions_of_nothing(function, shapes, options):
    """Empty batches, channels, sizes and filters: torch's result and gradients, or torch's exception."""
    for channels_last in (False, True):
        tensors = [torch.randn(shape) for shape in shapes]
        if channels_last and len(shapes[0]) == 4:
            tensors[:2] = [t.contiguous(memory_format=torch.channels_last) for t in tensors[:2]]
        found = run_both(getattr(fF, function), getattr(F, function), tensors, options)
        if found is not None:
            for theirs, ours in zip(*found, strict=True):
                torch.testing.assert_close(ours, theirs)


def test_an_empty_batch_whose_gradient_lies_oddly():
    """Strides mean nothing where there are no elements."""
    x, w = torch.randn(0, 2, 5, 4).requires_grad_(), torch.randn(3, 2, 3, 2).requires_grad_()
    for layout in (torch.randn(0, 3, 3, 3).permute(0, 1, 3, 2), torch.ones(()).expand(0, 3, 3, 3)):
        by_x, by_w = torch.autograd.grad(fF.conv2d(x, w), (x, w), layout)
        assert by_x.shape == x.shape
        assert torch.equal(by_w, torch.zeros_like(w))


@st.composite
def convolutions(draw):
    """A call that is right, or nearly: name, tensors, options."""
    rank, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    groups = draw(st.sampled_from((1, 1, 1, 2, 3)))
    channels, filters = (draw(st.integers(1, 3)) for _ in range(2))
    sizes = [draw(st.integers(0 if draw(st.integers(0, 9)) == 0 else 1, 7)) for _ in range(rank)]
    kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
    batch = draw(st.sampled_from(([1], [2], [3], [0], [])))

    def numbers(low, high):
        each = [draw(st.integers(low, high)) for _ in range(rank)]
        return draw(st.sampled_from((each, tuple(each), each[0])))

    options = {
        "stride": numbers(0 if draw(st.integers(0, 19)) == 0 else 1, 3),
        "padding": numbers(0, 2),
        "dilation": numbers(1, 2),
        "groups": groups,
    }
    if transposed:
        options["output_padding"] = numbers(0, 2)
    elif draw(st.booleans()):
        options["padding"] = draw(st.sampled_from(("same", "valid")))
    # Now and then a number of channels that does not fit.
    off = draw(st.sampled_from((0,) * 9 + (1,)))
    inputs = groups * channels + off
    shape = (groups * channels, filters) if transposed else (groups * filters, channels)
    x, w = lay_out(draw, (*batch, inputs, *sizes)), lay_out(draw, (*shape, *kernel))
    tensors = [x, w]
    if draw(st.booleans()):
        tensors.append(torch.randint(-2, 3, (groups * filters + draw(st.sampled_from((0,) * 9 + (1,))),)).float())
    return f"conv{'_transpose' if transposed else ''}{rank}d", tensors, options


def lay_out(draw, shape):
    """Small integers, in some order of dimensions, between others, with a stride of 0 or as they come."""
    how = draw(st.sampled_from(("dense", "dense", "permuted", "sliced", "expanded")))
    if how == "permuted":
        order = draw(st.permutations(range(len(shape))))
        return (
            torch.randint(-2, 3, [shape[i] for i in order]).float().permute([order.index(i) for i in range(len(shape))])
        )
    if how == "sliced":
        big = torch.full([2 * size for size in shape], math.nan)
        part = big[tuple(slice(0, 2 * size, 2) for size in shape)]
        return part.copy_(torch.randint(-2, 3, shape))
    if how == "expanded":
        dim = draw(st.integers(0, len(shape) - 1))
        return torch.randint(-2, 3, [1 if d == dim else size for d, size in enumerate(shape)]).float().expand(shape)
    return torch.randint(-2, 3, shape).float()


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(call=convolutions())
def test_any_convolution(call):
    """torch's result and gradients to the bit, which small integers allow, or torch's exception type."""
    name, tensors, options = call
    found = run_both(getattr(fF, name), getattr(F, name), tensors, options)
    if found is None:
        return
    (y, *_), (mine, *_) = found
    assert (mine.shape, mine.dtype) == (y.shape, y.dtype)
    usual = all(t.stride() == torch.empty(t.shape).stride() for t in tensors)
    if y.numel() and (usual or "1d" not in name):
        # Strides, but of dimensions of size 1, which mean nothing. (In one dimension torch asks those of its weight.)
        strides = [[s for s, size in zip(t.stride(), t.shape, strict=True) if size > 1] for t in (mine, y)]
        assert strides[0] == strides[1]
    for theirs, ours in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("transposed", "image", "kernel"), [(True, (1, 1, 1, 1), (1, 2, 2, 1)), (False, (1, 1, 2, 1), (2, 1, 1, 1))]
)
def test_layout_beside_dimensions_of_size_1(transposed, image, kernel):
    """Whether a tensor is channels-last is what torch's kernels say; the Python of torch 2.6 and 2.8 said otherwise."""
    orders = list(itertools.permutations(range(4)))
    for one, other in itertools.product(orders, orders):
        x, w = (
            torch.randn([shape[i] for i in order]).permute([order.index(i) for i in range(4)])
            for shape, order in ((image, one), (kernel, other))
        )
        name = "conv_transpose2d" if transposed else "conv2d"
        y, mine = getattr(F, name)(x, w), getattr(fF, name)(x, w)
        strides = [[s for s, size in zip(t.stride(), t.shape, strict=True) if size > 1] for t in (mine, y)]
        assert strides[0] == strides[1]


@pytest.mark.parametrize("odd", [1.0, True, (1.0, 1), (1, True), 2.5], ids=str)
@pytest.mark.parametrize("option", ["stride", "padding", "dilation", "groups"])
def test_numbers_that_are_equal_to_integers(option, odd):
    """A call with 1 before does not make 1.0 pass, where torch refuses it."""
    x, w = torch.randn(1, 2, 5, 5), torch.randn(2, 2, 3, 3)
    with torch.no_grad():
        fF.conv2d(x, w, **{option: 1})
        try:
            expected = F.conv2d(x, w, **{option: odd})
        except Exception as error:
            with pytest.raises(type(error)):
                fF.conv2d(x, w, **{option: odd})
        else:
            torch.testing.assert_close(fF.conv2d(x, w, **{option: odd}), expected)


Q = torch.randn(5, 2, 8)
HEADS = {"query": Q, "key": Q, "value": Q, "embed_dim_to_check": 8, "num_heads": 2}
HEADS |= {"in_proj_weight": torch.randn(24, 8), "in_proj_bias": None, "bias_k": None, "bias_v": None}
HEADS |= {"add_zero_attn": False, "dropout_p": 0.0, "out_proj_weight": torch.randn(8, 8), "out_proj_bias": None}
LOGITS = {"input": X, "target": torch.tensor([0, 1, 2])}
CODES = {"input": X, "weight": torch.zeros(5, 4, dtype=torch.int8), "weight_scale": torch.ones(5)}
IMAGES = {"input": torch.randn(2, 4, 3, 3), "running_mean": torch.zeros(4), "running_var": ONES}


@pytest.mark.parametrize(
    ("function", "arguments", "name", "value"),
    [
        *((fF.multi_head_attention_forward, HEADS, name, 3) for name in ("query", "key", "value", "static_k")),
        *((fF.multi_head_attention_forward, HEADS, name, [True]) for name in ("attn_mask", "key_padding_mask")),
        (fF.multi_head_attention_forward, HEADS, "num_heads", None),
        (fF.cross_entropy, LOGITS, "reduction", ["mean"]),
        (fF.softmax, {"input": X, "dim": 1}, "dtype", ["float32"]),
        (fF.softmin, {"dim": 1}, "input", None),
        (fF.int8_linear, CODES, "activation", ["relu"]),
        (fF.batch_norm_act, IMAGES, "residual", 1.5),
    ],
)
def test_values_of_the_wrong_kind_are_named(function, arguments, name, value):
    with pytest.raises((TypeError, ValueError, AssertionError), match=name):
        function(**{**arguments, name: value})
