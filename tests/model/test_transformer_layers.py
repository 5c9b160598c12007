"""Multi-head attention and transformer layers against torch's, whose fast paths they must neither take nor differ from."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db

import fastnn
from fastnn import _state
from fastnn.backends import cpu
from fastnn.ops.packed_linear import PackedWeight

pytestmark = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor", "ignore:Support for mismatched", "ignore:The PyTorch API of nested tensors"
)

BATCH, LENGTH, SIZE, HEADS = 3, 5, 8, 2
STACKS = (
    "TransformerEncoderLayer",
    "TransformerEncoder",
    "TransformerDecoderLayer",
    "TransformerDecoder",
    "Transformer",
)


def randomized(module, dtype=torch.float64):
    """Nothing at 0 or 1, as biases and norms start."""
    module = module.to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module


def twin(module):
    return fastnn.convert(copy.deepcopy(module))


# ---- attention ---------------------------------------------------------------------------------------------------

BOOLEANS = (False, True)
EVERYTHING = itertools.product(
    ("one", "two", "three"),  # different operands
    BOOLEANS,  # batch_first
    BOOLEANS,  # unbatched
    BOOLEANS,  # kdim and vdim
    BOOLEANS,  # add_bias_kv
    BOOLEANS,  # add_zero_attn
    ("none", "averaged", "of each head"),  # weights
    (None, "bool", "float"),  # key_padding_mask
    (None, "bool2", "bool3", "float2", "float3", "causal"),  # attn_mask
)
# Every seventh has all values of every argument, and most pairs of them.
CASES = [case for case in EVERYTHING if not (case[0] == "one" and case[3])][::7]


def attention_case(operands, batch_first, unbatched, other_sizes, bias_kv, zero_attn, weights, padding, mask):
    source = LENGTH if operands == "one" else LENGTH - 1
    other = 6 if other_sizes else None
    layer = nn.MultiheadAttention(
        SIZE,
        HEADS,
        add_bias_kv=bias_kv,
        add_zero_attn=zero_attn,
        kdim=other,
        vdim=other,
        batch_first=batch_first,
    )

    def operand(length, size):
        shape = (length, size)
        if not unbatched:
            shape = (BATCH, length, size) if batch_first else (length, BATCH, size)
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    query = operand(LENGTH, SIZE)
    key = query if operands == "one" else operand(source, other or SIZE)
    value = operand(source, other or SIZE) if operands == "three" else key
    arguments = {"need_weights": weights != "none", "average_attn_weights": weights == "averaged"}
    if padding is not None:
        padded = torch.zeros((source,) if unbatched else (BATCH, source), dtype=torch.bool)
        padded[..., -1] = True
        arguments["key_padding_mask"] = padded if padding == "bool" else torch.where(padded, -2.5, 0.3).double()
    if mask == "causal":
        arguments |= {"attn_mask": torch.ones(LENGTH, source, dtype=torch.bool).triu(1), "is_causal": True}
    elif mask is not None:
        batch = 1 if unbatched else BATCH
        shape = (LENGTH, source) if mask.endswith("2") else (batch * HEADS, LENGTH, source)
        hidden = torch.rand(shape) < 0.3
        hidden[..., 0] = False  # a row that sees nothing has no weights
        floating = torch.where(hidden, -torch.inf, torch.rand(shape)).double()
        arguments["attn_mask"] = hidden if mask.startswith("bool") else floating
    return randomized(layer), (query, key, value), arguments


@pytest.mark.parametrize("part", range(6))
def test_attention_is_torchs(part, no_fallback):
    for case in CASES[part::6]:
        theirs, operands, arguments = attention_case(*case)
        ours = twin(theirs)
        assert type(ours) is fastnn.nn.MultiheadAttention
        leaves = list({id(t): t for t in operands}.values())
        results = []
        for layer in (ours, theirs):
            output, weights = layer(*operands, **arguments)
            loss = (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum()
            if weights is not None:
                loss = loss + weights.sin().sum()
            gradients = torch.autograd.grad(loss, [*leaves, *layer.parameters()])
            with torch.no_grad():
                quick = layer.eval()(*operands, **arguments)
            results.append((output, weights, gradients, *quick))
        assert_close(*results, msg=lambda message, case=case: f"{case}: {message}")


def test_torchs_own_samples(no_fallback):
    """Of the OpInfo database, without dropout, which draws other numbers."""
    (info,) = (op for op in op_db if op.name == "nn.functional.multi_head_attention_forward")
    count = 0
    for requires_grad in BOOLEANS:
        for sample in info.sample_inputs("cpu", torch.float64, requires_grad=requires_grad):
            arguments = [sample.input, *sample.args]
            arguments[10] = 0.0
            leaves = [t for t in arguments if isinstance(t, torch.Tensor)] if requires_grad else []
            leaves += [sample.kwargs["attn_mask"]] if requires_grad else []
            results = []
            for module in (fastnn.functional, F):
                output, weights = module.multi_head_attention_forward(*arguments, **sample.kwargs)
                loss = output.sin().sum() + weights.cos().sum()
                gradients = torch.autograd.grad(loss, leaves) if leaves else ()
                results.append((output, weights, gradients))
                assert not output.isnan().any()
            assert_close(*results)
            assert [r.stride() for r in results[0][:2]] == [r.stride() for r in results[1][:2]]
            count += 1
    assert count > 50


def test_signature():
    ours, theirs = (
        inspect.signature(module.multi_head_attention_forward).parameters for module in (fastnn.functional, F)
    )
    assert [(p.name, p.default) for p in ours.values()][: len(theirs)] == [(p.name, p.default) for p in theirs.values()]
    for name in ("MultiheadAttention", *STACKS):
        ours, theirs = (inspect.signature(getattr(module, name).forward).parameters for module in (fastnn.nn, nn))
        assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


def test_attention_of_the_first_dimension_writes_no_copies(no_fallback):
    layer = fastnn.nn.MultiheadAttention(SIZE, HEADS, batch_first=True)
    x = torch.randn(BATCH, LENGTH, SIZE)
    for weights in BOOLEANS:
        assert layer(x, x, x, need_weights=weights)[0].is_contiguous()
    functional = fastnn.functional.multi_head_attention_forward(
        x, x, x, SIZE, HEADS, layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0,
        layer.out_proj.weight, layer.out_proj.bias, batch_first=True,
    )  # fmt: skip
    assert_close(functional, layer(x, x, x))


def test_attention_with_static_keys(no_fallback):
    layer = randomized(nn.MultiheadAttention(SIZE, HEADS))
    x = torch.randn(LENGTH, BATCH, SIZE, dtype=torch.float64)
    k, v = (torch.randn(BATCH * HEADS, 7, SIZE // HEADS, dtype=torch.float64) for _ in range(2))
    given = (x, x, x, SIZE, HEADS, layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0)
    given = (*given, layer.out_proj.weight, layer.out_proj.bias)
    for weights in BOOLEANS:
        results = [
            module.multi_head_attention_forward(*given, static_k=k, static_v=v, need_weights=weights)
            for module in (fastnn.functional, F)
        ]
        assert_close(*results)
    for wrong in (k[1:], k[..., 1:]):
        for module in (fastnn.functional, F):
            with pytest.raises(AssertionError, match="static_k"):
                module.multi_head_attention_forward(*given, static_k=wrong)


def call_wrongly(layer, what):
    x = torch.randn(LENGTH, BATCH, SIZE)
    true = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    return {
        "four dimensions": lambda: layer(x[None], x[None], x[None]),
        "one dimension": lambda: layer(x[0, 0], x[0, 0], x[0, 0]),
        "key unbatched": lambda: layer(x, x[:, 0], x[:, 0]),
        "key and value differ": lambda: layer(x, x, x[1:]),
        "size of the query": lambda: layer(x[..., 1:], x[..., 1:], x[..., 1:]),
        "size of the key": lambda: layer(x, x[..., 1:], x[..., 1:]),
        "padding of two dimensions": lambda: layer(x[:, 0], x[:, 0], x[:, 0], key_padding_mask=true),
        "padding of another batch": lambda: layer(x, x, x, key_padding_mask=true[:2]),
        "padding of another length": lambda: layer(x, x, x, key_padding_mask=true[:3, :4]),
        "integers for padding": lambda: layer(x, x, x, key_padding_mask=true[:3].long()),
        "mask of one dimension": lambda: layer(x, x, x, attn_mask=true[0]),
        "mask of another shape": lambda: layer(x, x, x, attn_mask=true[1:]),
        "masks of another number": lambda: layer(x, x, x, attn_mask=true.expand(2, -1, -1)),
        "integers for a mask": lambda: layer(x, x, x, attn_mask=true.long()),
        "mask of heads, unbatched": lambda: layer(x[:, 0], x[:, 0], x[:, 0], attn_mask=true.expand(3, -1, -1)),
        "causal without a mask": lambda: layer(x, x, x, is_causal=True),
        "another dtype": lambda: layer(x.double(), x.double(), x.double()),
        "no tensor": lambda: layer(None, x, x),
    }[what]()


@pytest.mark.parametrize("weights", BOOLEANS, ids=("output", "weights"))
def test_bad_input_raises_what_torch_raises(weights):
    ours, theirs = fastnn.nn.MultiheadAttention(SIZE, HEADS), nn.MultiheadAttention(SIZE, HEADS)
    whats = [
        "four dimensions", "one dimension", "key unbatched", "key and value differ", "size of the query",
        "size of the key", "padding of two dimensions", "padding of another batch", "padding of another length",
        "integers for padding", "mask of one dimension", "mask of another shape", "masks of another number",
        "integers for a mask", "mask of heads, unbatched", "causal without a mask", "another dtype", "no tensor",
    ]  # fmt: skip
    for what in whats:
        raised = []
        for layer in (theirs, ours):

            def call(*args, layer=layer, **kwargs):
                return layer(*args, need_weights=weights, **kwargs)

            with pytest.raises(Exception) as error:
                call_wrongly(call, what)
            raised.append(type(error.value))
        assert raised[0] is raised[1], what
    with pytest.raises(AssertionError, match="divisible"):
        fastnn.nn.MultiheadAttention(5, 2)


def test_attention_drops_out(no_fallback):
    layer = fastnn.nn.MultiheadAttention(SIZE, HEADS, dropout=0.5, batch_first=True)
    x = torch.randn(2, 30, SIZE)
    for weights in BOOLEANS:
        torch.manual_seed(1)
        first, seen = layer(x, x, x, need_weights=weights, average_attn_weights=False)
        torch.manual_seed(1)
        assert torch.equal(layer(x, x, x, need_weights=weights, average_attn_weights=False)[0], first)
        assert not torch.equal(layer(x, x, x, need_weights=weights, average_attn_weights=False)[0], first)
    plain = layer.eval()(x, x, x, average_attn_weights=False)[1]
    dropped = seen == 0
    assert 0.4 < dropped.float().mean() < 0.6
    assert_close(seen[~dropped], 2 * plain[~dropped])


# ---- layers ------------------------------------------------------------------------------------------------------


class Cube(nn.Module):
    def forward(self, x):
        return x * x * x


def build(name, **options):
    """One of torch's layers or stacks, and what is shared by all of them."""
    options = {"d_model": SIZE, "nhead": HEADS, "dim_feedforward": 12, "dropout": 0.0, **options}
    if name == "Transformer":
        return nn.Transformer(num_encoder_layers=2, num_decoder_layers=2, **options)
    if name.endswith("Layer"):
        return getattr(nn, name)(**options)
    return getattr(nn, name)(getattr(nn, f"{name}Layer")(**options), 2, nn.LayerNorm(SIZE))


