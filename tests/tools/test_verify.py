"""The equivalence suite passes what is right and names what is wrong."""

import dataclasses
import json
import math

import pytest
import torch

from fastnn import testing
from fastnn.testing import Case, Maker, Sample, verify
from fastnn.testing.inputs import LAYOUTS, VALUES


def failing(function, op="mm", dtypes=(torch.float32,), **options):
    report = verify(function, op, dtypes=dtypes, **{"out": False, "gradients": False, **options})
    assert not report.passed
    assert report.findings
    return " ".join(map(str, report.findings))


@pytest.fixture(autouse=True)
def one_thread():
    """Many tiny calls: a second thread costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Not matmul: torch's own writes between the elements of a strided out= for a vector times a matrix.
@pytest.mark.parametrize("name", ["mm", "baddbmm", "linear", "linear_act", "bilinear", "gelu", "relu", "int_mm"])
def test_torch_itself_passes(name):
    case = testing.case(name)
    dtype = torch.bfloat16 if torch.bfloat16 in case.dtypes else case.dtypes[0]
    verify(case.peer, case, dtypes=[case.dtypes[0], dtype]).raise_if_failed()


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", [f"conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3)])
def test_convolutions_pass_and_wrong_ones_do_not(name):
    case = testing.case(name)
    verify(case.resolve(), case, dtypes=[torch.float32]).raise_if_failed()

    def hurried(x, w, b=None, **options):
        return case.peer(x.bfloat16(), w.bfloat16(), None if b is None else b.bfloat16(), **options).to(x.dtype)

    def undilated(x, w, b=None, **options):
        result = case.peer(x, w, b, **options)
        if options.get("dilation", 1) > 1 and result.numel():
            result[(-1,) * result.dim()] += w.reshape(-1)[-1] + 1
        return result

    assert "bfloat16" in failing(hurried, name)
    assert "dilation=2" in failing(undilated, name)


def bf16_accumulation(a, b):
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.bfloat16)
    for k in range(a.shape[1]):
        total += a[:, k : k + 1].bfloat16() * b[k : k + 1].bfloat16()
    return total.to(a.dtype)


def tf32(a, b):
    def rounded(x):
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    return rounded(a) @ rounded(b)


def two_bf16_parts(a, b):
    def split(x):
        high = x.bfloat16().float()
        return high, (x - high).bfloat16().float()

    if not (a.isfinite().all() and b.isfinite().all()):
        return a @ b
    (ah, al), (bh, bl) = split(a), split(b)
    return ah @ bh + ah @ bl + al @ bh


@pytest.mark.parametrize(
    "wrong,named", [(bf16_accumulation, "bfloat16"), (tf32, "TF32"), (two_bf16_parts, "two bfloat16 parts")]
)
def test_a_lower_precision_is_named(wrong, named):
    report = verify(wrong, "mm", dtypes=[torch.float32], out=False, gradients=False)
    normal = [finding for finding in report.findings if finding.values == "normal"]
    assert any("root-mean-square" in finding.problem and named in finding.problem for finding in normal)


def test_a_bfloat16_sum_in_bfloat16_is_found():
    assert "bfloat16" in failing(bf16_accumulation, dtypes=(torch.bfloat16,))


def test_lowered_precision_is_allowed_when_asked_for():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert verify(two_bf16_parts, "mm", dtypes=[torch.float32], out=False, gradients=False)
        assert not verify(bf16_accumulation, "mm", dtypes=[torch.float32], out=False, gradients=False)
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_wrong_index_is_found():
    def wrong(a, b):
        result = a @ b
        if result.shape[0] > 16:
            # One row too far, at a tile's edge; its values are as large as the right ones.
            result[16] = result[15]
        return result

    assert "not exact" in failing(wrong)


def test_a_small_wrong_index_is_found_by_integers():
    def wrong(a, b):
        result = a @ b
        if result.numel() > 40 and a.isfinite().all():
            result.view(-1)[40] += 1e-6 * result.abs().max()
        return result

    assert "integer" in failing(wrong)


def test_a_nan_leak_is_found():
    def wrong(a, b):
        # Reads one element past the end of a: poison.
        result = a @ b
        if a.numel() and result.numel() and a.is_contiguous():
            after = torch.as_strided(a, (1,), (1,), a.storage_offset() + a.numel())
            result[-1, -1] += 0 * after[0]
        return result

    assert "nan" in failing(wrong)


def test_a_missing_tail_is_found():
    def wrong(a, b):
        result = a @ b
        result[:, result.shape[1] - result.shape[1] % 16 :] = 0
        return result

    assert failing(wrong)


def test_a_wrong_stride_is_found():
    def wrong(a, b):
        return torch.as_strided(a, a.shape, (a.shape[1], 1), a.storage_offset()) @ b if a.stride(1) != 1 else a @ b

    text = failing(wrong)
    assert "transposed" in text and "contiguous," not in text


def test_infinities_must_stay():
    assert "special" in failing(lambda a, b: (a @ b).nan_to_num())
    # An infinity split into a sum of parts gives NaN where float32 gives infinity.
    assert "special" in failing(lambda a, b: (a - 0.5 * a) @ b + (0.5 * a) @ b * 1 + 0 * (a @ b))


def test_changed_inputs_and_results_that_vary_are_found():
    def overwrites(a, b):
        result = a @ b
        a.mul_(1.0).add_(1.0)
        return result

    assert "was changed" in failing(overwrites)
    calls = iter(range(10**9))
    assert "different bits" in failing(lambda a, b: a @ b * (1 + 1e-7 * next(calls)))


def test_wrong_shape_and_dtype_are_found():
    assert "shape" in failing(lambda a, b: (a @ b).T)
    assert "dtype" in failing(lambda a, b: (a @ b).double())


def test_out_is_judged():
    def ignores(a, b, *, out=None):
        return a @ b

    def past_the_end(a, b, *, out=None):
        result = torch.mm(a, b, out=out)
        if out is not None and out.is_contiguous() and out.numel():
            torch.as_strided(out, (1,), (1,), out.storage_offset() + out.numel())[0] = 0
        return result

    assert "did not return" in failing(ignores, out=True)
    assert "outside" in failing(past_the_end, out=True)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return (grad.bfloat16() @ b.T.bfloat16()).to(a.dtype), a.T @ grad


def test_gradients_are_judged():
    assert "gradient" in failing(WrongGradient.apply, gradients=True)
    assert "missing" in failing(lambda a, b: a @ b.detach(), gradients=True)


def test_a_case_of_ones_own():
    cube = Case(
        name="cube",
        peer=lambda x: x * x * x,
        samples=lambda make: (Sample((make(n),)) for n in (1, 17, 31)),
        magnitude=lambda result, x: result.abs(),
        depth=lambda x: 2,
        product=False,
    )
    assert verify(lambda x: x**3, cube, dtypes=[torch.float32, torch.float64])
    assert not verify(lambda x: x * x, cube, dtypes=[torch.float32])
    with pytest.raises(ValueError, match="names no function"):
        cube.resolve()


def quantized(x, scale, zero_point=None, *, whole=torch.round, **options):
    """testing.integers.quantize with another rounding and in float64."""
    y = whole(testing.integers._places(x.double(), scale.double(), **options))
    shift = testing.integers._along(zero_point, x, options["axis"], options["group_size"])
    return (y + shift).clamp(*testing.integers._ENDS[options["dtype"]]).to(options["dtype"])


def test_integers_may_differ_at_ties_alone():
    verify(quantized, "quantize", dtypes=[torch.float32]).raise_if_failed()
    for whole in (lambda y: (y + 0.5).floor(), lambda y: y.sign() * (y.abs() + 0.5).floor()):
        wrong = failing(lambda *args, whole=whole, **options: quantized(*args, whole=whole, **options), "quantize")
        assert "integer values" in wrong and "not exact" in wrong
        assert "normal values" not in wrong
    wrong = failing(lambda *args, **options: quantized(*args, whole=torch.trunc, **options), "quantize")
    assert "normal values" in wrong and "inf times the error bound" in wrong
    assert "error bound" in failing(
        lambda x, scale, *rest, **options: quantized(x, scale.bfloat16(), *rest, **options), "quantize"
    )


def test_ties_are_ties_only_where_a_case_says_so():
    """The middles between multiples of 0.1 among others, by a quotient instead of a product with the inverse."""

    def middles(make):
        x = torch.cat(((torch.arange(-100, 100) + 0.5) * 0.1, torch.linspace(-9, 9, 2003)))
        yield Sample((x, torch.tensor(0.1)), {"dtype": torch.int8, "axis": None, "group_size": None})

    def divided(x, scale, dtype, **options):
        return (x / scale).round().clamp(-128, 127).to(dtype)

    case = dataclasses.replace(testing.case("quantize"), samples=middles, exact=False, peer=quantized)
    assert verify(divided, case, dtypes=[torch.float32])
    assert "inf times the error bound" in failing(divided, dataclasses.replace(case, ties=None))
    assert "error bound" in failing(lambda *args, **options: divided(*args, **options) + 2, case)


def test_layers_of_integers_are_judged():
    case = testing.case("int8_linear")
    verify(case.resolve(), case, dtypes=[torch.float32, torch.bfloat16]).raise_if_failed()

    def saturating(x, weight, *rest, **options):
        """As if the products of two bytes were added up in 16 bits."""
        return case.peer(x, weight.clamp(-64, 63), *rest, **options)

    def symmetric(x, *rest, input_scale=None, **options):
        """A scale of the wrong formula, by a part in 255."""
        return case.peer(x * 0.996 if input_scale is None else x, *rest, input_scale=input_scale, **options)

    assert "error bound" in failing(saturating, "int8_linear")
    assert "error bound" in failing(symmetric, "int8_linear")
    assert "gradient" in failing(
        lambda x, *rest, **options: case.peer(x.detach(), *rest, **options), "int8_linear", gradients=True
    )


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions_of_integers_are_judged(rank):
    case = testing.case(f"int8_conv{rank}d")
    verify(case.resolve(), case, dtypes=[torch.float32]).raise_if_failed()

    def zeros_around(x, *rest, input_zero_point, padding=0, **options):
        """A padding of zeros where it is the zero point that means 0."""
        padded = torch.nn.functional.pad(x, (padding, padding) * rank)
        return case.peer(padded, *rest, input_zero_point=input_zero_point, padding=0, **options)

    assert "not exact" in failing(zeros_around, case.name)


def test_reports_are_json_without_nan():
    report = verify(bf16_accumulation, "mm", dtypes=[torch.float32], out=False, gradients=False)
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert json.loads(text)["passed"] is False
    with pytest.raises(AssertionError, match="mm:"):
        report.raise_if_failed()


def test_unknown_and_repeated_names():
    with pytest.raises(KeyError, match="no case named 'mn'"):
        testing.case("mn")
    with pytest.raises(ValueError, match="exists already"):
        testing.register(testing.case("mm"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("values", VALUES)
def test_inputs_are_surrounded_by_poison(values, layout):
    tensor = Maker(torch.float32, values, layout, seed=1)(3, 5, 7, reduced=-1)
    assert tensor.shape == (3, 5, 7)
    whole = torch.empty(0).set_(tensor.untyped_storage())
    used = torch.zeros(whole.numel(), dtype=torch.bool)
    torch.as_strided(used, tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    assert whole[~used].isnan().all()
    assert used[:64].sum() == 0 and used[-64:].sum() == 0
    if values != "special":
        assert tensor.isfinite().all()


def test_cancelling_values_cancel():
    make = Maker(torch.float64, "cancelling", "contiguous")
    a, b = make(5, 100, reduced=-1), make(100, 7, reduced=-2)
    assert ((a @ b).abs() < 1e-2 * (a.abs() @ b.abs())).all()


# ---- models ------------------------------------------------------------------------------------------------------


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 33), torch.nn.Dropout(0.5), torch.nn.ReLU(), torch.nn.Linear(33, 3))


class Hurried(torch.nn.Linear):
    def forward(self, x):
        return torch.nn.functional.linear(x.bfloat16(), self.weight.bfloat16(), self.bias.bfloat16()).to(x.dtype)


def test_verify_model_passes_the_same_and_names_the_different():
    one, two = model(), model()
    x = torch.randn(9, 16, requires_grad=True)
    report = testing.verify_model(one, two, x)
    assert report.passed and len(report.compared) == 6
    assert {each.name for each in report.compared} >= {"output", "gradient of 0.weight", "gradient of input 0"}
    assert x.grad is None and next(one.parameters()).grad is None
    two[0].__class__ = Hurried
    report = testing.verify_model(one, two, x)
    assert not report and "bfloat16" in report.verdict
    json.dumps(report.to_dict(), allow_nan=False)


def test_verify_model_refuses_other_weights():
    one, two = model(), model()
    with torch.no_grad():
        two[0].bias.add_(1)
    with pytest.raises(ValueError, match=r"0\.bias has different values"):
        testing.verify_model(one, two, torch.randn(2, 16))
    with pytest.raises(ValueError, match="in one model only"):
        testing.verify_model(one, one[0], torch.randn(2, 16))


def test_verify_model_is_nan_safe():
    class Leaks(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * torch.tensor([math.nan] + [1.0] * (self.out_features - 1))

    one, two = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    two.load_state_dict(one.state_dict())
    two.__class__ = Leaks
    report = testing.verify_model(one, two, torch.randn(2, 3))
    assert not report and math.isinf(report.compared[0].error)
