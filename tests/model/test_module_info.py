"""torch's own conformance samples for modules (ModuleInfo), as its test_modules.py runs them."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
import statistics
import warnings

import pytest
import torch
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.testing._internal.common_modules import (
    FunctionInput,
    ModuleInfo,
    ModuleInput,
    module_db,
    module_inputs_torch_nn_Linear,
    module_inputs_torch_nn_TransformerDecoderLayer,
)

import fastnn
from fastnn.convert import _AROUND_OTHERS as AROUND_OTHERS
from fastnn.convert import REPLACEMENTS
from fastnn.testing.errors import relative_error, roundoff

from .closeness import assert_as_near_as_torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def decoder_inputs(module_info, device, dtype, requires_grad, training, **kwargs):
    """Samples of a stack, which torch has none of: those of its layers."""
    inputs = module_inputs_torch_nn_TransformerDecoderLayer(None, device, dtype, requires_grad, training)
    for layer in inputs:
        build = layer.constructor_input
        made = torch.nn.TransformerDecoderLayer(*build.args, **build.kwargs, device=device, dtype=dtype)
        yield ModuleInput(constructor_input=FunctionInput(made, 2), forward_input=layer.forward_input)


EXTRA = [
    ModuleInfo(torch.nn.TransformerDecoder, module_inputs_func=decoder_inputs),
    ModuleInfo(NonDynamicallyQuantizableLinear, module_inputs_func=module_inputs_torch_nn_Linear),
]
INFOS = {info.module_cls: info for info in [*module_db, *EXTRA] if info.module_cls in REPLACEMENTS}
#: Layers that torch has no samples for: what dropout gives is random (tests/ops/test_dropout.py).
WITHOUT_SAMPLES = {torch.nn.Dropout}
INFOS_AND_NAMES = [pytest.param(info, id=cls.__name__) for cls, info in INFOS.items()]

#: Some of these go through a dozen roundings, a few of which cancel: the gradient of a key's bias is 0.
DEEP = (torch.nn.MultiheadAttention, *AROUND_OTHERS)
INSTANCE_NORMS = (torch.nn.InstanceNorm1d, torch.nn.InstanceNorm2d, torch.nn.InstanceNorm3d)

each_module = pytest.mark.parametrize("info", INFOS_AND_NAMES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
each_mode = pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))


def torchs_samples(info, dtype=torch.float32, *, training=True, requires_grad=False):
    found = list(
        info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training)
    )
    # Of the dozens that transformers have, and the hundreds of losses, every n-th: n is odd, so that all values of every
    # argument are among them.
    return found[:: len(found) // 8 | 1 if info.module_cls in DEEP else 7 if len(found) > 200 else 1]


def samples(info, dtype, *, training=True, requires_grad=True):
    """Pairs of torch's module and fastnn's with the same parameters, and the arguments to call them with."""
    # torch makes its samples in float32 and float64; the half precisions are those rounded.
    if info.module_cls is torch.nn.AvgPool3d and dtype.itemsize == 2:
        return  # torch has no kernel to compare with; test_opinfo.py compares with float64
    made = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    for sample in torchs_samples(info, made, training=training, requires_grad=requires_grad):
        build = sample.constructor_input
        theirs = info.module_cls(*build.args, **build.kwargs).to(dtype).train(training)
        # A stack of layers gets fastnn's.
        args = [fastnn.convert(copy.deepcopy(a)) if isinstance(a, torch.nn.Module) else a for a in build.args]
        ours = REPLACEMENTS[info.module_cls](*args, **build.kwargs).to(dtype).train(training)
        ours.load_state_dict(theirs.state_dict())
        call = sample.forward_input
        # torch's sample for Linear with a bias names its input, and masks have names.
        values = [*call.args, *call.kwargs.values()]
        yield theirs, ours, [cast(value, dtype) for value in values], list(call.kwargs)


def cancellation(module, results):
    """How much larger than the gradient of an instance norm's weight the terms are of which it is the sum."""
    output, _, weight_grad = (result.detach() for result in results[:3])
    terms = (output_gradient(output) * output).abs()  # the weight is 1 and there is no bias yet
    channel = output.dim() - module._get_no_batch_dim()
    return (terms.movedim(channel, 0).flatten(1).sum(1).norm() / weight_grad.norm()).item()


