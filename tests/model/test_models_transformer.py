"""The transformers of `fastnn.models` against the same networks in plain `torch.nn` (transformer_twins.py)."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnn
from fastnn import models
from fastnn.models import seq2seq
from fastnn.testing.errors import relative_error

from . import transformer_twins as twins
from .closeness import assert_as_near_as_torch


@dataclass(frozen=True)
class Network:
    ours: Callable[[], nn.Module]
    twin: Callable[[], nn.Module]
    #: Makes the arguments of a call, floats among them as float32.
    inputs: Callable[[], tuple[Any, ...]]
    rate: float = 0.01

    def pair(self):
        """fastnn's and torch's, with the same parameters: none of them as norms and biases start, which would hide much."""
        ours, theirs = self.ours(), self.twin()
        state = theirs.state_dict()
        for name, value in state.items():
            if name.endswith(("bias", "norm1.weight", "norm2.weight", "ln_1.weight", "LayerNorm.weight")):
                value.add_(torch.randn_like(value), alpha=0.2)
        ours.load_state_dict(state)
        return ours, theirs


def tokens(n, length, vocabulary):
    return torch.randint(1, vocabulary, (n, length))


def padded(n, length, vocabulary):
    """Tokens, and a mask that is false from a point on in all rows but the first."""
    found = tokens(n, length, vocabulary)
    ends = torch.tensor([length, *range(length - 2, length - 1 - n, -1)])[:, None]
    mask = torch.arange(length) < ends
    return found.masked_fill(~mask, 0), mask


def bert_inputs():
    found, mask = padded(3, 11, 37)
    return found, mask, torch.randint(2, (3, 11))


def seq2seq_inputs():
    (src, source_mask), (tgt, target_mask) = padded(3, 9, 23), padded(3, 7, 19)
    return src, tgt, ~source_mask, ~target_mask


GPT = dict(vocab_size=37, block_size=16, n_layer=2, n_head=3, n_embd=24, dropout=0.0)
BERT = dict(
    vocab_size=37,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=13,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
VIT = dict(image_size=24, patch_size=6, num_layers=2, num_heads=2, hidden_dim=20, mlp_dim=36, num_classes=10)
SEQ2SEQ = dict(num_encoder_layers=2, num_decoder_layers=2, emb_size=24, nhead=4, src_vocab_size=23, tgt_vocab_size=19)
SEQ2SEQ |= dict(dim_feedforward=36, dropout=0.0, maxlen=15)


def bert_twin(**kwargs):
    return twins.Bert(37, 24, 2, 4, 40, positions=13, **kwargs)


NETWORKS = {
    "gpt": Network(lambda: models.GPT(**GPT), lambda: twins.GPT(**GPT), lambda: (tokens(3, 13, 37),)),
    "gpt_untied": Network(
        lambda: models.GPT(**GPT, bias=False, tie_weights=False),
        lambda: twins.GPT(**GPT, bias=False, tie_weights=False),
        lambda: (tokens(3, 16, 37),),
    ),
    "bert": Network(lambda: models.Bert(**BERT), bert_twin, bert_inputs),
    "bert_unmasked": Network(
        lambda: models.Bert(**BERT, pad_token_id=None, add_pooling_layer=False),
        lambda: bert_twin(pad=None, pooled=False),
        lambda: (tokens(3, 13, 37),),
    ),
    "vit": Network(
        lambda: models.VisionTransformer(**VIT),
        lambda: twins.VisionTransformer(24, 6, 2, 2, 20, 36, 10),
        lambda: (torch.randn(3, 3, 24, 24),),
    ),
    "seq2seq": Network(
        lambda: models.Seq2SeqTransformer(**SEQ2SEQ, activation="gelu"),
        lambda: twins.Seq2Seq(2, 2, 24, 4, 23, 19, 36, 15, twins.gelu),
        seq2seq_inputs,
    ),
    "seq2seq_norm_first": Network(
        lambda: models.Seq2SeqTransformer(**SEQ2SEQ, activation="gelu", norm_first=True),
        lambda: twins.Seq2Seq(2, 2, 24, 4, 23, 19, 36, 15, twins.gelu, norm_first=True),
        seq2seq_inputs,
    ),
}

each_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())


def cast(inputs, dtype):
    return tuple(value.to(dtype) if value.is_floating_point() else value for value in inputs)


def dtype_of(model):
    return next(model.parameters()).dtype


def outputs(model, inputs):
    """Every tensor that the model returns, by name."""
    found = model(*cast(inputs, dtype_of(model)))
    found = found if isinstance(found, tuple) else (found,)
    return {f"output {number}": value for number, value in enumerate(found) if value is not None}


def backward(model, inputs, directions):
    """The outputs, their sum in the given directions, and every gradient, by name."""
    inputs = tuple(
        value.to(dtype_of(model)).clone().requires_grad_() if value.is_floating_point() else value for value in inputs
    )
    model.zero_grad(set_to_none=True)
    found = outputs(model, inputs)
    loss = sum(F.mse_loss(value.double(), directions[name]) for name, value in found.items())
    loss.backward()
    found = {name: value.detach() for name, value in found.items()}
    found["loss"] = loss.detach().to(dtype_of(model))
    for number, value in enumerate(inputs):
        if value.requires_grad:
            found[f"gradient of input {number}"] = value.grad
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[f"gradient of {name}"] = parameter.grad
    return joined(found)


def directions_for(model, inputs):
    with torch.no_grad():
        return {name: torch.randn(value.shape, dtype=torch.float64) for name, value in outputs(model, inputs).items()}


def joined(tensors):
    """With the projections of BERT's twin, three layers, as the one that they are in fastnn's."""
    found = {}
    for name, value in tensors.items():
        if ".query." in name:
            rest = [tensors[name.replace("query", other)] for other in ("key", "value")]
            found[name.replace("query", "qkv")] = torch.cat([value, *rest])
        elif ".key." not in name and ".value." not in name:
            found[name] = value
    return found


def part(name, tensors):
    """A gradient, without what is zero but for rounding: the keys' biases, since softmax knows differences alone."""
    value = tensors[name]
    if name.endswith(("in_proj_bias", "c_attn.bias", "qkv.bias")):
        query, _, values = value.chunk(3)
        return torch.cat([query, values])
    return value


