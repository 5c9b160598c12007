"""Hugging Face transformers as a client: small models with random weights against their own eager attention."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
from torch.testing import assert_close

import fastnn
from fastnn.fuse import is_fused
from fastnn.integrations import transformers as integration

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TOKENS = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    # Two heads of keys and values for four of queries.
    "Llama": ("LlamaForCausalLM", {**SIZES, **TOKENS, "num_key_value_heads": 2}),
    "Bert": ("BertForMaskedLM", {**SIZES, **TOKENS}),
    "GPT2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **TOKENS}),
    "ViT": ("ViTForImageClassification", {**SIZES, "image_size": 16, "patch_size": 4}),
}
DECODERS = ("Llama", "GPT2")
# A float64 model computes parts of itself in float32: softmax, norms, angles.
NEAR = {"rtol": 1e-4, "atol": 2e-6}


@pytest.fixture(autouse=True, scope="module")
def _registered():
    integration.register()
    integration.register()  # changes nothing


def build(name, attention):
    kind, options = MODELS[name]
    config = getattr(transformers, f"{name}Config")(**options, attn_implementation=attention)
    for dropout in [key for key in config.to_dict() if "pdrop" in key or "dropout" in key]:
        if isinstance(getattr(config, dropout, None), float):
            setattr(config, dropout, 0.0)
    model = getattr(transformers, kind)
    table = getattr(sys.modules[model.__module__], f"{name.upper()}_SELF_ATTENTION_CLASSES", None)
    if table is not None and attention not in table:
        pytest.skip(
            f"{name} of this transformers (before 5) has a table of its own, to which no attention can be added"
        )
    return model(config)


def pair(name, dtype=torch.float64, attention="fastnn"):
    """The same model converted with that attention, and with eager attention."""
    theirs = build(name, "eager").to(dtype)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ours = build(name, attention).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    assert ours.config._attn_implementation == attention
    return fastnn.convert(ours.eval()), theirs.eval()


def inputs_of(name, dtype=torch.float64, padded=True, side="right"):
    if name == "ViT":
        return {"pixel_values": torch.randn(2, 3, 16, 16, dtype=dtype)}
    mask = torch.ones(3, 11, dtype=torch.long)
    if padded:
        mask[0, slice(0, 4) if side == "left" else slice(-4, None)] = 0
    return {"input_ids": torch.randint(3, 97, (3, 11)), "attention_mask": mask}


def compared(name, logits, inputs):
    """What is padded is anybody's."""
    return logits if name == "ViT" else logits[inputs["attention_mask"].bool()]


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the queries that fastnn's attention was asked for."""
    seen, original = [], fastnn.functional.scaled_dot_product_attention

    def spy(query, *args, **kwargs):
        seen.append(query.shape)
        return original(query, *args, **kwargs)

    monkeypatch.setattr(fastnn.functional, "scaled_dot_product_attention", spy)
    return seen


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name, padded, calls, no_fallback):
    inputs = inputs_of(name, padded=padded)
    results = []
    ours, theirs = pair(name)
    for model in (ours, theirs):
        logits = compared(name, model(**inputs).logits, inputs)
        logits.square().mean().backward()
        results.append((logits, {key: p.grad for key, p in model.named_parameters()}))
    assert_close(*results, **NEAR)
    assert len(calls) == 2  # layers
    with torch.no_grad():
        assert_close(compared(name, ours(**inputs).logits, inputs), results[1][0], **NEAR)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_converted_alone(name, padded, calls, no_fallback):
    """Of torch's attention, which these models ask for unless told otherwise, convert makes fastnn's."""
    inputs = inputs_of(name, padded=padded)
    ours, theirs = pair(name, attention="sdpa")
    results = []
    for model in (ours, theirs):
        logits = compared(name, model(**inputs).logits, inputs)
        logits.square().mean().backward()
        results.append((logits, {key: p.grad for key, p in model.named_parameters()}))
    assert_close(*results, **NEAR)
    assert len(calls) == 2  # layers
    if name in DECODERS:
        tokens = [model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False) for model in (ours, theirs)]
        assert torch.equal(*tokens)
        assert len(calls) == 2 * 5
    calls.clear()
    fastnn.revert(ours)(**inputs)
    assert not calls


@pytest.mark.parametrize("name", MODELS)
def test_fused(name, calls, no_fallback):
    """With activations and shortcuts computed by the layers before them, where torch.fx can follow the model's parts."""
    ours, theirs = pair(name, attention="sdpa")
    fastnn.convert(ours, fuse=True)
    inputs = inputs_of(name)
    fused = [len(type(module)._fused_calls.linears) for module in ours.modules() if is_fused(type(module))]
    # Of two layers each: an activation and two shortcuts of BERT's, an activation of the others'.
    assert sum(fused) == {"Bert": 6 + 1, "ViT": 2, "Llama": 2, "GPT2": 0}[name]
    with torch.inference_mode():
        results = [model(**inputs) for model in (ours, theirs)]
        assert type(results[0]) is type(results[1])
        assert_close(*(compared(name, result.logits, inputs) for result in results), **NEAR)