def is_floating(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def cast(value, dtype):
    """Numbers in another dtype; masks, indices and None as they are."""
    return value.detach().to(dtype) if is_floating(value) else value


def output_gradient(output):
    values = torch.linspace(-1, 1, max(output.numel(), 1), dtype=torch.float64)[: output.numel()]
    return values.reshape(output.shape).to(output.dtype)


def run(module, values, names, *, requires_grad):
    values = [value.clone().requires_grad_(requires_grad) if is_floating(value) else value for value in values]
    module.zero_grad(set_to_none=True)
    positional = values[: len(values) - len(names)]
    named = dict(zip(names, values[len(positional) :], strict=True))
    output = module(*positional, **named)
    # A pool may give the indices of its maxima too, attention its weights.
    results = [result for result in output if result is not None] if isinstance(output, tuple) else [output]
    output = results[0]
    if requires_grad:
        output.backward(output_gradient(output))
        results += [value.grad for value in values if is_floating(value)]
        results += [parameter.grad for parameter in module.parameters()]
    results += [buffer.clone() for buffer in module.buffers()]
    return results


def test_every_replaced_class_has_samples():
    assert set(INFOS) == set(REPLACEMENTS) - WITHOUT_SAMPLES


@each_module
@each_dtype
@each_mode
def test_forward_and_gradients(info, dtype, training, no_fallback):
    deep = info.module_cls in DEEP
    errors = []
    for theirs, ours, values, names in samples(info, dtype, training=training):
        exact = copy.deepcopy(theirs).double()
        wide = [cast(value, torch.float64) for value in values]
        for requires_grad in (True, False):
            with torch.set_grad_enabled(requires_grad):
                got = run(ours, values, names, requires_grad=requires_grad)
                expected = run(theirs, values, names, requires_grad=requires_grad)
                truth = run(exact, wide, names, requires_grad=requires_grad)
            roundoffs = [64.0 if deep else 4.0] * len(truth)
            if requires_grad and dtype == torch.float32 and isinstance(theirs, INSTANCE_NORMS) and theirs.affine:
                roundoffs[2] += cancellation(theirs, truth)  # one of each term
            for one, other, reference, allowed in zip(got, expected, truth, roundoffs, strict=True):
                assert one.stride() == other.stride()
                assert one.requires_grad == other.requires_grad
                if not one.is_floating_point():
                    assert torch.equal(one, other)
                    continue
                if not (deep and dtype.itemsize == 2):
                    assert_as_near_as_torch(one, other, reference, roundoffs=allowed)
                errors.append((relative_error(one, reference), relative_error(other, reference)))
    if deep and dtype != torch.float64:
        # One result of a dozen roundings may be far off by chance, in torch as here (where a relu's input is rounded to the
        # other side of 0, a gradient is another one); half of all are not.
        ours_median, torchs_median = (statistics.median(which) for which in zip(*errors, strict=True))
        assert ours_median <= 1.5 * torchs_median + 0.25 * roundoff(dtype)


@each_module
@each_dtype
def test_non_contiguous_inputs(info, dtype):
    for theirs, ours, values, names in samples(info, dtype):
        # Every second element of a larger tensor, at an odd offset.
        spread = []
        for value in values:
            if not is_floating(value):
                spread.append(value)
                continue
            holder = torch.full((value.numel() * 2 + 1,), torch.nan, dtype=dtype)
            strided = holder[1::2].view(value.shape) if value.dim() < 2 else None
            if strided is None:
                strided = holder[1:].as_strided(value.shape, [2 * s for s in value.stride()])
            strided.copy_(value)
            spread.append(strided)
        with torch.no_grad():
            positional = spread[: len(spread) - len(names)]
            named = dict(zip(names, spread[len(positional) :], strict=True))
            got = ours(*positional, **named)
            got = got[0] if isinstance(got, tuple) else got
            wide = [cast(value, torch.float64) for value in values]
            truth = run(copy.deepcopy(theirs).double(), wide, names, requires_grad=False)[0]
            expected = run(theirs, values, names, requires_grad=False)[0]
        assert_as_near_as_torch(got, expected, truth)


@each_module
@each_dtype
def test_factory_arguments(info, dtype):
    if "dtype" not in inspect.signature(info.module_cls).parameters:
        return
    for sample in torchs_samples(info):
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        kwargs = {name: value for name, value in kwargs.items() if name not in ("device", "dtype")}
        cls = REPLACEMENTS[info.module_cls]
        assert all(p.dtype == dtype for p in cls(*args, **kwargs, dtype=dtype).parameters())
        assert all(p.is_meta for p in cls(*args, **kwargs, device="meta").parameters())
        with torch.device("meta"):
            assert all(p.is_meta for p in cls(*args, **kwargs).parameters())


@each_module
def test_repr_pickle_state_dict_and_deepcopy(info):
    for theirs, ours, values, names in samples(info, torch.float32):
        assert repr(theirs) == repr(ours)
        expected = run(ours, values, names, requires_grad=False)[0]
        saved = io.BytesIO()
        torch.save(ours, saved)
        saved.seek(0)
        copies = [
            pickle.loads(pickle.dumps(ours)),
            copy.deepcopy(ours),
            torch.load(saved, weights_only=False),
        ]
        for other in copies:
            assert type(other) is type(ours)
            result = run(other, values, names, requires_grad=False)[0]
            torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
        theirs.load_state_dict(ours.state_dict())
        assert list(theirs.state_dict()) == list(ours.state_dict())


@each_module
def test_inplace_layers_write_their_input(info):
    for _, _, values, _ in samples(info, torch.float32):
        try:
            layer = REPLACEMENTS[info.module_cls](inplace=True)
        except TypeError:
            return  # no such argument, as in torch
        value = values[0].clone()
        with torch.no_grad():
            assert layer(value) is value
        expected = info.module_cls()(values[0])
        torch.testing.assert_close(value, expected)
        leaf = values[0].clone().requires_grad_()
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            layer(leaf)


@each_module
def test_gradcheck(info):
    # Of what is put together from other layers, whose derivatives are checked here and whose gradients, all together, by
    # test_forward_and_gradients, a few samples are enough.
    some = 3 if info.module_cls in AROUND_OTHERS else 1
    for _, ours, values, names in itertools.islice(samples(info, torch.float64), 0, None, some):
        if type(ours) in (fastnn.nn.ReLU, fastnn.nn.ReLU6):
            # Away from the corner, where a difference quotient is no derivative.
            values = [value + value.sign() * 0.1 for value in values]
        parameters = list(ours.parameters())
        leaves = [value.clone().requires_grad_() for value in values if is_floating(value)]

        def call(*arguments, layer=ours, names=names, values=values):
            count = sum(map(is_floating, values))
            given = iter(arguments[:count])
            inputs = [next(given) if is_floating(value) else value for value in values]
            state = dict(zip(dict(layer.named_parameters()), arguments[count:], strict=True))
            positional = inputs[: len(inputs) - len(names)]
            named = dict(zip(names, inputs[len(positional) :], strict=True))
            return torch.func.functional_call(layer, state, tuple(positional), named)

        everything = (*leaves, *parameters)
        if isinstance(ours, torch.nn.CrossEntropyLoss) and call(*everything).isnan().any():
            continue  # the mean of no positions
        assert torch.autograd.gradcheck(call, everything, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, everything, fast_mode=True)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions_pad_in_every_mode(rank, no_fallback):
    """... in a batch and without one, and a transposed one gives the size that is asked for."""
    name, size = f"Conv{rank}d", (6, 5, 4)[:rank]
    for mode in ("zeros", "reflect", "replicate", "circular"):
        for padding in ("same", "valid", 1, (2, 1, 0)[:rank]):
            arguments = {
                "padding": padding,
                "padding_mode": mode,
                "dilation": 1 if padding == "same" else 2,
                "groups": 2,
            }
            ours = getattr(fastnn.nn, name)(4, 6, 2, **arguments)
            theirs = getattr(torch.nn, name)(4, 6, 2, **arguments)
            theirs.load_state_dict(ours.state_dict())
            for x in (torch.randn(3, 4, *size), torch.randn(4, *size)):
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Using padding='same'")
                    torch.testing.assert_close(ours(x), theirs(x))
    name = f"ConvTranspose{rank}d"
    ours, theirs = (getattr(m, name)(4, 2, 3, stride=2, padding=1) for m in (fastnn.nn, torch.nn))
    theirs.load_state_dict(ours.state_dict())
    for x in (torch.randn(3, 4, *size), torch.randn(4, *size)):
        for more in (0, 1):
            wanted = [2 * n - 1 + more for n in size]
            result = ours(x, output_size=wanted)
            assert list(result.shape[-rank:]) == wanted
            torch.testing.assert_close(result, theirs(x, output_size=wanted))
        torch.testing.assert_close(ours(x), theirs(x))
        with pytest.raises(ValueError, match="output size"):
            ours(x, output_size=[99] * rank)
    with pytest.raises(ValueError, match="padding mode"):
        getattr(fastnn.nn, name)(4, 2, 3, padding_mode="reflect")


@each_module
def test_moves_and_casts(info):
    for _, ours, values, names in samples(info, torch.float32):
        for dtype in (torch.float64, torch.bfloat16, torch.float32):
            ours.to(dtype)
            output = run(ours, [cast(value, dtype) for value in values], names, requires_grad=False)[0]
            assert output.dtype == dtype
        if getattr(ours, "momentum", 0) is None:
            continue  # the average over all batches reads their number, which has no value there
        ours.to("meta")
        there = [value.to("meta") if isinstance(value, torch.Tensor) else value for value in values]
        output = run(ours, there, names, requires_grad=False)[0]
        assert output.is_meta