@each_network
def test_state_dict_goes_both_ways(network):
    ours, theirs = network.ours(), network.twin()
    mine, other = ours.state_dict(), theirs.state_dict()
    assert {name: (value.shape, value.dtype) for name, value in mine.items()} == {
        name: (value.shape, value.dtype) for name, value in other.items()
    }
    theirs.load_state_dict(mine)
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, mine[name])
    ours.load_state_dict(network.twin().state_dict())


@each_network
def test_same_as_the_twin_in_float64(network):
    """Outputs and gradients, where rounding hides no mistake in how the layers are connected."""
    ours, theirs = (model.double() for model in network.pair())
    inputs = network.inputs()
    directions = directions_for(theirs, inputs)
    for training in (False, True):
        ours.train(training)
        theirs.train(training)
        found, expected = backward(ours, inputs, directions), backward(theirs, inputs, directions)
        assert found.keys() == expected.keys()
        for name in expected:
            assert relative_error(part(name, found), part(name, expected)) < 1e-9, name


@each_network
@pytest.mark.parametrize("training", [False, True])
def test_output_as_near_to_float64_as_torchs(network, training, no_fallback):
    ours, theirs = (model.train(training) for model in network.pair())
    exact = copy.deepcopy(theirs).double()
    inputs = network.inputs()
    with torch.no_grad():
        mine, other, truth = (outputs(model, inputs) for model in (ours, theirs, exact))
    for name, value in truth.items():
        assert_as_near_as_torch(mine[name], other[name], value, what=name)


@each_network
def test_trains_as_near_to_float64_as_torch(network):
    """Ten steps: all gradients of the first, the loss of each, and the parameters after the last."""
    ours, theirs = network.pair()
    exact = copy.deepcopy(theirs).double()
    inputs = network.inputs()
    directions = directions_for(exact, inputs)
    every = (ours, theirs, exact)
    optimizers = [torch.optim.SGD(model.parameters(), lr=network.rate, momentum=0.9) for model in every]
    losses = []
    for step in range(10):
        results = [backward(model, inputs, directions) for model in every]
        losses.append([result.pop("loss") for result in results])
        if step == 0:
            assert_near(*results)
        for optimizer in optimizers:
            optimizer.step()
    assert losses[-1][2] < losses[0][2]
    ours_losses, their_losses, exact_losses = map(torch.stack, zip(*losses, strict=True))
    assert_as_near_as_torch(ours_losses, their_losses, exact_losses, factor=4, roundoffs=16, what="losses")
    assert_near(*(joined(dict(model.named_parameters())) for model in every))


def assert_near(ours, theirs, exact):
    assert ours.keys() == theirs.keys() == exact.keys()
    for name in exact:
        values = (part(name, tensors).detach() for tensors in (ours, theirs, exact))
        assert_as_near_as_torch(*values, factor=4, roundoffs=8, what=name)