def inputs_of(name, dtype=torch.float64, requires_grad=True):
    source, target = (torch.randn(BATCH, n, SIZE, dtype=dtype, requires_grad=requires_grad) for n in (LENGTH, 4))
    if "Encoder" in name:
        return (source,)
    return (source, target) if name == "Transformer" else (target, source)


def masks_of(name, kind):
    if kind is None:
        return {}
    if kind == "padding":
        padded = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
        padded[0, 3:] = padded[1, 4:] = True
        if "Encoder" in name:
            return {"src_key_padding_mask": padded}
        return {"memory_key_padding_mask": padded, "tgt_key_padding_mask": padded[:, 1:]}
    length = LENGTH if "Encoder" in name else 4
    causal = nn.Transformer.generate_square_subsequent_mask(length, dtype=torch.float64)
    causal = causal if kind == "float" else causal != 0
    return {{"TransformerEncoder": "mask", "TransformerEncoderLayer": "src_mask"}.get(name, "tgt_mask"): causal}


ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "silu": F.silu,
    "callable": lambda x: x * x,
    "tanh gelu module": nn.GELU(approximate="tanh"),
    "some module": Cube(),
}


@pytest.mark.parametrize("kind", [None, "padding", "float", "bool"])
@pytest.mark.parametrize("name", STACKS)
def test_layers_are_torchs(name, kind, no_fallback):
    for norm_first, batch_first in itertools.product(BOOLEANS, BOOLEANS):
        theirs = randomized(build(name, norm_first=norm_first, batch_first=batch_first))
        check(theirs, name, kind, batch_first)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_activations(name, activation, no_fallback):
    options = {"activation": ACTIVATIONS[activation], "batch_first": True}
    theirs, ours = randomized(build(name, **options)), build(name, **options).double()
    ours.load_state_dict(theirs.state_dict())
    # Not a copy: that of a decoder layer has relu in place of a module. And in its fast path torch takes every GELU for
    # the one of erf.
    check(theirs, name, None, True, fastnn.convert(ours), torchs_fast_path=activation != "tanh gelu module")


