"""`prepack_`: when the packed weight is used, and all the ways in which it must not be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fastnn
from fastnn.backends import cpu
from fastnn.ops import packed_linear

from .closeness import assert_as_near_as_torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _small_layers_count(monkeypatch):
    monkeypatch.setattr(packed_linear, "LEAST_WORK", 0)


@pytest.fixture
def packed_calls(monkeypatch):
    """The number of calls answered from a packed weight."""
    seen = []
    original = packed_linear.PackedWeight.linear

    def spy(self, *arguments):
        output = original(self, *arguments)
        if output is not None:
            seen.append(self)
        return output

    monkeypatch.setattr(packed_linear.PackedWeight, "linear", spy)
    return seen


def layer(prepacked=True, dtype=torch.float32, bias=True):
    made = fastnn.convert(nn.Linear(65, 33, bias=bias, dtype=dtype))
    return fastnn.prepack_(made) if prepacked else made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(65,), (1, 65), (7, 65), (200, 65), (0, 65), (2, 3, 5, 65)])
def test_gives_the_layers_answer(dtype, bias, shape, packed_calls):
    model = layer(dtype=dtype, bias=bias)
    plain = fastnn.revert(copy.deepcopy(model))
    exact = copy.deepcopy(plain).double()
    x = torch.randn(shape, dtype=dtype)
    turned = x.movedim(-1, 0).contiguous().movedim(0, -1)
    with torch.no_grad():
        for value in (x, x[..., :1].expand(shape), turned):
            output = model(value)
            assert_as_near_as_torch(output, plain(value), exact(value.double()))
            assert output.is_contiguous()
    assert len(packed_calls) == (3 if x.numel() >= packed_linear.FEWEST_ROWS * 65 else 0)


def test_nothing_is_packed_unless_asked_for():
    model = fastnn.convert(nn.Linear(4, 4))
    with torch.no_grad():
        model(torch.ones(2, 4))
    assert "_packed_weight" not in model.__dict__


def test_not_used_for_small_products(packed_calls, monkeypatch):
    monkeypatch.setattr(packed_linear, "LEAST_WORK", 1 << 20)
    model = layer()
    with torch.no_grad():
        model(torch.randn(487, 65))
        assert packed_calls == []
        model(torch.randn(489, 65))
    assert len(packed_calls) == 1


def test_not_used_where_a_gradient_is_needed(packed_calls):
    model = layer()
    x = torch.randn(25, 65)
    model(x).sum().backward()
    assert model.weight.grad is not None
    assert packed_calls == []
    model.requires_grad_(False)
    assert not model(x).requires_grad
    assert len(packed_calls) == 1
    x.requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
    assert len(packed_calls) == 1
    with torch.inference_mode():
        model(x)
    assert len(packed_calls) == 2


def in_place(model):
    with torch.no_grad():
        model.weight.mul_(2)


def row_in_place(model):
    with torch.no_grad():
        model.weight[3] = 7


def in_inference_mode(model):
    with torch.inference_mode():
        model.weight.add_(1)


def loaded(model):
    model.load_state_dict({"weight": torch.randn(33, 65), "bias": torch.randn(33)})


def loaded_assigned(model):
    model.load_state_dict({"weight": torch.randn(33, 65), "bias": torch.randn(33)}, assign=True)


def data_assigned(model):
    model.weight.data = torch.randn(33, 65)


def data_emptied_and_assigned(model):
    # The allocator may well hand out the same address again.
    model.weight.data = torch.empty(0)
    model.weight.data = torch.randn(33, 65)


def optimizer_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(torch.randn(4, 65)).square().sum().backward()
    optimizer.step()
    model.zero_grad()


def fused_optimizer_step(model):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5, fused=True)
    model(torch.randn(4, 65)).square().sum().backward()
    optimizer.step()
    model.zero_grad()


def swapped(model):
    model.weight = nn.Parameter(torch.randn(33, 65))


def swapped_tensors(model):
    torch.utils.swap_tensors(model.weight, nn.Parameter(torch.randn(33, 65)))


def initialized(model):
    nn.init.normal_(model.weight)


def vector_to_parameters(model):
    count = sum(p.numel() for p in model.parameters())
    nn.utils.vector_to_parameters(torch.randn(count), model.parameters())


def whole_model_update(model):
    torch._foreach_mul_([p.detach() for p in model.parameters()], 3.0)


def data_copied(model):
    model.weight.data.copy_(torch.randn(33, 65))


def data_row(model):
    model.weight.data[3] = 7


def numpy_written(model):
    model.weight.detach().numpy()[:] = 3


SEEN = (
    in_place, row_in_place, in_inference_mode, loaded, loaded_assigned, data_assigned,
    data_emptied_and_assigned, optimizer_step, fused_optimizer_step, swapped, swapped_tensors, initialized,
    vector_to_parameters, whole_model_update,
)  # fmt: skip
NOT_SEEN = (data_copied, data_row, numpy_written)


@pytest.mark.parametrize("change", SEEN + NOT_SEEN, ids=lambda f: f.__name__)
@pytest.mark.parametrize("prepacked", [False, True])
def test_changes_of_the_weight(change, prepacked, packed_calls):
    model = layer(prepacked)
    x = torch.randn(19, 65)
    with torch.no_grad():
        before = model(x)
    assert len(packed_calls) == prepacked
    change(model)
    with torch.no_grad():
        expected = nn.functional.linear(x, model.weight, model.bias)
        assert not torch.allclose(before, expected)
        output = model(x)
    # A row of sevens makes sums that cancel; what a stale weight gives is far outside of this.
    near = {"rtol": 1e-4, "atol": 1e-4}
    if change in SEEN or not prepacked:
        torch.testing.assert_close(output, expected, **near)
        assert "_packed_weight" not in model.__dict__
    else:
        # As the docstring says: these change no version counter, and another call of prepack_ is needed.
        assert "_packed_weight" in model.__dict__
    fastnn.prepack_(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), nn.functional.linear(x, model.weight, model.bias), **near)


def test_changes_of_the_bias_need_nothing(packed_calls):
    model = layer()
    x = torch.randn(19, 65)
    model.bias.data.fill_(3)
    with torch.no_grad():
        torch.testing.assert_close(model(x), nn.functional.linear(x, model.weight, model.bias))
        model.bias = None
        torch.testing.assert_close(model(x), nn.functional.linear(x, model.weight))
    assert len(packed_calls) == 2


@pytest.mark.parametrize("move", [lambda m: m.double(), lambda m: m.bfloat16(), lambda m: m.to("meta")])
def test_moves_of_the_model(move, packed_calls):
    model = move(layer())
    with torch.no_grad():
        x = torch.randn(23, 65).to(model.weight)
        output = model(x)
        if not output.is_meta:
            torch.testing.assert_close(output, nn.functional.linear(x, model.weight, model.bias))
    assert packed_calls == []
    assert "_packed_weight" not in model.__dict__


def test_rests_under_another_precision(packed_calls):
    model = layer()
    x = torch.randn(19, 65)
    before = torch.get_float32_matmul_precision()
    with torch.no_grad():
        try:
            torch.set_float32_matmul_precision("medium" if before == "highest" else "highest")
            model(x)
        finally:
            torch.set_float32_matmul_precision(before)
        assert packed_calls == []
        model(x)
    assert len(packed_calls) == 1


def test_rests_under_another_instruction_set(packed_calls):
    model = layer()
    x = torch.randn(19, 65)
    active = cpu.isa()
    with torch.no_grad():
        expected = model(x)
        for name in cpu.available_isas():
            del packed_calls[:]
            cpu.set_isa(name)
            try:
                torch.testing.assert_close(model(x), expected)
                assert len(packed_calls) == (name == active)
                again = fastnn.prepack_(copy.deepcopy(model))
                torch.testing.assert_close(again(x), expected)
            finally:
                cpu.set_isa(active)


def test_rests_under_autocast_other_backends_and_transforms(packed_calls):
    model = layer()
    x = torch.randn(19, 65)
    with torch.no_grad():
        expected = nn.functional.linear(x, model.weight, model.bias)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
        with fastnn.backend("reference"):
            torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(torch.func.vmap(model)(x), expected)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert model(mode.from_tensor(x)).shape == (19, 33)
        traced = torch.jit.trace(model, x, check_trace=False)
        torch.testing.assert_close(traced(x[:3]), expected[:3])
        graph = torch.fx.experimental.proxy_tensor.make_fx(model)(x)
        torch.testing.assert_close(graph(x * 2), nn.functional.linear(x * 2, model.weight, model.bias))
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
        assert packed_calls == []
        with fastnn.backend("cpu"):
            torch.testing.assert_close(model(x), expected)
        with fastnn.batch_invariant():
            whole = model(x)
            assert torch.equal(model(x[4:5]), whole[4:5])
        assert len(packed_calls) == 3


def test_functional_call_uses_the_given_weight(packed_calls):
    model = layer()
    x = torch.randn(19, 65)
    state = {"weight": torch.randn(33, 65), "bias": torch.randn(33)}
    with torch.no_grad():
        output = torch.func.functional_call(model, state, (x,))
    torch.testing.assert_close(output, nn.functional.linear(x, **state))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, torch.finfo(torch.float32).max])
@pytest.mark.parametrize("where", ["input", "weight"])
def test_extreme_values(value, where, packed_calls):
    model = layer(False)
    x = torch.randn(19, 65)
    with torch.no_grad():
        (x if where == "input" else model.weight)[3, 5] = value
        fastnn.prepack_(model)
        expected = nn.functional.linear(x, model.weight, model.bias)
        torch.testing.assert_close(model(x), expected, equal_nan=True)
    assert len(packed_calls) == 1


def test_tied_weights_and_shared_layers(packed_calls):
    first, second = layer(False), layer(False)
    second.weight = first.weight
    model = fastnn.prepack_(nn.ModuleList([first, second, first]))
    x = torch.randn(24, 65)
    with torch.no_grad():
        torch.testing.assert_close(model[1](x), nn.functional.linear(x, first.weight, second.bias))
        first.weight.zero_()
        assert torch.equal(model[1](x), second.bias.expand(24, 33))
        assert torch.equal(model[2](x), first.bias.expand(24, 33))


def test_bad_input_gives_the_layers_own_error():
    ours, theirs = layer(), nn.Linear(65, 33)
    for bad in (torch.ones(3, 64), torch.ones(3, 65, dtype=torch.float64), torch.tensor(1.0), "x", None):
        with pytest.raises(Exception) as expected, torch.no_grad():
            theirs(bad)
        with pytest.raises(expected.type), torch.no_grad():
            ours(bad)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3)), "no fastnn linear layer"),
        (lambda: fastnn.nn.Linear(3, 3, device="meta"), "on meta"),
        (lambda: fastnn.nn.Linear(3, 0), "empty"),
        (lambda: fastnn.nn.Linear(3, 3, dtype=torch.complex64), "complex64"),
        (lambda: prune.random_unstructured(fastnn.nn.Linear(3, 3), "weight", 0.5), "at each call"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_warns_when_there_is_nothing_to_pack(build, match):
    with pytest.warns(UserWarning, match=match):
        fastnn.prepack_(build())


def test_inference_tensors_are_not_packed():
    with torch.inference_mode():
        model = fastnn.nn.Linear(3, 3)
    with pytest.warns(UserWarning, match="inference tensor"):
        fastnn.prepack_(model)


def test_report_and_revert_drop_it():
    model = nn.Sequential(layer(), nn.ReLU())
    assert fastnn.report(model).rows[0].prepacked
    assert "weight prepacked" in str(fastnn.report(model))
    fastnn.revert(model)
    assert "_packed_weight" not in model[0].__dict__
    assert not fastnn.report(fastnn.convert(model)).rows[0].prepacked


def test_many_threads(packed_calls):
    from concurrent.futures import ThreadPoolExecutor

    model = layer()
    x = torch.randn(32, 65)
    with torch.no_grad():
        expected = model(x)

    def call(_):
        with torch.no_grad():
            return model(x)

    with ThreadPoolExecutor(16) as pool:
        assert all(torch.equal(output, expected) for output in pool.map(call, range(200)))


@pytest.fixture
def sums(monkeypatch):
    """The results of packed layers with a residual in the same call, None where it was not."""
    seen = []
    original = packed_linear.PackedWeight.linear_add

    def spy(self, *arguments):
        seen.append(original(self, *arguments))
        return seen[-1]

    monkeypatch.setattr(packed_linear.PackedWeight, "linear_add", spy)
    return seen


@pytest.mark.skipif(not cpu.has_table, reason="torch before 2.10 has no table of DLPack's")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16, 65), (200, 65), (2, 3, 5, 65)])
def test_residual_in_the_same_call(dtype, bias, shape, sums):
    model = layer(dtype=dtype, bias=bias)
    plain = fastnn.revert(copy.deepcopy(model))
    x, residual = torch.randn(shape, dtype=dtype), torch.randn(*shape[:-1], 33, dtype=dtype)
    padded = torch.full((*shape[:-1], 40), torch.nan, dtype=dtype)
    padded[..., 3:36] = residual
    turned = residual.movedim(-1, 0).contiguous().movedim(0, -1)
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(x.double()) + residual.double()
        for value in (residual, padded[..., 3:36], turned):
            before = value.clone()
            output = model.forward_add(x, value)
            assert_as_near_as_torch(output, plain(x) + value, exact)
            assert output.is_contiguous() and torch.equal(value, before)
    assert len(sums) == 3 and all(output is not None for output in sums)


def test_residual_apart_where_the_packed_weight_is_of_no_use(sums):
    model = layer()
    x = torch.randn(19, 65)
    expected = model(x) + 1
    with torch.no_grad():
        # Broadcast, of another dtype, and of few rows.
        torch.testing.assert_close(model.forward_add(x, torch.ones(33)), expected)
        torch.testing.assert_close(model.forward_add(x, torch.ones(19, 33).double()), expected.double())
        torch.testing.assert_close(model.forward_add(x[:3], torch.ones(3, 33)), expected[:3])
    with pytest.raises(RuntimeError, match="must match the size"), torch.no_grad():
        model.forward_add(x, torch.ones(18, 33))
    residual = torch.ones(19, 33, requires_grad=True)
    model.forward_add(x, residual).sum().backward()
    assert torch.equal(residual.grad, torch.ones(19, 33)) and model.weight.grad is not None
    with torch.no_grad():
        model.weight.mul_(2)
        torch.testing.assert_close(model.forward_add(x, torch.ones(19, 33)), model(x) + 1)
    assert all(output is None for output in sums)