@each_network
def test_copies(network):
    """A copy computes the same bits, on layers of its own."""
    model = network.ours().eval()
    inputs = network.inputs()
    with torch.no_grad():
        expected = outputs(model, inputs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
        with torch.no_grad():
            for name, value in outputs(other, inputs).items():
                assert torch.equal(value, expected[name])


@each_network
def test_reverts_to_torchs_layers_and_back(network):
    model = fastnn.convert(network.ours().eval())
    kinds = [type(module) for module in model.modules()]
    inputs = network.inputs()
    # The models' own classes, of which ViT's hold the class's token and the positions.
    for row in fastnn.report(model).not_replaced:
        assert row.kind.startswith("fastnn.models."), row
    with torch.no_grad():
        expected = outputs(model, inputs)
        fastnn.revert(model)
        assert not any(
            type(module).__module__.startswith("fastnn.nn") and not type(module).__name__.startswith("Torch")
            for module in model.modules()
        )
        for name, value in outputs(model, inputs).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
        assert [type(module) for module in fastnn.convert(model).modules()] == kinds
        for name, value in outputs(model, inputs).items():
            assert torch.equal(value, expected[name])


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gpt", ["gelu_tanh"] * 2), ("bert", ["gelu", "gelu", "tanh"]), ("vit", ["gelu"] * 2)],
)
def test_activations_run_in_the_products_before_them(name, expected, monkeypatch):
    fused, original = [], fastnn.functional.linear_act

    def spy(input, weight, bias, activation):
        fused.append(activation)
        return original(input, weight, bias, activation)

    monkeypatch.setattr(fastnn.functional, "linear_act", spy)
    with torch.no_grad():
        outputs(NETWORKS[name].ours().eval(), NETWORKS[name].inputs())
    assert fused == expected


@pytest.mark.parametrize("name", ["gpt", "bert", "vit", "seq2seq"])
def test_traces_whole(name):
    model = NETWORKS[name].ours().eval()
    inputs = NETWORKS[name].inputs()
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        expected = outputs(model, inputs)
        for output, value in outputs(compiled, inputs).items():
            torch.testing.assert_close(value, expected[output])


@each_network
def test_dropout(network):
    """With it a call in training mode depends on the random numbers; one in eval mode does not."""
    model, _ = network.pair()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    inputs = network.inputs()
    with torch.no_grad():
        results = []
        for seed, training in ((1, True), (1, True), (2, True), (1, False), (2, False)):
            torch.manual_seed(seed)
            results.append(outputs(model.train(training), inputs)["output 0"])
    first, again, other, evaluated, evaluated_again = results
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(evaluated, evaluated_again) and not torch.equal(first, evaluated)


# ---- what is published of them -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "parameters", "entries"),
    [
        (models.gpt2, 124_439_808, 149),
        # GPT-2-medium.
        (lambda: models.gpt2(n_layer=24, n_head=16, n_embd=1024), 354_823_168, 293),
        (models.bert_base, 109_482_240, 199),
        # BERT-large.
        (
            lambda: models.Bert(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
            335_141_888,
            391,
        ),
        (models.vit_b_16, 86_567_656, 152),
        # ViT-L/32.
        (lambda: models.VisionTransformer(224, 32, 24, 16, 1024, 4096), 306_535_400, 296),
    ],
)
def test_number_of_parameters(make, parameters, entries):
    with torch.device("meta"):
        model = make()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(model.state_dict()) == entries


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (
            models.gpt2,
            {
                "transformer.wte.weight": (50257, 768),
                "transformer.wpe.weight": (1024, 768),
                "transformer.h.0.ln_1.weight": (768,),
                "transformer.h.5.attn.c_attn.weight": (2304, 768),
                "transformer.h.5.attn.c_proj.bias": (768,),
                "transformer.h.11.ln_2.bias": (768,),
                "transformer.h.11.mlp.c_fc.weight": (3072, 768),
                "transformer.h.11.mlp.c_proj.weight": (768, 3072),
                "transformer.ln_f.bias": (768,),
                "lm_head.weight": (50257, 768),
            },
        ),
        (
            models.bert_base,
            {
                "embeddings.word_embeddings.weight": (30522, 768),
                "embeddings.position_embeddings.weight": (512, 768),
                "embeddings.token_type_embeddings.weight": (2, 768),
                "embeddings.LayerNorm.bias": (768,),
                "encoder.layer.0.attention.self.query.weight": (768, 768),
                "encoder.layer.3.attention.self.key.bias": (768,),
                "encoder.layer.3.attention.output.dense.weight": (768, 768),
                "encoder.layer.3.attention.output.LayerNorm.weight": (768,),
                "encoder.layer.11.intermediate.dense.weight": (3072, 768),
                "encoder.layer.11.output.dense.weight": (768, 3072),
                "encoder.layer.11.output.LayerNorm.bias": (768,),
                "pooler.dense.weight": (768, 768),
            },
        ),
        (
            models.vit_b_16,
            {
                "class_token": (1, 1, 768),
                "conv_proj.weight": (768, 3, 16, 16),
                "encoder.pos_embedding": (1, 197, 768),
                "encoder.layers.encoder_layer_0.ln_1.weight": (768,),
                "encoder.layers.encoder_layer_4.self_attention.in_proj_weight": (2304, 768),
                "encoder.layers.encoder_layer_4.self_attention.out_proj.bias": (768,),
                "encoder.layers.encoder_layer_11.mlp.0.weight": (3072, 768),
                "encoder.layers.encoder_layer_11.mlp.3.bias": (768,),
                "encoder.ln.weight": (768,),
                "heads.head.weight": (1000, 768),
            },
        ),
        (
            lambda: models.Seq2SeqTransformer(3, 3, 512, 8, 100, 90),
            {
                "transformer.encoder.layers.0.self_attn.in_proj_weight": (1536, 512),
                "transformer.encoder.layers.2.linear1.weight": (512, 512),
                "transformer.encoder.norm.weight": (512,),
                "transformer.decoder.layers.2.multihead_attn.out_proj.weight": (512, 512),
                "transformer.decoder.layers.0.norm3.bias": (512,),
                "generator.weight": (90, 512),
                "src_tok_emb.embedding.weight": (100, 512),
                "tgt_tok_emb.embedding.weight": (90, 512),
                "positional_encoding.pos_embedding": (5000, 1, 512),
            },
        ),
    ],
)
def test_names_of_the_standard_implementation(make, names):
    with torch.device("meta"):
        state = make().state_dict()
    assert {name: tuple(state[name].shape) for name in names} == names