def check(theirs, name, kind, batch_first, ours=None, torchs_fast_path=True):
    """The same results and gradients, in training and in eval mode, with gradients and without."""
    ours = twin(theirs) if ours is None else ours
    assert type(ours) is getattr(fastnn.nn, name)
    inputs, masks = inputs_of(name), masks_of(name, kind)
    laid_out = inputs if batch_first else [x.transpose(0, 1) for x in inputs]
    for training in (True, False):
        results = []
        for model in (ours, theirs):
            output = model.train(training)(*laid_out, **masks)
            loss = (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum()
            gradients = torch.autograd.grad(loss, [*inputs, *model.parameters()])
            with torch.no_grad():
                quick = model(*laid_out, **masks)
            results.append((output, gradients, quick if torchs_fast_path or model is ours else output.detach()))
        assert_close(*results)


@pytest.mark.parametrize("name", STACKS)
def test_training_goes_the_same_way(name, no_fallback):
    theirs = randomized(build(name, batch_first=True))
    ours = twin(theirs)
    losses = []
    inputs = inputs_of(name, requires_grad=False)
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        found = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(*inputs).square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(found)
    assert_close(*losses)
    assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("name", STACKS)
def test_made_as_fastnns_from_the_start(name):
    """The constructor draws the same numbers, state dicts go both ways, copies are of the same class."""
    options = {"d_model": SIZE, "nhead": HEADS, "dim_feedforward": 12, "batch_first": True}
    made = []
    for module in (fastnn.nn, nn):
        torch.manual_seed(3)
        if name == "Transformer":
            made.append(module.Transformer(num_encoder_layers=1, num_decoder_layers=1, **options))
        elif name.endswith("Layer"):
            made.append(getattr(module, name)(**options))
        else:
            made.append(getattr(module, name)(getattr(module, f"{name}Layer")(**options), 2))
    ours, theirs = made
    assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert repr(ours) == repr(theirs)
    assert not fastnn.report(ours).with_status("available")
    assert [type(m) for m in ours.modules()] == [type(m) for m in twin(theirs).modules()]
    randomized(theirs, torch.float32)
    ours.load_state_dict(theirs.state_dict())
    inputs = inputs_of(name, torch.float32, requires_grad=False)
    ours.eval()
    expected = theirs.eval()(*inputs)
    for copied in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is type(ours)
        assert_close(copied(*inputs), expected, rtol=1e-4, atol=1e-5)
    reverted = fastnn.revert(ours)
    assert [type(m) for m in reverted.modules()] == [type(m) for m in theirs.modules()]
    theirs.load_state_dict(reverted.state_dict())


def test_what_the_caller_hands_over_stays_as_it_is():
    activation, custom = nn.GELU(), nn.TransformerEncoder(nn.TransformerEncoderLayer(SIZE, HEADS), 1)
    model = fastnn.nn.Transformer(SIZE, HEADS, 1, 1, 12, activation=activation, custom_encoder=custom)
    assert type(activation) is nn.GELU
    assert model.encoder is custom
    assert type(custom) is nn.TransformerEncoder
    assert type(custom.layers[0]) is nn.TransformerEncoderLayer
    assert type(model.decoder.layers[0].multihead_attn) is fastnn.nn.MultiheadAttention
    kept = fastnn.nn.TransformerEncoder(nn.TransformerEncoderLayer(SIZE, HEADS), 1)
    assert type(kept.layers[0]) is nn.TransformerEncoderLayer
    x = torch.randn(LENGTH, BATCH, SIZE)
    assert_close(kept.eval()(x), nn.TransformerEncoder.forward(kept, x))


# ---- torch's fast paths ------------------------------------------------------------------------------------------

FAST_PATHS = ("_transformer_encoder_layer_fwd", "_native_multi_head_attention", "_nested_tensor_from_mask")


class TakenError(Exception):
    pass


@pytest.mark.parametrize("path", FAST_PATHS)
def test_torchs_fast_paths_are_not_taken(path, monkeypatch):
    def taken(*args, **kwargs):
        raise TakenError

    monkeypatch.setattr(torch, path, taken)
    if path == "_native_multi_head_attention":
        model, masks = nn.MultiheadAttention(SIZE, HEADS, batch_first=True), {}
        inputs = (torch.randn(BATCH, LENGTH, SIZE),) * 3
    else:
        model, masks = build("TransformerEncoder", batch_first=True), masks_of("TransformerEncoder", "padding")
        inputs = inputs_of("TransformerEncoder", torch.float32, requires_grad=False)
    model.eval()
    with torch.no_grad():
        with pytest.raises(TakenError):
            model(*inputs, **masks)
        fastnn.convert(model)
        model(*inputs, **masks)


PADDINGS = {
    "at the end": [3, 5, 1],
    "all shorter": [3, 2, 1],
    "none": [5, 5, 5],
    "in one whole sequence": [3, 0, 5],
}


@pytest.mark.parametrize("floating", BOOLEANS, ids=("bool", "float"))
@pytest.mark.parametrize("padding", PADDINGS)
def test_a_padded_batch_in_eval_mode(padding, floating, no_fallback):
    """torch makes a nested tensor of it, and 0 of what is padded."""
    padded = torch.arange(LENGTH) >= torch.tensor(PADDINGS[padding])[:, None]
    mask = torch.where(padded, -torch.inf, 0.0).double() if floating else padded
    x = inputs_of("TransformerEncoder", requires_grad=False)[0]
    for norm in (None, nn.LayerNorm(SIZE)):
        layer = nn.TransformerEncoderLayer(SIZE, HEADS, 12, batch_first=True)
        theirs = randomized(nn.TransformerEncoder(layer, 2, norm)).eval()
        ours = twin(theirs)
        for guard in (torch.no_grad, torch.inference_mode):
            with guard():
                result, expected = (model(x, src_key_padding_mask=mask) for model in (ours, theirs))
                assert result.shape == x.shape
                assert_close(result, expected)
                if norm is None:
                    assert not result[padded].any()
        # With gradients torch computes what is padded, too.
        if padding != "in one whole sequence":
            assert_close(ours(x, src_key_padding_mask=mask), theirs(x, src_key_padding_mask=mask))


@pytest.mark.parametrize("norm_first", BOOLEANS)
@pytest.mark.parametrize("watched", BOOLEANS, ids=("unwatched", "watched"))
def test_what_is_padded_is_not_computed(norm_first, watched, monkeypatch, no_fallback):
    """... whichever way that is avoided; a hook sees the batch."""
    lengths = [3, 0, 4, 1]
    padded = torch.arange(9) >= torch.tensor(lengths)[:, None]
    x = torch.randn(4, 9, SIZE, dtype=torch.float64)
    layer = nn.TransformerEncoderLayer(SIZE, HEADS, 12, batch_first=True, norm_first=norm_first)
    theirs = randomized(nn.TransformerEncoder(layer, 2)).eval()
    ours = fastnn.prepack_(twin(theirs))
    ours.use_nested_tensor = True  # which torch's constructor allows for norm_first=False alone
    rows, linear = [], fastnn.functional.linear_act
    monkeypatch.setattr(fastnn.functional, "linear_act", lambda x, *a: rows.append(x.shape[:-1]) or linear(x, *a))
    shapes = []
    if watched:
        ours.layers[1].register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    with torch.no_grad():
        result, expected = (model(x, src_key_padding_mask=padded) for model in (ours, theirs))
        alone = ours(x[2:3, :4])
    assert_close(result[~padded], expected[~padded])
    assert_close(result[2, :4], alone[0])
    assert not result[padded].any()
    assert rows[:2] == ([(4, 4)] * 2 if watched else [(8,)] * 2)
    assert shapes == ([(4, 4, SIZE), (1, 4, SIZE)] if watched else [])
    with torch.no_grad():
        assert not ours(x, src_key_padding_mask=torch.ones(4, 9, dtype=torch.bool)).any()


def test_a_sequence_does_not_depend_on_the_others():
    padded = torch.arange(20) >= torch.tensor([13, 20, 7])[:, None]
    model = twin(nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 2, 96, batch_first=True), 2)).eval()
    x = torch.randn(3, 20, 64)
    with torch.no_grad(), fastnn.batch_invariant():
        together = model(x, src_key_padding_mask=padded)
        for i in range(3):
            alone = model(x[i : i + 1], src_key_padding_mask=padded[i : i + 1])
            assert torch.equal(alone[0], together[i])


