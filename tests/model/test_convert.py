"""`convert`, `report` and `revert`."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fastnn
from fastnn.convert import REPLACEMENTS, ConversionError


class Plain(nn.Linear):
    pass


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Scaled(nn.Module):
    """A module with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.inner = nn.Linear(3, 3)

    def forward(self, x):
        return self.scale * self.inner(x)


class Squared(nn.Module):
    """A module without parameters and children."""

    def forward(self, x):
        return x * x


class Conv1D(nn.Module):
    """The layer of Hugging Face transformers (pytorch_utils.py, Apache-2.0), as GPT-2 has it."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.nx = nx
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.02)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        size_out = (*x.size()[:-1], self.nf)
        x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return x.view(size_out)


def network():
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Sequential(nn.Linear(16, 16), nn.GELU()), nn.Dropout(0.1), nn.Linear(16, 4)
    )


def classes(model):
    return [type(module) for module in model.modules()]


def test_replaces_the_class_and_nothing_else():
    model = network().eval()
    x = torch.randn(5, 8)
    expected = model(x)
    before = {name: id(p) for name, p in model.named_parameters()}
    modules = [id(m) for m in model.modules()]
    assert fastnn.convert(model) is model
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert [id(m) for m in model.modules()] == modules
    assert type(model[0]) is fastnn.nn.Linear
    assert isinstance(model[0], nn.Linear)
    assert type(model[2]) is nn.Sequential
    torch.testing.assert_close(model(x), expected)


def test_every_class_of_the_table_goes_there_and_back():
    norms = dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), (3,))
    norms |= dict.fromkeys((nn.LayerNorm, nn.RMSNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), (3,))
    norms[nn.GroupNorm] = (1, 2)
    arguments = {nn.Linear: (3, 4), nn.Bilinear: (3, 4, 5), nn.Embedding: (3, 4), **norms}
    arguments |= {kind: (3, 4, 2) for kind in REPLACEMENTS if issubclass(kind, nn.modules.conv._ConvNd)}
    arguments |= {nn.MultiheadAttention: (4, 2), nn.modules.linear.NonDynamicallyQuantizableLinear: (3, 4)}
    arguments |= {kind: (4, 2, 4) for kind in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)}
    arguments |= {nn.Transformer: (4, 2, 1, 1, 4)}
    arguments |= {nn.TransformerEncoder: (nn.TransformerEncoderLayer(4, 2, 4, batch_first=True), 1)}
    arguments |= {nn.TransformerDecoder: (nn.TransformerDecoderLayer(4, 2, 4), 1)}
    if hasattr(nn, "LinearCrossEntropyLoss"):
        arguments[nn.LinearCrossEntropyLoss] = (3, 4)
    for original, fast in REPLACEMENTS.items():
        assert issubclass(fast, original)
        layer = original(*arguments.get(original, (2,) if "Pool" in original.__name__ else ()))
        assert type(fastnn.convert(layer)) is fast
        assert type(fastnn.revert(layer)) is original


def test_convert_is_idempotent_and_revert_undoes_it():
    model = network()
    before = classes(model)
    state = set(model[0].__dict__)
    fastnn.convert(fastnn.convert(model))
    assert classes(model) != before
    fastnn.prepack_(model)
    fastnn.revert(fastnn.revert(model))
    assert classes(model) == before
    assert set(model[0].__dict__) == state


def test_only_and_skip_by_name_class_and_predicate():
    def converted(**arguments):
        model = fastnn.convert(network(), **arguments)
        return [name for name, m in model.named_modules() if type(m).__module__.startswith("fastnn")]

    assert converted() == ["0", "1", "2.0", "2.1", "3", "4"]
    assert converted(only="2") == ["2.0", "2.1"]
    assert converted(only="2.*") == ["2.0", "2.1"]
    assert converted(only=["0", "4"]) == ["0", "4"]
    assert converted(only=nn.Linear) == ["0", "2.0", "4"]
    assert converted(only=nn.Linear, skip="4") == ["0", "2.0"]
    assert converted(skip="2") == ["0", "1", "3", "4"]
    assert converted(skip=[nn.GELU, nn.ReLU]) == ["0", "2.0", "3", "4"]
    assert converted(only=lambda name, m: getattr(m, "out_features", 0) == 16) == ["0", "2.0"]
    assert converted(skip=(n for n in ("0", "1"))) == ["2.0", "2.1", "3", "4"]
    assert converted(only=[]) == []


def test_a_name_that_meets_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"only='encoder\.\*' matches the name of no module"):
        fastnn.convert(network(), only="encoder.*")
    with pytest.raises(ValueError, match="skip="):
        fastnn.convert(network(), skip=["0", "9"])


@pytest.mark.parametrize("bad", [3, [3], int])
def test_a_selection_of_the_wrong_type_is_an_error(bad):
    with pytest.raises(TypeError, match="only"):
        fastnn.convert(network(), only=bad)


@pytest.mark.parametrize("function", ["convert", "revert", "report", "prepack_"])
def test_no_module_is_an_error(function):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got Tensor"):
        getattr(fastnn, function)(torch.ones(1))


def test_strict_names_all_that_cannot_be_replaced_and_changes_nothing():
    model = nn.Sequential(network(), nn.PReLU(), Scaled(), nn.LSTM(2, 2))
    before = classes(model)
    with pytest.raises(ConversionError) as caught:
        fastnn.convert(model, strict=True)
    assert [row.name for row in caught.value.rows] == ["1", "2", "3"]
    assert "fastnn has no PReLU" in str(caught.value)
    assert classes(model) == before
    fastnn.convert(model, strict=True, skip=["1", "2", "3"])
    assert type(model[0][0]) is fastnn.nn.Linear
    fastnn.convert(network(), strict=True)


REASONS = {
    "subclass": (lambda: Plain(3, 3), "subclass of torch.nn.Linear (only exact types"),
    "override": (lambda: Doubled(3, 3), "with a forward of its own"),
    "lazy": (lambda: nn.LazyLinear(3), "becomes Linear on its first call"),
    "lazy convolution": (lambda: nn.LazyConv2d(3, 3), "becomes Conv2d on its first call"),
    "lazy norm": (lambda: nn.LazyInstanceNorm1d(), "becomes InstanceNorm1d on its first call"),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(Doubled(3, 3)),
        "register_parametrization",
    ),
    "parametrized complex": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3, dtype=torch.complex64)),
        "complex64 parameters",
    ),
    "scripted": (lambda: torch.jit.script(nn.Linear(3, 3)), "TorchScript"),
    "own parameters": (Scaled, "does not know what it computes with its parameters"),
    "own computation": (Squared, "does not know what it computes"),
    "no such layer": (lambda: nn.PReLU(), "fastnn has no PReLU"),
    "synchronized": (lambda: nn.SyncBatchNorm(3), "fastnn has no SyncBatchNorm"),
    "complex": (lambda: nn.Linear(3, 3, dtype=torch.complex64), "complex64 parameters"),
    "encoder layer of a subclass": (
        lambda: type("MyLayer", (nn.TransformerEncoderLayer,), {})(4, 2, 4),
        "torch runs its layers as one call",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REASONS)
def test_what_is_not_replaced_has_a_reason(case):
    build, reason = REASONS[case]
    model = nn.Sequential(build())
    kind = type(model[0])
    fastnn.convert(model)
    assert type(model[0]) is kind
    rows = fastnn.report(model).rows
    assert rows[0].status == "kept"
    assert reason in rows[0].reason
    with pytest.raises(ConversionError, match="0: "):
        fastnn.convert(model, strict=True)


@pytest.mark.filterwarnings("ignore")
def test_a_quantized_module_has_a_reason():
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear})
    fastnn.convert(model)
    (row,) = (row for row in fastnn.report(model).rows if row.name == "0")
    assert (row.status, row.reason) == ("kept", "quantized module")


def test_a_forward_on_the_instance_has_a_reason():
    layer = nn.Linear(3, 3)
    original = layer.forward
    layer.forward = lambda x: original(x)
    fastnn.convert(layer)
    assert type(layer) is nn.Linear
    assert "set on the instance" in fastnn.report(layer).rows[0].reason


def test_a_lazy_layer_converts_after_its_first_call():
    model = nn.Sequential(nn.LazyLinear(3), nn.ReLU())
    x = torch.randn(2, 5)
    fastnn.convert(model)
    expected = model(x)
    assert fastnn.report(model).rows[0].status == "available"
    fastnn.convert(model)
    assert type(model[0]) is fastnn.nn.Linear
    torch.testing.assert_close(model(x), expected)


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="circular"),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding="same", groups=8),
        nn.ConvTranspose2d(8, 4, 2, stride=2),
    )


def test_convolutions_are_reported_converted_and_reverted(no_fallback):
    model = convolutions()
    x = torch.randn(2, 3, 8, 6)
    expected, state = model(x), model.state_dict()
    assert [row.status for row in fastnn.report(model).rows] == ["available"] * 4
    fastnn.convert(model, strict=True)
    rows = fastnn.report(model).rows
    assert [row.replacement for row in rows] == [f"fastnn.nn.{type(layer).__name__}" for layer in model]
    assert all(row.status == "replaced" for row in rows)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    y = last(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected)
    assert {name: t.data_ptr() for name, t in model.state_dict().items()} == {n: t.data_ptr() for n, t in state.items()}
    fastnn.revert(model)
    assert classes(model) == classes(convolutions())


def test_report_before_and_after():
    fastnn._state.reset_fallbacks()  # the report lists them
    model = nn.Sequential(network(), nn.LSTM(4, 4))
    before = fastnn.report(model)
    assert [row.status for row in before.rows] == ["available"] * 6 + ["kept"]
    assert "fastnn runs 0 of 7 modules" in str(before)
    fastnn.convert(model)
    after = fastnn.report(model)
    assert [row.name for row in after.replaced] == ["0.0", "0.1", "0.2.0", "0.2.1", "0.3", "0.4"]
    assert [row.name for row in after.not_replaced] == ["1"]
    assert after.replaced[0].kind == "torch.nn.Linear"
    assert after.replaced[0].replacement == "fastnn.nn.Linear"
    assert sum(row.parameters for row in after.rows) == sum(p.numel() for p in model.parameters())
    text = str(after)
    assert "fastnn runs 6 of 7 modules" in text
    assert "fastnn has no LSTM" in text
    assert str(fastnn.report(nn.Sequential())) == "fastnn runs 0 of 0 modules"


def test_report_counts_what_fell_back():
    layer = fastnn.nn.Linear(2, 2, dtype=torch.complex64)
    layer(torch.ones(2, dtype=torch.complex64))
    report = fastnn.report(layer)
    assert any(op == "linear" and "complex64" in reason for op, reason in report.fallbacks)
    assert "calls that went to torch" in str(report)
    assert "runs on torch: complex64 parameters" in str(report)


def test_a_transformer_layer_runs_as_fastnn_where_torch_has_a_fast_path():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(2, 3, 8)
    model.eval()
    with torch.no_grad():
        expected = model(x)
    assert fastnn.report(model).rows[0].status == "available"
    fastnn.convert(model)
    rows = {row.name: row for row in fastnn.report(model).rows}
    assert rows["(model)"].replacement == "fastnn.nn.TransformerEncoderLayer"
    assert rows["self_attn.out_proj"].status == "replaced"
    assert rows["linear1"].status == "replaced"
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x), expected)


def test_a_layer_around_others_with_a_forward_of_its_own_needs_no_replacing():
    class Mine(nn.TransformerEncoderLayer):
        def forward(self, src):
            return self.linear2(self.linear1(src))

    model = fastnn.convert(Mine(8, 2, 16))
    assert type(model) is Mine
    assert all(row.name != "(model)" for row in fastnn.report(model).rows)
    assert isinstance(model.linear1, fastnn.nn.Linear)


def test_a_shared_module_is_replaced_once_and_reported_with_all_its_names():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU())})
    fastnn.convert(model)
    assert model["a"] is model["b"][0]
    rows = fastnn.report(model).rows
    assert [row.name for row in rows] == ["a, b.0", "b.1"]
    fastnn.revert(model)
    assert type(model["a"]) is nn.Linear
    fastnn.convert(model, skip="a")
    assert type(shared) is nn.Linear


def test_tied_parameters_stay_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    fastnn.convert(model)
    model(torch.randn(2, 4)).sum().backward()
    assert model[0].weight is model[1].weight
    assert copy.deepcopy(model)[0].weight.shape == (4, 4)


def test_hooks_go_on_running():
    model = network().eval()
    seen = []
    model[0].register_forward_pre_hook(lambda m, a: seen.append("before"))
    model[0].register_forward_hook(lambda m, a, out: seen.append("after") or out * 2)
    model[0].register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    x = torch.randn(3, 8)
    expected = model(x)
    del seen[:]
    fastnn.convert(model)
    output = model(x)
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    assert seen == ["before", "after", "backward"]


def test_state_dict_keys_and_loading_both_ways():
    ours, theirs = fastnn.convert(network()), network()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict(), assign=True)
    assert torch.equal(ours[0].weight, theirs[0].weight)
    with pytest.raises(RuntimeError, match="size mismatch"):
        ours.load_state_dict(nn.Sequential(nn.Linear(3, 3)).state_dict(), strict=False)


@pytest.mark.parametrize("prepacked", [False, True])
def test_copies(prepacked):
    model = fastnn.convert(network()).eval()
    if prepacked:
        fastnn.prepack_(model)
    x = torch.randn(5, 8)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        expected = model(x)
        for other in (
            copy.deepcopy(model),
            copy.copy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(file, weights_only=False),
        ):
            assert classes(other) == classes(model)
            torch.testing.assert_close(other(x), expected)
    other = copy.deepcopy(model)
    assert not any(row.prepacked for row in fastnn.report(other).rows)
    assert fastnn.revert(other)[0].__class__ is nn.Linear
    assert type(model[0]) is fastnn.nn.Linear


def test_old_style_weight_norm_and_pruning_work():
    x = torch.randn(3, 4)
    with pytest.warns(FutureWarning):
        normed = nn.utils.weight_norm(nn.Linear(4, 5))
    pruned = prune.l1_unstructured(nn.Linear(4, 5), "weight", 0.5)
    spectral = nn.utils.spectral_norm(nn.Linear(4, 5)).eval()
    for layer in (normed, pruned, spectral):
        expected = layer(x)
        fastnn.convert(layer)
        fastnn.prepack_(layer)
        assert type(layer) is fastnn.nn.Linear
        torch.testing.assert_close(layer(x), expected)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected.detach())


def test_parametrizing_a_converted_layer_and_reverting_it():
    layer = fastnn.convert(nn.Linear(4, 5))
    x = torch.randn(3, 4)
    nn.utils.parametrizations.weight_norm(layer)
    assert fastnn.report(layer).rows[0].status == "replaced"
    expected = layer(x)
    fastnn.revert(layer)
    assert nn.utils.parametrize.is_parametrized(layer)
    assert not isinstance(layer, fastnn.nn.Linear)
    torch.testing.assert_close(layer(x), expected)
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("normed", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 5), lambda: nn.Conv1d(3, 4, 3, padding=1)])
def test_a_parametrized_layer_converts_and_reverts(normed, make, no_fallback):
    """Such layers come out of constructors: wav2vec 2.0, vocoders, discriminators."""
    theirs = nn.Sequential(getattr(nn.utils.parametrizations, normed)(make())).eval()
    ours = fastnn.convert(fastnn.convert(copy.deepcopy(theirs)))
    row = next(row for row in fastnn.report(ours).rows if row.name == "0")
    assert (row.status, row.reason) == ("replaced", "")
    x = torch.randn(2, 3, 3)
    for model in (ours, copy.deepcopy(ours)):
        assert isinstance(model[0], type(make())) and isinstance(model[0], REPLACEMENTS[type(make())])
        torch.testing.assert_close(model(x), theirs(x))
        gradients = [torch.autograd.grad(m(x).square().sum(), m.parameters()) for m in (model, theirs)]
        torch.testing.assert_close(*gradients)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert type(fastnn.revert(model)[0]).__bases__ == (type(make()),)
    torch.testing.assert_close(model(x), theirs(x))
    nn.utils.parametrize.remove_parametrizations(ours[0], "weight")
    assert type(ours[0]) is REPLACEMENTS[type(make())]


def test_users_subclass_of_a_fast_layer_is_left_alone():
    class Mine(fastnn.nn.Linear):
        pass

    layer = fastnn.revert(Mine(3, 3))
    assert type(layer) is Mine


@pytest.mark.filterwarnings("ignore")
def test_tracing_and_scripting():
    model = fastnn.convert(network()).eval()
    x = torch.randn(5, 8)
    expected = model(x)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)
    # TorchScript compiles Python source and knows nothing of kernels: it gets the reverted model.
    with pytest.raises(Exception, match=r"(?s)."):
        torch.jit.script(model)
    torch.testing.assert_close(torch.jit.script(fastnn.revert(model))(x), expected)


def test_functional_call_and_fx():
    model = fastnn.convert(network()).eval()
    x = torch.randn(3, 8)
    state = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    assert not torch.func.functional_call(model, state, (x,)).any()
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), model(x))


@pytest.fixture
def transformers(monkeypatch):
    """A package of that name, so that classes can come from it without installing it."""
    package = types.ModuleType("transformers")
    module = types.ModuleType("transformers.pytorch_utils")
    made = type("Conv1D", Conv1D.__bases__, dict(vars(Conv1D)))
    made.__module__ = "transformers.pytorch_utils"
    made.__qualname__ = "Conv1D"
    # The zero-argument super() in its constructor still names the class above.
    made.__init__ = lambda self, nf, nx: (
        nn.Module.__init__(self),
        setattr(self, "nf", nf),
        setattr(self, "nx", nx),
        setattr(self, "weight", nn.Parameter(torch.randn(nx, nf))),
        setattr(self, "bias", nn.Parameter(torch.randn(nf))),
    )[0]
    module.Conv1D = made
    package.pytorch_utils = module
    monkeypatch.setitem(sys.modules, "transformers", package)
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", module)
    return package


@pytest.mark.parametrize("prepacked", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_conv1d(own, prepacked, transformers, no_fallback):
    cls = Conv1D if own else transformers.pytorch_utils.Conv1D
    model = nn.Sequential(cls(12, 7))
    x = torch.randn(2, 5, 7)
    expected = model(x)
    expected.sum().backward()
    gradient = model[0].weight.grad.clone()
    model.zero_grad()
    fastnn.convert(model, strict=True)
    if prepacked:
        fastnn.prepack_(model)
        assert fastnn.report(model).rows[0].prepacked
    assert isinstance(model[0], cls)
    assert type(model[0]) is type(fastnn.convert(cls(3, 2)))
    output = model(x)
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    torch.testing.assert_close(model[0].weight.grad, gradient)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model(x.transpose(0, 1)), expected.transpose(0, 1))
        torch.testing.assert_close(model(x[0, 0]), expected[0, 0])
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(other[0]) is type(model[0])
            torch.testing.assert_close(other(x), expected)
    assert fastnn.report(model).rows[0].replacement == "fastnn.nn.Conv1D"
    fastnn.revert(model)
    assert type(model[0]) is cls


def test_another_class_named_conv1d_is_not_taken_for_it():
    class Other(Conv1D.__base__):
        def __init__(self):
            super().__init__()
            self.nf = 4
            self.weight = nn.Parameter(torch.randn(3, 4))
            self.bias = nn.Parameter(torch.randn(4))

        def forward(self, x):
            return torch.relu(torch.addmm(self.bias, x, self.weight))

    Other.__name__ = "Conv1D"
    layer = Other()
    state = torch.get_rng_state()
    fastnn.convert(layer)
    assert type(layer) is Other
    assert torch.equal(torch.get_rng_state(), state)


def test_meta_and_fake_models_convert():
    with torch.device("meta"):
        model = network()
    fastnn.convert(model)
    assert model(torch.empty(3, 8, device="meta")).shape == (3, 4)
    with torch._subclasses.FakeTensorMode():
        model = fastnn.convert(network())
        assert model(torch.empty(3, 8)).shape == (3, 4)