def test_hugging_faces_gpt2_state_loads():
    """Its linear layers are Conv1D, x @ weight, and old checkpoints carry the masks of the attention."""
    theirs = twins.GPT(**GPT)
    state = {}
    for name, value in theirs.state_dict().items():
        turned = value.dim() == 2 and (".attn." in name or ".mlp." in name)
        state[name] = value.T.clone() if turned else value
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    state["transformer.h.1.attn.masked_bias"] = torch.tensor(-1e4)
    ours = models.GPT(**GPT)
    ours.load_state_dict(models.gpt2_state(state))
    x = tokens(2, 9, 37)
    with torch.no_grad():
        assert relative_error(ours.double()(x), theirs.double()(x)) < 1e-10


def deviation(value, expected):
    """How many standard errors the deviation of a weight is away from what it should be."""
    return abs(value.double().std().item() / expected - 1) * math.sqrt(2 * value.numel())


def test_initialisation():
    model = models.GPT(vocab_size=50, block_size=32, n_layer=3, n_head=4, n_embd=64)
    for name, value in model.named_parameters():
        if value.dim() == 2:
            small = math.sqrt(6) if name.endswith("c_proj.weight") else 1
            assert deviation(value, 0.02 / small) < 5, name
        else:
            assert torch.equal(value, torch.ones_like(value) if name.endswith("weight") else torch.zeros_like(value))
    model = models.Bert(**BERT)
    assert not model.embeddings.word_embeddings.weight[0].any()
    for name, value in model.named_parameters():
        if value.dim() == 2:
            assert deviation(value[1:] if "word" in name else value, 0.02) < 5, name
    model = models.VisionTransformer(32, 8, 1, 2, 64, 128)
    assert not model.heads.head.weight.any() and not model.class_token.any()
    assert deviation(model.conv_proj.weight, (3 * 64) ** -0.5) < 5
    assert deviation(model.encoder.pos_embedding, 0.02) < 5
    assert deviation(model.encoder.layers[0].mlp[0].weight, (2 / 192) ** 0.5) < 5
    model = models.Seq2SeqTransformer(**SEQ2SEQ)
    bound = math.sqrt(6 / (19 + 24))
    assert 0.9 * bound < model.generator.weight.abs().max() <= bound


# ---- arguments ---------------------------------------------------------------------------------------------------


def agree(ours, theirs, *inputs):
    """The two compute the same from the same state, in float64."""
    state = {
        name: value + 0.3 * torch.rand_like(value) if value.is_floating_point() and name.endswith("weight") else value
        for name, value in ours.state_dict().items()
    }
    ours.load_state_dict(state)
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        found, expected = outputs(ours.double(), inputs), outputs(theirs.double(), inputs)
    for name, value in expected.items():
        assert relative_error(found[name], value) < 1e-10


def test_seq2seq_uses_relu_by_default():
    theirs = twins.Seq2Seq(2, 2, 24, 4, 23, 19, 36, 15, F.relu)
    agree(models.Seq2SeqTransformer(**SEQ2SEQ), theirs, *seq2seq_inputs())