def test_padding_at_the_start_in_eval_mode(no_fallback):
    padded = torch.arange(LENGTH) < torch.tensor([2, 0, 4])[:, None]
    x = inputs_of("TransformerEncoder", requires_grad=False)[0]
    theirs = randomized(build("TransformerEncoder", batch_first=True)).eval()
    ours = twin(theirs)
    with torch.no_grad():
        result, expected = (model(x, src_key_padding_mask=padded) for model in (ours, theirs))
        assert_close(result[~padded], expected[~padded])
        theirs.layers[0].self_attn.train()  # no fast path in that layer
    assert_close(ours(x, src_key_padding_mask=padded), theirs(x, src_key_padding_mask=padded))


def test_nested_tensors_go_to_torch():
    x = torch.nested.nested_tensor([torch.randn(3, SIZE), torch.randn(5, SIZE)])
    theirs = build("TransformerEncoderLayer", batch_first=True).eval()
    attention = nn.MultiheadAttention(SIZE, HEADS, batch_first=True).eval()
    with torch.no_grad():
        _state.reset_fallbacks()
        for model, call in ((theirs, lambda m: m(x)), (attention, lambda m: m(x, x, x, need_weights=False)[0])):
            for result, expected in zip(call(twin(model)).unbind(), call(model).unbind(), strict=True):
                assert_close(result, expected)
    assert {op for op, _ in _state.fallbacks()} == {"TransformerEncoderLayer", "multi_head_attention_forward"}
    with fastnn.strict(), torch.no_grad(), pytest.raises(fastnn.FallbackError, match="nested"):
        twin(theirs)(x)