@pytest.mark.parametrize("name", MODELS)
def test_float32(name, no_fallback):
    ours, theirs = pair(name, torch.float32)
    inputs = inputs_of(name, torch.float32)
    with torch.no_grad():
        result, expected = (compared(name, model(**inputs).logits, inputs) for model in (ours, theirs))
        exact_inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
        exact = compared(name, copy.deepcopy(theirs).double()(**exact_inputs).logits, inputs)
    error, torchs = ((r - exact).abs().max() for r in (result, expected))
    assert error <= 4 * torchs + 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_training(name, no_fallback):
    """Three steps of the whole model, loss by loss."""
    inputs, losses = inputs_of(name, padded=False), []
    for model in pair(name):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(**inputs).logits.square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(found)
    assert losses[0][0] != losses[0][-1]
    assert_close(*losses)


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "top_k": 20}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_generate(name, options, calls, no_fallback):
    # With a query that sees nothing, eager attention of float64 gives NaN: it takes the softmax in float32.
    inputs, generated = inputs_of(name, side="left"), []
    for model in pair(name, torch.float32):
        torch.manual_seed(5)
        generated.append(model.generate(**inputs, max_new_tokens=8, **options))
    assert torch.equal(*generated)
    # The prompt, then one query at a time over the cached keys.
    assert {shape[2] for shape in calls} == {11, 1}


@pytest.mark.parametrize("name", DECODERS)
def test_static_cache(name, no_fallback):
    """Its keys are longer than what has been seen so far."""
    inputs, results = inputs_of(name, padded=False), []
    for model in pair(name):
        cache = transformers.StaticCache(config=model.config, max_cache_len=20)
        with torch.no_grad():
            first = model(**inputs, past_key_values=cache).logits
            token = first[:, -1:].argmax(-1)
            second = model(input_ids=token, past_key_values=cache).logits
        results.append((first, second))
    assert_close(*results, **NEAR)


def test_what_convert_knows_of_them():
    """Conv1D and activations; pickles and reverts."""
    ours, theirs = pair("GPT2")
    replaced = {row.kind.rpartition(".")[2] for row in fastnn.report(ours).replaced}
    assert {"Conv1D", "NewGELUActivation", "Linear"} <= replaced
    inputs = inputs_of("GPT2")
    expected = compared("GPT2", theirs(**inputs).logits, inputs)
    for model in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert [type(m) for m in model.modules()] == [type(m) for m in ours.modules()]
        assert_close(compared("GPT2", model(**inputs).logits, inputs), expected)
    kinds = [type(m) for m in ours.modules()]
    assert [type(m) for m in fastnn.convert(ours).modules()] == kinds  # converted already
    reverted = fastnn.revert(ours)
    assert [type(m) for m in reverted.modules()] == [type(m) for m in theirs.modules()]


@pytest.mark.parametrize(
    "name", ["gelu", "gelu_new", "gelu_python", "gelu_accurate", "gelu_pytorch_tanh", "silu", "quick_gelu", "gelu_10"]
)
def test_activations(name):
    theirs = transformers.activations.ACT2FN[name]
    ours = fastnn.convert(copy.deepcopy(theirs))
    x = torch.randn(5, 7, dtype=torch.float64)
    assert_close(ours(x), theirs(x))
    known = name not in ("quick_gelu", "gelu_10")  # of which there is no kernel
    assert (type(ours) is not type(theirs)) == known


def test_what_changes_the_result_is_not_ignored():
    q = torch.randn(2, 4, 3, 8)
    for name in ("softcap", "s_aux", "cache"):
        with pytest.raises(ValueError, match=name):
            integration.attention_forward(torch.nn.Module(), q, q, q, None, **{name: 1.0})
        integration.attention_forward(torch.nn.Module(), q, q, q, None, **{name: None})


def test_masks_biases_and_causality(no_fallback):
    """The function itself against the formula."""
    q, k, v = (torch.randn(2, heads, n, 8, dtype=torch.float64) for heads, n in ((4, 3), (2, 5), (2, 5)))
    bias = torch.randn(1, 4, 3, 5, dtype=torch.float64)
    boolean = torch.rand(2, 1, 3, 5) < 0.7
    boolean[..., 0] = True
    added = torch.where(boolean, 0.0, -torch.inf).double()
    causal = torch.ones(3, 5, dtype=torch.bool).tril()
    module = torch.nn.Module()
    long = torch.cat([boolean, ~boolean], dim=-1)  # of a static cache
    for arguments, scores in (
        ({"attention_mask": None}, torch.where(causal, 0.0, -torch.inf)),
        ({"attention_mask": None, "is_causal": False}, 0.0),
        ({"attention_mask": None, "is_causal": False, "scaling": 0.3}, 0.0),
        ({"attention_mask": boolean}, added),
        ({"attention_mask": long}, added),
        ({"attention_mask": added}, added),
        ({"attention_mask": None, "position_bias": bias}, torch.where(causal, bias, -torch.inf)),
        ({"attention_mask": None, "position_bias": bias, "is_causal": False}, bias),
        ({"attention_mask": boolean, "position_bias": bias}, bias + added),
        ({"attention_mask": added, "position_bias": bias}, bias + added),
    ):
        keys, values = (x.repeat_interleave(2, dim=1) for x in (k, v))
        weights = q @ keys.mT * arguments.get("scaling", 8**-0.5) + scores
        expected = (weights.softmax(-1) @ values).transpose(1, 2)
        result, none = integration.attention_forward(module, q, k, v, **arguments)
        assert none is None
        assert result.is_contiguous()
        assert_close(result, expected)
    module.is_causal = False
    assert_close(
        integration.attention_forward(module, q, k, v, None)[0],
        integration.attention_forward(module, q, k, v, None, is_causal=False)[0],
    )
    # One query sees all the keys.
    single = q[:, :, :1]
    assert_close(
        integration.attention_forward(module, single, k, v, None, is_causal=True)[0],
        integration.attention_forward(module, single, k, v, None, is_causal=False)[0],
    )


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.modeling_utils", None)
    with pytest.raises(ImportError, match=r"needs transformers 4\.48"):
        integration.register()