def test_vit_arguments():
    stem = [models.ConvStemConfig(6, 3, 2), models.ConvStemConfig(8, 3, 3)]
    ours = models.VisionTransformer(**VIT, representation_size=14, conv_stem_configs=stem).eval()
    theirs = twins.VisionTransformer(24, 6, 2, 2, 20, 36, 10, representation=14, stem=[(6, 3, 2), (8, 3, 3)]).eval()
    agree(ours, theirs, torch.randn(2, 3, 24, 24))
    made = models.VisionTransformer(**VIT, norm_layer=lambda width: nn.LayerNorm(width, eps=1e-2))
    assert {module.eps for module in made.modules() if isinstance(module, nn.LayerNorm)} == {1e-2}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        # One at the start, two in each block; of attention weights the rest.
        (lambda: models.GPT(**GPT | {"dropout": 0.25}), 5),
        (lambda: models.Bert(**BERT | {"hidden_dropout_prob": 0.25}), 5),
        (lambda: models.VisionTransformer(**VIT, dropout=0.25), 7),
    ],
)
def test_dropout_arguments(make, expected):
    assert [module.p for module in make().modules() if isinstance(module, nn.Dropout)] == [0.25] * expected


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: models.GPT(**GPT), (torch.arange(9)[None],)),
        (lambda: models.Bert(**BERT | {"attention_probs_dropout_prob": 0.5}), (torch.arange(9)[None],)),
        (lambda: models.VisionTransformer(**VIT, attention_dropout=0.5), (torch.randn(1, 3, 24, 24),)),
    ],
    ids=["gpt", "bert", "vit"],
)
def test_dropout_of_attention_weights(make, inputs):
    """It alone is on: in training mode two calls differ, in eval mode they do not."""
    model = make()
    if isinstance(model, models.GPT):
        for block in model.transformer.h:
            block.attn.dropout = 0.5
    if isinstance(model, models.VisionTransformer):
        nn.init.normal_(model.heads.head.weight)
    with torch.no_grad():
        assert not torch.equal(*(outputs(model.train(), inputs)["output 0"] for _ in range(2)))
        assert torch.equal(*(outputs(model.eval(), inputs)["output 0"] for _ in range(2)))


def test_bert_positions():
    positions = torch.randperm(13)[:11]
    found = tokens(2, 11, 37)
    agree(models.Bert(**BERT), bert_twin(), found, torch.ones(2, 11), torch.ones_like(found), positions)


def test_bert_looks_at_no_padding():
    model = models.Bert(**BERT).eval()
    found, mask = padded(3, 11, 37)
    changed = torch.where(mask, found, torch.randint(1, 37, found.shape))
    with torch.no_grad():
        for a, b in zip(model(found, mask), model(changed, mask), strict=True):
            if a.dim() == 3:
                assert torch.equal(a[mask], b[mask]) and not torch.equal(a, b)
            else:
                assert torch.equal(a, b)
        assert not torch.equal(model(found)[1], model(changed)[1])


def test_bert_state_dict_is_the_parameters():
    """Not copies of them: as of any module, what is written into it is in the model."""
    model = models.Bert(**BERT)
    for name, value in model.state_dict().items():
        value.fill_(len(name))
    for name, value in model.state_dict().items():
        assert (value == len(name)).all()
    layer = model.encoder["layer"][1].attention["self"]
    assert set(layer.state_dict()) == {
        f"{name}.{kind}" for name in ("query", "key", "value") for kind in ("weight", "bias")
    }
    assert set(layer.state_dict(prefix="a.")) == {f"a.{name}" for name in layer.state_dict()}
    assert layer.state_dict(keep_vars=True)["key.weight"].requires_grad
    assert (layer.qkv.bias.chunk(3)[1] == len("encoder.layer.1.attention.self.key.bias")).all()
    state = model.state_dict()
    del state["encoder.layer.1.attention.self.key.bias"]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)


def test_bert_gives_the_padding_token_no_gradient():
    model = models.Bert(**BERT)
    model(torch.tensor([[5, 7, 0, 0]])).last_hidden_state.square().sum().backward()
    gradient = model.embeddings.word_embeddings.weight.grad
    assert not gradient[0].any() and gradient[5].any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.GPT(n_head=5), "n_head must divide n_embd"),
        (lambda: models.GPT(**GPT)(tokens(1, 17, 37)), "at most 16"),
        (lambda: models.Bert(num_attention_heads=7), "num_attention_heads must divide hidden_size"),
        (lambda: models.Bert(**BERT)(tokens(1, 14, 37)), "at most 13"),
        (lambda: models.Bert(**BERT)(tokens(2, 9, 37), torch.ones(2, 8)), "attention_mask must have the shape"),
        (lambda: models.VisionTransformer(30, 16, 1, 2, 8, 8), "patch_size must divide"),
        (lambda: models.VisionTransformer(**VIT)(torch.randn(1, 3, 24, 30)), "must be 24×24"),
        (lambda: models.Seq2SeqTransformer(**SEQ2SEQ)(tokens(1, 16, 19), tokens(1, 4, 19)), "src must have at most 15"),
        (lambda: models.Seq2SeqTransformer(**SEQ2SEQ)(tokens(1, 4, 19), tokens(1, 16, 19)), "tgt must have at most 15"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- generating --------------------------------------------------------------------------------------------------


@pytest.fixture
def gpt():
    """In float64 and with larger weights than it starts from, so that its predictions differ clearly."""
    model = models.GPT(**GPT).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


def test_gpt_is_causal(gpt):
    """What comes later changes nothing of what came out before."""
    found = tokens(2, 16, 37)
    with torch.no_grad():
        before = gpt(found)
        for t in (0, 7, 14):
            changed = found.clone()
            changed[:, t + 1 :] = (changed[:, t + 1 :] + 1) % 37
            after = gpt(changed)
            torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], rtol=1e-12, atol=1e-12)
            assert (after[:, t + 1] != before[:, t + 1]).any()