# ---- who looks on, and what traces -------------------------------------------------------------------------------


@pytest.mark.parametrize("watched", ["linear1", "activation", "linear2", "self_attn", "dropout1"])
def test_hooks_are_called(watched, no_fallback):
    theirs = build("TransformerEncoderLayer", batch_first=True, activation=nn.ReLU()).eval()
    ours = twin(theirs)
    x = inputs_of("", torch.float32, requires_grad=False)[0]
    with torch.no_grad():
        plain = ours(x)
        seen = []
        getattr(ours, watched).register_forward_hook(lambda module, args, output: seen.append(output))
        assert_close(ours(x), plain)
    assert len(seen) == 1
    if watched == "linear1":
        assert (seen[0] < 0).any()  # not yet through the relu


def test_a_block_that_a_subclass_overrides_is_called():
    class Mine(fastnn.nn.TransformerEncoderLayer):
        def _sa_block(self, x, *args, **kwargs):
            return torch.zeros_like(x)

    layer = Mine(SIZE, HEADS, 12, batch_first=True, norm_first=True).eval()
    x = torch.randn(2, 3, SIZE)
    assert_close(layer(x), x + layer._ff_block(layer.norm2(x)))

    class Other(fastnn.nn.TransformerEncoderLayer):
        def _ff_block(self, x):
            return torch.zeros_like(x)

    layer = Other(SIZE, HEADS, 12, batch_first=True, norm_first=True).eval()
    assert_close(layer(x), x + layer._sa_block(layer.norm1(x), None, None))


