"""Rounding by what the weights do: against the quadratic form computed in float64, and exhaustive search where that is possible."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

import fastnn
from fastnn import quant
from fastnn.quant.adaround import Moments, search_scale

T, nn = torch.nn, fastnn.nn


def problem(rows, columns, groups=1, samples=None):
    """A weight, correlated inputs and their moment in float64."""
    torch.manual_seed(rows * columns)
    weight = torch.randn(rows, columns, dtype=torch.float64)
    x = torch.randn(groups, samples or 3 * columns + 5, columns, dtype=torch.float64)
    x = x @ torch.randn(groups, columns, columns, dtype=torch.float64) + torch.rand(columns, dtype=torch.float64)
    return weight, x.mT @ x


def damped(moment, damping=0.01):
    return moment + damping * moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * torch.eye(moment.shape[-1])


def loss(q, weight, moment, scale, zero_point=0):
    difference = ((q.double() - zero_point) * scale - weight).unflatten(0, (moment.shape[0], -1))
    return ((difference @ damped(moment)) * difference).sum((0, 2)).flatten()


def nearest(weight, scale, zero_point, least, most):
    return ((weight / scale).round() + zero_point).clamp(least, most)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 64), (11, 65), (17, 131)])
@pytest.mark.parametrize(("least", "most"), [(-8, 7), (0, 15)])
def test_no_single_weight_can_be_rounded_better(shape, least, most):
    weight, moment = problem(*shape)
    scale = (weight.amax(1) - weight.amin(1)).clamp(min=0.1).unsqueeze(1) / 15
    zero = torch.zeros_like(scale) if least < 0 else (-weight.amin(1, keepdim=True) / scale).round().clamp(0, 15)
    q = quant.round_weights(weight, moment[0], scale, zero, quant_min=least, quant_max=most)
    assert q.dtype == torch.int32
    assert q.min() >= least
    assert q.max() <= most
    rough = nearest(weight, scale, zero, least, most)
    reached = loss(q, weight, moment, scale, zero)
    assert reached.sum() <= loss(rough, weight, moment, scale, zero).sum() * (1 + 1e-12)
    for step in (-1, 1):
        for column in range(shape[1]):
            other = q.clone()
            other[:, column] = (other[:, column] + step).clamp(least, most)
            assert (loss(other, weight, moment, scale, zero) >= reached * (1 - 1e-9)).all()


def test_near_the_best_of_all():
    """Of 3⁷ combinations of the integers around, for 40 rows."""
    weight, moment = problem(40, 7)
    scale = torch.full((40, 1), 0.5, dtype=torch.float64)
    q = quant.round_weights(weight, moment, scale, quant_min=-8, quant_max=7)
    floor = (weight / scale).round()
    steps = torch.tensor(list(itertools.product((-1, 0, 1), repeat=7)), dtype=torch.float64)
    all_losses = torch.stack([loss(floor + step, weight, moment, scale) for step in steps])
    best = all_losses.amin(0)
    ours = loss(q, weight, moment, scale)
    rough = loss(floor, weight, moment, scale)
    # Measured: 1.04 times the best, and 1.83 times by rounding to the nearest.
    assert ours.sum() < 1.1 * best.sum()
    assert rough.sum() > 1.5 * best.sum()


def test_groups_are_problems_of_their_own():
    weight, moment = problem(12, 9, groups=3)
    scale = weight.abs().amax(1, keepdim=True) / 7
    q = quant.round_weights(weight, moment, scale, quant_min=-8, quant_max=7)
    for g, part in enumerate(weight.split(4)):
        alone = quant.round_weights(part, moment[g], scale[4 * g : 4 * g + 4], quant_min=-8, quant_max=7)
        assert torch.equal(q[4 * g : 4 * g + 4], alone)


def test_uncorrelated_inputs_round_to_the_nearest():
    weight = torch.randn(6, 30)
    scale = torch.rand(6, 30) + 0.1
    q = quant.round_weights(weight, torch.diag(torch.rand(30) + 0.1), scale, quant_min=-8, quant_max=7)
    assert torch.equal(q.double(), nearest(weight.double(), scale.double(), 0, -8, 7))


@pytest.mark.parametrize(
    "moment", [torch.zeros(30, 30), torch.ones(30, 30), -1e-9 * torch.eye(30) + torch.ones(30, 30)]
)
def test_moments_that_have_no_inverse(moment):
    weight = torch.randn(6, 30)
    q = quant.round_weights(weight, moment, torch.full((6, 1), 0.3), quant_min=-8, quant_max=7, damping=0.0)
    if not moment.any():
        assert torch.equal(q.float(), nearest(weight, torch.tensor(0.3), 0, -8, 7))
    assert (
        loss(q, weight.double(), moment.double().unsqueeze(0), 0.3).sum()
        <= loss(nearest(weight, 0.3, 0, -8, 7), weight.double(), moment.double().unsqueeze(0), 0.3).sum()
    )


def test_any_layout_and_no_size():
    weight, moment = problem(5, 8)
    scale = weight.abs().amax(1, keepdim=True) / 7
    q = quant.round_weights(weight, moment, scale, quant_min=-8, quant_max=7)
    assert torch.equal(quant.round_weights(weight.t().contiguous().t(), moment.mT, scale, quant_min=-8, quant_max=7), q)
    assert quant.round_weights(weight[:0], moment, scale[:0], quant_min=-8, quant_max=7).shape == (0, 8)
    empty = quant.round_weights(torch.empty(3, 0), torch.empty(0, 0), torch.ones(3, 1), quant_min=-8, quant_max=7)
    assert empty.shape == (3, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moment": torch.eye(7)}, "moment must be"),
        ({"moment": torch.eye(8).repeat(2, 1, 1)}, "moment must be"),
        ({"moment": torch.full((8, 8), torch.nan)}, "not finite"),
        ({"quant_min": 8}, "quant_min"),
        ({"damping": -1.0}, "damping"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"moment": torch.eye(8), "quant_min": -8, "quant_max": 7} | change
    with pytest.raises(ValueError, match=message):
        quant.round_weights(torch.randn(5, 8), arguments.pop("moment"), torch.ones(5, 1), **arguments)


# ---- moments -----------------------------------------------------------------------------------------------------

CONVOLUTIONS = [
    (T.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (3, 4, 9, 8)),
    (nn.Conv2d(6, 6, 3, groups=6, padding="same", padding_mode="circular"), (2, 6, 7, 5)),
    (nn.Conv2d(6, 4, 2, groups=2), (6, 7, 5)),
    (nn.Conv1d(4, 6, 5, stride=3, padding=2), (3, 4, 19)),
    (T.Conv1d(4, 6, 3, groups=2, padding_mode="reflect", padding=1), (4, 19)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS)
def test_moment_of_a_convolution(layer, shape):
    """w H wᵀ is the sum of all results squared."""
    x = torch.randn(shape)
    moments = Moments()
    hook = layer.register_forward_hook(moments, with_kwargs=True)
    with torch.no_grad():
        layer.bias.zero_()
        y = layer(x)
        layer(input=x)
    hook.remove()
    weight = layer.weight.detach().double().flatten(1).unflatten(0, (layer.groups, -1))
    found = ((weight @ moments.total) * weight).sum(2).flatten()
    dim = y.dim() - len(layer.kernel_size) - 1
    expected = 2 * y.double().square().movedim(dim, 0).flatten(1).sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_moment_of_a_linear_layer():
    layer, x = nn.Linear(5, 3), torch.randn(2, 7, 5)
    moments = Moments()
    moments(layer, (x,), {}, None)
    rows = x.double().flatten(0, 1)
    torch.testing.assert_close(moments.total, (rows.t() @ rows).unsqueeze(0), rtol=1e-5, atol=1e-5)


# ---- scales ------------------------------------------------------------------------------------------------------


def test_search_scale_against_all_of_them():
    torch.manual_seed(0)
    weight = torch.randn(6, 40) ** 3
    scale = weight.view(6, 5, 8).abs().amax(2) / 7
    found = search_scale(weight, scale, None, quant_min=-8, quant_max=7)
    for row, run in itertools.product(range(6), range(5)):
        part = weight.view(6, 5, 8)[row, run].double()
        tried = [scale[row, run].double() * (1 - step / 100) for step in range(61)]
        errors = [((part / s).round().clamp(-8, 7) * s - part).square().sum() for s in tried]
        s = found[row, run].double()
        assert ((part / s).round().clamp(-8, 7) * s - part).square().sum() <= min(errors) * (1 + 1e-4)


# ---- quantize_ ---------------------------------------------------------------------------------------------------


def trained_like():
    """Layers whose inputs are correlated, as those of a trained model are."""
    torch.manual_seed(0)
    model = fastnn.nn.MLP(24, [64, 64], 10)
    data = [torch.randn(100, 6) @ torch.randn(6, 24) + 0.3 for _ in range(3)]
    return model, data


def results_lost(model, data, config, rounding):
    rough = copy.deepcopy(model)
    quant.quantize_(rough, config, rounding=rounding, calibration_data=data if rounding == "adaround" else None)
    x = torch.cat(data)
    with torch.no_grad():
        return ((rough(x) - model(x)).norm() / model(x).norm()).item(), rough


@pytest.mark.parametrize(
    "config",
    [
        quant.Int4WeightOnly(8),
        quant.Int4WeightOnly(None),
        quant.Int4WeightOnly(8, symmetric=False),
        quant.Int8Dynamic(),
    ],
)
def test_adaround_loses_less(config):
    model, data = trained_like()
    nearest_lost, _ = results_lost(model, data, config, "nearest")
    lost, rough = results_lost(model, data, config, "adaround")
    # Int8Dynamic's inputs are rounded as well.
    assert lost < (1.05 if isinstance(config, quant.Int8Dynamic) else 0.6) * nearest_lost
    layer = rough[0]
    difference = layer.dequantized_weight() - model[0].weight
    assert layer.weight_error == pytest.approx((difference.norm() / model[0].weight.norm()).item(), rel=1e-5)
    again = copy.deepcopy(model)
    quant.quantize_(again, config)
    again.load_state_dict(rough.state_dict())
    assert torch.equal(again(data[0]), rough(data[0]))


@pytest.mark.parametrize("group_size", [None, 8])
def test_mse_has_the_smaller_error(group_size):
    model, data = trained_like()
    _, rough = results_lost(model, data, quant.Int4WeightOnly(group_size), "nearest")
    _, better = results_lost(model, data, quant.Int4WeightOnly(group_size), "mse")
    for index in (0, 2, 4):
        assert better[index].weight_error < 0.97 * rough[index].weight_error


def test_one_by_one_is_the_same(monkeypatch):
    model, data = trained_like()
    _, expected = results_lost(model, data, quant.Int4WeightOnly(8), "adaround")
    monkeypatch.setattr(quant.quantize, "_MOMENTS", 0)
    _, found = results_lost(model, data, quant.Int4WeightOnly(8), "adaround")
    assert all(
        torch.equal(a, b) for a, b in zip(expected.state_dict().values(), found.state_dict().values(), strict=True)
    )


def test_attention_and_static():
    torch.manual_seed(0)
    model = fastnn.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    data = [torch.randn(5, 7, 16) for _ in range(2)]
    reference = copy.deepcopy(model)
    quant.quantize_(model, quant.Int8Static(data), rounding="adaround")
    with torch.no_grad():
        assert F.mse_loss(model(data[0]), reference(data[0])) < 1e-3


@pytest.mark.parametrize(
    ("config", "options", "error", "message"),
    [
        (quant.Int4WeightOnly(8), {"rounding": "up"}, ValueError, "rounding must be"),
        (quant.Int4WeightOnly(8), {"rounding": "adaround"}, ValueError, "needs calibration_data"),
        (quant.Int4WeightOnly(8), {"rounding": "adaround", "calibration_data": []}, ValueError, "an input at least"),
        (quant.Int4WeightOnly(8), {"rounding": "adaround", "calibration_data": 3}, TypeError, "must be an iterable"),
        (quant.Int4WeightOnly(8), {"calibration_data": [1]}, ValueError, "is for rounding='adaround'"),
        (quant.Float8WeightOnly(), {"rounding": "mse"}, ValueError, "is for integers"),
        (quant.Int4WeightOnly(8), {"rounding": "adaround", "calibration_data": torch.zeros(2, 3)}, RuntimeError, None),
        (
            quant.Int4WeightOnly(8),
            {"rounding": "adaround", "calibration_data": torch.full((2, 24), torch.nan)},
            ValueError,
            "not finite",
        ),
    ],
)
def test_bad_rounding_changes_nothing(config, options, error, message):
    model, _ = trained_like()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        quant.quantize_(model, config, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(model[0], nn.Linear)
    assert not model[0]._forward_hooks


def test_a_layer_that_is_not_called():
    class Half(T.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = T.Linear(8, 8), T.Linear(8, 8)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(ValueError, match="unused was not called"):
        quant.quantize_(Half(), quant.Int4WeightOnly(8), rounding="adaround", calibration_data=torch.randn(9, 8))