@pytest.mark.parametrize("steps", [[1] * 16, [5] + [1] * 11, [3, 4, 1, 8], [16]])
def test_cache_is_recomputation(gpt, steps):
    """The logits of each token, however the tokens before it came into the cache."""
    found = tokens(2, 16, 37)
    cache, logits, seen = models.KVCache(gpt, 2), [], 0
    with torch.no_grad():
        expected = gpt(found)
        for step in steps:
            logits.append(gpt(found[:, seen : seen + step], cache))
            seen += step
            assert cache.length == seen
        torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-11, atol=1e-11)
        with pytest.raises(ValueError, match="16 \\+ 1"):
            gpt(found[:, :1], cache)


def test_cache_with_room_for_few(gpt):
    cache = models.KVCache(gpt, 1, capacity=4)
    with torch.no_grad(), pytest.raises(ValueError, match="at most 4"):
        gpt(tokens(1, 5, 37), cache)
    assert cache.length == 0


@pytest.mark.parametrize("keep", [1, 3, 20])
def test_logits_to_keep(gpt, keep):
    found = tokens(2, 9, 37)
    with torch.no_grad():
        torch.testing.assert_close(gpt(found, logits_to_keep=keep), gpt(found)[:, -keep:], rtol=1e-12, atol=1e-12)


def test_logits_to_keep_that_is_negative(gpt):
    with pytest.raises(ValueError, match="logits_to_keep must not be negative, got -3"):
        gpt(tokens(2, 9, 37), logits_to_keep=-3)


@pytest.mark.parametrize("sampling", [dict(do_sample=False), dict(), dict(top_k=4, top_p=0.8, temperature=1.3)])
def test_generate_with_cache_is_generate_without(gpt, sampling):
    """Past block_size as well, where the window moves."""
    prompt = tokens(3, 5, 37)
    found = [
        gpt.generate(prompt, 25, use_cache=use_cache, generator=torch.Generator().manual_seed(3), **sampling)
        for use_cache in (True, False)
    ]
    assert torch.equal(*found) and found[0].shape == (3, 30) and torch.equal(found[0][:, :5], prompt)


def test_generate_without_sampling_takes_the_likeliest(gpt):
    found = prompt = tokens(2, 14, 37)
    twin = twins.GPT(**GPT).double().eval()
    twin.load_state_dict(gpt.state_dict())
    with torch.no_grad():
        for _ in range(6):
            found = torch.cat([found, twin(found[:, -16:])[:, -1:].argmax(-1)], 1)
    assert torch.equal(gpt.generate(prompt, 6, do_sample=False), found)
    # The only token left; and one so cold that it is as good as the only one.
    assert torch.equal(gpt.generate(prompt, 6, top_k=1), found)
    assert torch.equal(gpt.generate(prompt, 6, temperature=1e-4), found)