def test_an_attention_of_somebody_elses_gets_added_masks():
    class Attention(nn.Module):
        batch_first = True

        def forward(self, query, key, value, attn_mask, key_padding_mask, **kwargs):
            assert attn_mask.dtype == key_padding_mask.dtype == torch.float32
            return query + attn_mask.clamp(min=-1).sum() + key_padding_mask.clamp(min=-1).sum(), None

    masks = {"src_mask": torch.eye(LENGTH, dtype=torch.bool), "src_key_padding_mask": torch.eye(3, 5, dtype=torch.bool)}
    theirs = build("TransformerEncoderLayer", batch_first=True)
    theirs.self_attn = Attention()
    x = inputs_of("TransformerEncoder", torch.float32)[0]
    assert_close(twin(theirs)(x, **masks), theirs(x, **masks))


@pytest.mark.parametrize("name", ["TransformerEncoder", "TransformerDecoderLayer"])
def test_layers_compile_in_one_graph(name, no_fallback):
    ours = twin(build(name, batch_first=True)).double()
    inputs, masks = inputs_of(name), masks_of(name, "padding")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    results = []
    for model in (compiled, ours):
        output = model(*inputs, **masks)
        results.append((output, torch.autograd.grad(output.square().sum(), [*inputs, *ours.parameters()])))
    assert_close(*results)
    torch._dynamo.reset()