def test_generate_is_the_generators(gpt):
    prompt = tokens(2, 3, 37)

    def run(seed):
        return gpt.generate(prompt, 12, temperature=2.0, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    # torch's own generator is used where none is given, and only there.
    state = torch.get_rng_state()
    run(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    first = gpt.generate(prompt, 12, temperature=2.0)
    torch.manual_seed(5)
    assert torch.equal(gpt.generate(prompt, 12, temperature=2.0), first)


def test_generate_draws_from_the_distribution(gpt):
    """The share of each token among 20,000 draws is within five deviations of its probability."""
    prompt = tokens(1, 4, 37)
    with torch.no_grad():
        expected = models.probabilities(gpt(prompt)[0, -1], temperature=1.5, top_k=6)
    count = 20_000
    drawn = gpt.generate(
        prompt.expand(count, -1), 1, temperature=1.5, top_k=6, generator=torch.Generator().manual_seed(0)
    )
    share = torch.bincount(drawn[:, -1], minlength=37) / count
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt()).all()
    assert not share[expected == 0].any()


def test_generate_keeps_no_gradient_and_nothing_for_no_tokens(gpt):
    prompt = tokens(2, 3, 37)
    assert torch.equal(gpt.generate(prompt, 0), prompt)
    assert not gpt.generate(prompt, 2).requires_grad
    assert all(parameter.grad is None for parameter in gpt.parameters())


@pytest.mark.parametrize(
    ("prompt", "arguments", "message"),
    [
        (torch.zeros(2, 0, dtype=torch.long), {}, "tokens must have the shape"),
        (torch.zeros(3, dtype=torch.long), {}, "tokens must have the shape"),
        (torch.zeros(1, 3, dtype=torch.long), dict(max_new_tokens=-1), "max_new_tokens must not be negative"),
        (torch.zeros(1, 3, dtype=torch.long), dict(temperature=0.0), "temperature must be"),
        (torch.zeros(1, 3, dtype=torch.long), dict(temperature=math.inf), "temperature must be"),
        (torch.zeros(1, 3, dtype=torch.long), dict(top_k=0), "top_k must be"),
        (torch.zeros(1, 3, dtype=torch.long), dict(top_k=2.5), "top_k must be"),
        (torch.zeros(1, 3, dtype=torch.long), dict(top_p=0.0), "top_p must be"),
        (torch.zeros(1, 3, dtype=torch.long), dict(top_p=1.1), "top_p must be"),
    ],
)
def test_generate_refuses(gpt, prompt, arguments, message):
    with pytest.raises(ValueError, match=message):
        gpt.generate(prompt, **{"max_new_tokens": 2} | arguments)


# ---- the distribution that is drawn from ---------------------------------------------------------------------------


def by_the_formula(logits, temperature=1.0, top_k=None, top_p=None):
    """One row, token by token: exp, the k largest, then the fewest of the largest that reach p."""
    weights = [math.exp(value / temperature) for value in logits]
    total = sum(weights)
    found = [weight / total for weight in weights]
    if top_k is not None:
        least = sorted(found, reverse=True)[: top_k or None][-1]
        found = [value if value >= least else 0.0 for value in found]
        found = [value / sum(found) for value in found]
    if top_p is not None:
        kept, reached = set(), 0.0
        for token in sorted(range(len(found)), key=lambda token: -found[token]):
            if reached >= top_p:
                break
            kept.add(token)
            reached += found[token]
        found = [value if token in kept else 0.0 for token, value in enumerate(found)]
    total = sum(found)
    return torch.tensor([value / total for value in found], dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("top_k", [None, 1, 3, 11, 50])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.35, 0.9, 1.0])
def test_probabilities(temperature, top_k, top_p):
    logits = 3 * torch.randn(2, 4, 11, dtype=torch.float64)
    arguments = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    found = models.probabilities(logits, **arguments)
    assert found.shape == logits.shape and found.dtype == torch.float64
    for row, values in zip(found.flatten(0, 1), logits.flatten(0, 1).tolist(), strict=True):
        torch.testing.assert_close(row, by_the_formula(values, **arguments), rtol=1e-12, atol=1e-15)


def test_probabilities_of_equal_and_of_impossible_tokens():
    logits = torch.tensor([1.0, 2.0, 2.0, -torch.inf, 2.0])
    third = pytest.approx(1 / 3)
    assert models.probabilities(logits, top_k=2).tolist() == [0.0, third, third, 0.0, third]
    assert models.probabilities(logits, top_p=0.2).tolist() == [0.0, 1.0, 0.0, 0.0, 0.0]
    assert models.probabilities(logits)[3] == 0
    for dtype in (torch.bfloat16, torch.float16):
        assert models.probabilities(logits.to(dtype)).dtype == torch.float32


# ---- the encoder-decoder -------------------------------------------------------------------------------------------


def test_seq2seq_decodes_as_the_twin():
    """One row at a time, the whole sequence again for each token."""
    ours, theirs = (model.double().eval() for model in NETWORKS["seq2seq"].pair())
    src, _, padding, _ = seq2seq_inputs()
    found = ours.greedy_decode(src, 12, start_symbol=1, src_padding_mask=padding)
    assert found.shape == (3, 12)
    for row in range(3):
        source = src[row : row + 1][:, ~padding[row]]
        expected = torch.tensor([[1]])
        with torch.no_grad():
            while expected.shape[1] < 12:
                expected = torch.cat([expected, theirs(source, expected)[:, -1:].argmax(-1)], 1)
        assert torch.equal(found[row], expected[0])