def test_attention_compiles_in_one_graph_and_maps(no_fallback):
    ours = twin(nn.MultiheadAttention(SIZE, HEADS, batch_first=True)).double()
    x = inputs_of("", requires_grad=False)[0]
    for weights in BOOLEANS:

        def call(x, weights=weights):
            return [result for result in ours(x, x, x, need_weights=weights) if result is not None]

        assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))
        assert_close(torch.vmap(call)(x), call(x))  # unbatched, one by one
    torch._dynamo.reset()


def test_autocast(no_fallback):
    theirs = build("TransformerDecoder", batch_first=True)
    ours = twin(theirs)
    inputs = inputs_of("TransformerDecoder", torch.float32)
    exact = theirs(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = ours(*inputs), theirs(*inputs)
    assert result.dtype == expected.dtype
    assert (result - exact).abs().max() < 2 * (expected - exact).abs().max() + 1e-2
    result.float().square().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in ours.parameters())


def test_prepacked(no_fallback):
    layer = nn.MultiheadAttention(128, 2, batch_first=True)
    ours = fastnn.prepack_(twin(layer)).eval()
    packed = [row.name for row in fastnn.report(ours).rows if row.prepacked]
    assert packed == ["(model)", "out_proj"]
    x = torch.randn(2, 64, 128)
    used = []
    for part in (ours, ours.out_proj):
        linear = part._packed_weight.linear
        spy = type("Spy", (), {"is_current": part._packed_weight.is_current})()
        spy.linear = lambda *args, linear=linear: used.append(linear(*args)) or used[-1]
        part.__dict__["_packed_weight"] = spy
    with torch.no_grad():
        expected = layer(x, x, x)
        assert_close(ours(x, x, x), expected, rtol=1e-4, atol=1e-5)
        assert len(used) == 2
        assert all(result is not None for result in used)
        fastnn.prepack_(ours)
        ours.in_proj_weight.mul_(2)
        layer.in_proj_weight.mul_(2)
        assert_close(ours(x, x, x), layer(x, x, x), rtol=1e-4, atol=1e-5)
    assert [row.name for row in fastnn.report(ours).rows if row.prepacked] == ["out_proj"]
    assert "_packed_weight" not in copy.deepcopy(ours).out_proj.__dict__