def test_seq2seq_ends():
    ours, _ = (model.double().eval() for model in NETWORKS["seq2seq"].pair())
    src = tokens(4, 9, 23)
    free = ours.greedy_decode(src, 12, start_symbol=1)
    end = free[0, 3].item()
    found = ours.greedy_decode(src, 12, start_symbol=1, end_symbol=end)
    for row, all_of_it in zip(found.tolist(), free.tolist(), strict=True):
        stop = all_of_it.index(end, 1) if end in all_of_it[1:] else len(all_of_it)
        kept = min(stop, len(row))
        assert row[:kept] == all_of_it[:kept]
        assert set(row[stop:]) <= {end}
    alone = ours.greedy_decode(src[:1], 12, start_symbol=1, end_symbol=end)
    assert alone.shape[1] == free[0].tolist().index(end, 1) + 1


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_seq2seq_decodes_with_a_cache_as_without(norm_first, padded, monkeypatch):
    model = models.Seq2SeqTransformer(**{**SEQ2SEQ, "norm_first": norm_first}).double().eval()
    src, padding = tokens(4, 9, 23), None
    if padded:
        padding = torch.arange(9) >= torch.tensor([9, 5, 1, 7])[:, None]
    options = dict(start_symbol=1, src_padding_mask=padding)
    expected = model.greedy_decode(src, 14, **options, use_cache=False)
    passes = []
    monkeypatch.setattr(model, "decode", lambda *_: passes.append(1))
    assert torch.equal(model.greedy_decode(src, 14, **options), expected)
    assert torch.equal(model.greedy_decode(src, 14, **options, end_symbol=99), expected)
    assert torch.equal(model.greedy_decode(src, 1, **options), torch.ones(4, 1, dtype=torch.long))
    assert not passes
    with torch.no_grad():  # not the tokens alone
        memory = model.encode(src, padding)
        caches = [seq2seq._LayerCache(layer, memory, 13) for layer in model.transformer.decoder.layers]
        monkeypatch.undo()
        for length in range(1, 14):
            last = model._decode_last(expected[:, :length], caches, padding)
            whole = model.decode(expected[:, :length], memory, padding)
            torch.testing.assert_close(last, whole[:, -1:], rtol=1e-12, atol=1e-12)


def test_seq2seq_goes_around_no_layer_that_somebody_looks_at():
    model = models.Seq2SeqTransformer(**SEQ2SEQ).double().eval()
    src = tokens(2, 9, 23)
    expected = model.greedy_decode(src, 8, start_symbol=1)
    seen = []
    hook = model.transformer.decoder.layers[0].register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(model.greedy_decode(src, 8, start_symbol=1), expected)
    assert len(seen) == 7
    hook.remove()

    class Doubled(torch.nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            seen.append(2)
            found, weights = super().forward(*args, **kwargs)
            return 2 * found, weights

    model.transformer.decoder.layers[0].self_attn.__class__ = Doubled
    model.greedy_decode(src, 8, start_symbol=1)
    assert seen.count(2) == 7


def test_seq2seq_decodes_no_further_than_it_has_places():
    model = models.Seq2SeqTransformer(**{**SEQ2SEQ, "maxlen": 10}).eval()
    src = tokens(2, 9, 23)
    assert model.greedy_decode(src, 11, start_symbol=1).shape == (2, 11)
    for use_cache in (True, False):
        with pytest.raises(ValueError, match="tgt must have at most 10 tokens, got 11"):
            model.greedy_decode(src, 12, start_symbol=1, use_cache=use_cache)


def test_seq2seq_is_causal_in_the_target():
    model = models.Seq2SeqTransformer(**SEQ2SEQ).eval()
    src, tgt = tokens(2, 9, 23), tokens(2, 7, 19)
    changed = tgt.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 19
    with torch.no_grad():
        before, after = model(src, tgt), model(src, changed)
    torch.testing.assert_close(after[:, :4], before[:, :4], rtol=1e-6, atol=1e-6)
    assert (after[:, 4] != before[:, 4]).any()


# ---- learning ------------------------------------------------------------------------------------------------------


def test_gpt_learns_a_period():
    model = models.GPT(vocab_size=8, block_size=24, n_layer=2, n_head=2, n_embd=32, dropout=0.0)
    samples = torch.tensor([0, 3, 7, 3, 1]).repeat(10)
    rows = torch.stack([samples[start : start + 25] for start in range(5)])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(200):
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # 3 is followed by 7 and by 1: which of them is known only from the tokens before.
    assert torch.equal(model.eval().generate(rows[:, :7], 18, do_sample=False), rows[:, :25])


def test_parts_of_a_gpt_block_by_themselves():
    """Called without a residual they add none."""
    model = models.GPT(**GPT).eval()
    block = model.transformer["h"][0]
    x = torch.randn(2, 5, block.ln_1.normalized_shape[0])
    y = x + block.attn(block.ln_1(x))
    torch.testing.assert_close(block(x), y + block.mlp(block.ln_2(y)))