@pytest.mark.skipif(not cpu.has_table, reason="torch before 2.10 has no table of DLPack's")
@pytest.mark.parametrize("norm_first", BOOLEANS)
@pytest.mark.parametrize("batch_first", BOOLEANS)
def test_residuals_are_added_within_packed_products(batch_first, norm_first, monkeypatch, no_fallback):
    theirs = nn.TransformerEncoderLayer(64, 2, 128, 0.0, batch_first=batch_first, norm_first=norm_first).eval()
    ours = fastnn.prepack_(twin(theirs))
    sums = []
    original = PackedWeight.linear_add

    def spy(self, *args):
        sums.append(original(self, *args))
        return sums[-1]

    monkeypatch.setattr(PackedWeight, "linear_add", spy)
    x = torch.randn(17, 23, 64)
    masks = {"src_mask": torch.ones(*[x.shape[batch_first]] * 2, dtype=torch.bool).triu(1)}
    masks["src_key_padding_mask"] = torch.zeros(x.shape[1 - batch_first], x.shape[batch_first], dtype=torch.bool)
    masks["src_key_padding_mask"][:, -3:] = True
    near = {"rtol": 1e-4, "atol": 1e-5}
    with torch.no_grad():
        expected = theirs.train()(x, **masks)  # not by torch's fast path
        assert_close(ours(x, **masks), expected, **near)
        assert len(sums) == 2 and all(result is not None for result in sums)
        # Nobody may look on, and nothing may be dropped.
        seen = []
        hook = ours.self_attn.register_forward_hook(lambda module, args, output: seen.append(output[0]))
        assert_close(ours(x, **masks), expected, **near)
        hook.remove()
        assert len(seen) == 1 and len(sums) == 3
        ours.dropout1.p = ours.dropout2.p = 1.0
        alone = theirs.norm2(theirs.norm1(x))
        assert_close(ours.train()(x, **masks), x if norm_first else alone, **near)
        assert len(sums) == 3
    ours.eval()(x.requires_grad_()).sum().backward()
    assert len(sums) == 5 and sums[3:] == [None, None] and x.grad is not None


def test_patch(no_fallback):
    """In eval mode without gradients too, where torch's layer has a way of its own."""
    layer = nn.MultiheadAttention(SIZE, HEADS, batch_first=True).double().eval()
    x = torch.randn(BATCH, LENGTH, SIZE, dtype=torch.float64)
    masks = {"key_padding_mask": masks_of("TransformerEncoder", "padding")["src_key_padding_mask"]}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        expected = layer(x, x, x, **masks)
        with fastnn.patch():
            assert_close(layer(x, x, x, **masks), expected)
