"""`patch`: torch's own functions run fastnn's, inside the block and the thread that asked for it."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

import fastnn
from fastnn import patch as patch_function
from fastnn._state import fallbacks, reset_fallbacks

patch_module = sys.modules["fastnn.patch"]
assert patch_function is patch_module.patch


@pytest.fixture
def calls(monkeypatch):
    """The names of fastnn's functions that torch's calls were sent to."""
    seen = []

    def spy(function):
        def wrapped(*args, **kwargs):
            seen.append(function.__name__)
            return function(*args, **kwargs)

        wrapped.__name__ = function.__name__
        return wrapped

    for torch_function, ours in list(patch_module.PATCHES.items()):
        monkeypatch.setitem(patch_module.PATCHES, torch_function, spy(ours))
    return seen


def square(*shape):
    return torch.randn(shape or (5, 5))


def convolution(kind, rank):
    function, ones = getattr(F, f"conv{kind}{rank}d"), [1] * (rank - 1)
    return lambda x: function(x.view(1, 1, 25, *ones), torch.ones(1, 1, 3, *ones), stride=2)


CALLS = {
    **{f"conv{kind}{rank}d": [convolution(kind, rank)] for kind in ("", "_transpose") for rank in (1, 2, 3)},
    "linear": [lambda x: F.linear(x, x), lambda x: F.linear(x, x, bias=x[0]), lambda x: torch.nn.Linear(5, 3)(x)],
    "bilinear": [lambda x: F.bilinear(x, x, torch.ones(2, 5, 5))],
    "batch_norm": [
        lambda x: F.batch_norm(x, x[0].clone(), x[1].abs()),
        lambda x: F.batch_norm(x, None, None, x[0], training=True),
        lambda x: torch.batch_norm(x, x[0], x[1], None, None, True, 0.1, 1e-5, False),
        torch.nn.BatchNorm1d(5),
    ],
    "scaled_dot_product_attention": [
        lambda x: F.scaled_dot_product_attention(x, x, x),
        lambda x: F.scaled_dot_product_attention(x, x, x, None, 0.0, True, scale=2.0),
        lambda x: torch.nn.functional.scaled_dot_product_attention(query=x, key=x, value=x, attn_mask=x > -1),
    ],
    "relu": [F.relu, torch.relu, lambda x: x.relu(), lambda x: F.relu(x.clone(), inplace=True)],
    "softmax": [
        lambda x: F.softmax(x, 1),
        lambda x: torch.softmax(x, 0, torch.float64),
        lambda x: x.softmax(-1),
        lambda x: torch.special.softmax(x, 1),
        torch.nn.Softmax(1),
    ],
    "log_softmax": [
        lambda x: F.log_softmax(x, 1, dtype=torch.float64),
        lambda x: torch.log_softmax(x, 0),
        lambda x: x.log_softmax(-1),
        lambda x: torch.special.log_softmax(x, 1),
        torch.nn.LogSoftmax(1),
    ],
    "cross_entropy": [
        lambda x: F.cross_entropy(x, torch.arange(5)),
        lambda x: torch.nn.CrossEntropyLoss(label_smoothing=0.1)(x, torch.eye(5)),
    ],
    "softmin": [lambda x: F.softmin(x, 1)],
    "relu6": [F.relu6, lambda x: F.relu6(x.clone(), inplace=True)],
    "hardtanh": [torch.nn.ReLU6(), lambda x: F.hardtanh(x, 0, 6.0), F.hardtanh],
    "dropout": [
        lambda x: F.dropout(x, 0.0),
        lambda x: F.dropout(x, training=False),
        lambda x: torch.dropout(x, 1.0, True),
        torch.nn.Dropout(1.0),
    ],
    "embedding": [
        lambda x: F.embedding(torch.tensor([4, 0]), x),
        lambda x: torch.embedding(x, torch.tensor([4, 0])),
        lambda x: F.embedding(torch.tensor([1]), x, padding_idx=1, sparse=True),
        lambda x: torch.nn.Embedding.from_pretrained(x)(torch.tensor([3])),
    ],
    "gelu": [F.gelu, lambda x: F.gelu(x, approximate="tanh")],
    "silu": [F.silu, lambda x: F.silu(x.clone(), inplace=True)],
    "sigmoid": [F.sigmoid, torch.sigmoid, lambda x: x.sigmoid(), torch.nn.Sigmoid()],
    "tanh": [F.tanh, torch.tanh, lambda x: x.tanh()],
    "matmul": [torch.matmul, lambda x: x @ x, lambda x: x.matmul(x), torch.linalg.matmul],
    "mm": [lambda x: torch.mm(x, x), lambda x: x.mm(x), lambda x: torch.mm(input=x, mat2=x)],
    "bmm": [lambda x: torch.bmm(x[None], x[None]), lambda x: x[None].bmm(x[None])],
    "addmm": [
        lambda x: torch.addmm(x, x, x, beta=2, alpha=0.5),
        lambda x: x.addmm(x, x),
        lambda x: torch.addmm(x[0], x, x),
    ],
    "baddbmm": [lambda x: torch.baddbmm(x, x[None], x[None]), lambda x: x[None].baddbmm(x[None], x[None])],
    "mv": [lambda x: torch.mv(x, x[0]), lambda x: x.mv(x[0])],
}
CALLS["multi_head_attention_forward"] = [
    lambda x: torch.nn.MultiheadAttention(5, 1)(x, x, x),
    lambda x: torch.nn.MultiheadAttention(5, 1, batch_first=True).eval()(x[None], x[None], x[None], need_weights=False),
]
CALLS["conv2d"].append(lambda x: torch.nn.Conv2d(1, 2, 3, padding=1)(x[None]))
CALLS["conv1d"].append(lambda x: torch.conv1d(x, x[:, :, None], bias=x[0]))
CALLS |= {
    "max_pool1d": [lambda x: F.max_pool1d(x, 2), lambda x: torch.max_pool1d(x, 2)],
    "max_pool2d": [
        lambda x: F.max_pool2d(x[None], 2),
        lambda x: F.max_pool2d(x[None], 2, return_indices=True)[1],
        lambda x: F.max_pool2d_with_indices(x[None], 2)[0],
        lambda x: torch.max_pool2d(x[None], 2, 1),
        lambda x: torch.nn.MaxPool2d(2)(x[None]),
    ],
    "avg_pool2d": [lambda x: F.avg_pool2d(x[None], 2, 1), lambda x: torch.nn.AvgPool2d(2)(x[None])],
    "adaptive_avg_pool2d": [lambda x: F.adaptive_avg_pool2d(x[None], (1, 2))],
    "adaptive_max_pool2d": [lambda x: F.adaptive_max_pool2d(x[None], 2, True)[1]],
}
CALLS["matmul"][0] = lambda x: torch.matmul(x, x)
CALLS["matmul"][3] = lambda x: torch.linalg.matmul(x, x)


@pytest.mark.parametrize("name", CALLS)
def test_sends_torchs_functions_to_fastnn(name, calls, no_fallback):
    for call in CALLS[name]:
        x = square()
        torch.manual_seed(1)
        expected = call(x)
        assert calls == []
        torch.manual_seed(1)
        with fastnn.patch():
            output = call(x)
        assert calls == [name]
        torch.testing.assert_close(output, expected)
        del calls[:]


ONE_VALUE = torch.randn(1, 4, 1)
MATRIX, WHERE = torch.randn(5, 3), torch.tensor([1, 4])
INSTANCE = (None, None, None, None, True, 0.1, 1e-5, False)
#: Calls that torch.X and F.X do not answer alike.
CHECKED_LESS = {
    "group norm of one value a group": lambda: torch.group_norm(ONE_VALUE, 4),
    "group norm of a vector": lambda: torch.group_norm(ONE_VALUE[0, :, 0], 1),
    "group norm with no groups": lambda: torch.group_norm(ONE_VALUE, 0),
    "instance norm of one value a channel": lambda: torch.instance_norm(ONE_VALUE, *INSTANCE),
    "instance norm of a matrix": lambda: torch.instance_norm(ONE_VALUE[:, :, 0], *INSTANCE),
    "instance norm of a vector": lambda: torch.instance_norm(ONE_VALUE[0, :, 0], *INSTANCE),
    "batch norm of one value a channel": lambda: torch.batch_norm(ONE_VALUE, *INSTANCE),
    "batch norm of a vector": lambda: torch.batch_norm(ONE_VALUE[0, :, 0], *INSTANCE),
    "dropout with a p of 2": lambda: torch.dropout(MATRIX, 2, True),
    "dropout with a p of 2.0 in eval": lambda: torch.dropout(MATRIX, 2.0, False),
    "dropout with a negative p": lambda: torch.dropout(MATRIX, p=-0.5, train=True),
    "dropout with a p that is NaN": lambda: torch.dropout(MATRIX, float("nan"), True),
    "embedding with a padding beyond": lambda: torch.embedding(MATRIX, WHERE, 99),
    "embedding with a padding before": lambda: torch.embedding(MATRIX, WHERE, -7),
    "embedding with a padding that is no row": lambda: torch.embedding(MATRIX, WHERE, -2),
    "embedding in a vector": lambda: torch.embedding(MATRIX[0], WHERE),
}


@pytest.mark.parametrize("name", CHECKED_LESS)
def test_checks_what_torchs_own_function_checks(name, calls):
    def answer():
        try:
            return CHECKED_LESS[name]()
        except Exception as error:
            return type(error)

    expected = answer()
    with fastnn.patch():
        found = answer()
    assert len(calls) == 1
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected)
    else:
        assert found is expected


def test_a_padding_that_is_no_row_has_its_gradient():
    for padding in (-7, -1, 4, 99):
        weight = MATRIX.clone().requires_grad_()
        expected = torch.autograd.grad(torch.embedding(weight, WHERE, padding).sum(), weight)
        with fastnn.patch():
            found = torch.autograd.grad(torch.embedding(weight, WHERE, padding).sum(), weight)
        torch.testing.assert_close(found, expected)


def test_gradients_go_through(calls):
    x = square().requires_grad_()
    with fastnn.patch():
        (x @ x).relu().sum().backward()
    got, x.grad = x.grad, None
    (x @ x).relu().sum().backward()
    torch.testing.assert_close(got, x.grad)


def test_nested_as_a_decorator_and_with_exceptions(calls):
    x = square()

    @fastnn.patch()
    def inside():
        return x @ x

    with fastnn.patch():
        with fastnn.patch():
            x @ x
            inside()
        x @ x
        with pytest.raises(RuntimeError), fastnn.patch():
            x @ torch.ones(3, 3)
        x @ x
    assert calls == ["matmul"] * 5
    x @ x
    inside()
    inside()
    assert calls == ["matmul"] * 7
    assert _get_current_function_mode_stack() == []


def test_holds_for_its_own_thread(calls):
    x = square()
    inside, done = threading.Event(), threading.Event()

    def patched():
        with fastnn.patch():
            inside.set()
            assert done.wait(30)
            return x @ x

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(patched)
        assert inside.wait(30)
        x @ x
        assert calls == []
        done.set()
        future.result()
    assert calls == ["matmul"]


def test_many_threads_at_once():
    x = square(64, 64)
    expected = x @ x

    def work(number):
        with fastnn.patch():
            one = x @ x
            with fastnn.patch():
                two = torch.mm(x, x)
        assert _get_current_function_mode_stack() == []
        return (one - expected).abs().max() + (two - expected).abs().max()

    with ThreadPoolExecutor(16) as pool:
        assert max(pool.map(work, range(200))) < 1e-3


def test_changes_nothing_in_torch():
    before = (F.linear, torch.matmul, torch.Tensor.matmul, torch.nn.Linear.forward, torch.Tensor.__matmul__)
    with fastnn.patch():
        assert before == (
            F.linear,
            torch.matmul,
            torch.Tensor.matmul,
            torch.nn.Linear.forward,
            torch.Tensor.__matmul__,
        )


def test_what_fastnn_hands_back_reaches_torch_once(calls):
    x = torch.ones(3, 3, dtype=torch.int64)
    reset_fallbacks()
    with fastnn.patch(), fastnn.patch():
        assert torch.equal(x @ x, torch.full((3, 3), 3))
    assert calls == ["matmul"]
    assert sum(fallbacks().values()) == 1
    with fastnn.patch(), fastnn.backend("reference"):
        y = square()
        torch.testing.assert_close(y @ y, torch.mm(y, y))


def test_deprecated_and_extra_overloads_stay_torchs(calls):
    x = square()
    with pytest.warns(UserWarning, match="deprecated"):
        expected = torch.addmm(2, x, 3, x, x)
    with fastnn.patch():
        torch.testing.assert_close(torch.addmm(2, x, 3, x, x), expected)
    assert calls == []


def test_out_argument(calls):
    x, out = square(), torch.empty(5, 5)
    with fastnn.patch():
        assert torch.mm(x, x, out=out) is out
    torch.testing.assert_close(out, x @ x)


def test_same_errors():
    x = square()
    for call in (
        lambda: x @ torch.ones(3, 3),
        lambda: torch.mm(x, x[0]),
        lambda: F.linear(x, torch.ones(3, 4)),
        lambda: x @ 3,
        lambda: torch.matmul(x),
        lambda: torch.bmm(x, x),
    ):
        with pytest.raises(Exception) as expected:
            call()
        with pytest.raises(expected.type), fastnn.patch():
            call()


def test_other_tensor_types_and_modes_keep_their_say(calls):
    class Tagged(torch.Tensor):
        pass

    class Count(TorchFunctionMode):
        seen = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen += 1
            return func(*args, **(kwargs or {}))

    x = square()
    with fastnn.patch():
        assert type(x.as_subclass(Tagged) @ x) is Tagged
        assert calls == []
        with Count() as inner:
            x @ x
        assert inner.seen == 1
        assert calls == ["matmul"]
        with torch.device("meta"):
            assert torch.empty(3).is_meta
    with Count() as outer, fastnn.patch():
        x.sum()
        assert outer.seen == 1


def test_a_whole_model_trains_under_it(no_fallback):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 2))
    x = torch.randn(32, 8)
    losses = []
    for patched in (False, True):
        torch.manual_seed(1)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            if patched:
                with fastnn.patch():
                    loss = model(x).square().mean()
                    loss.backward()
            else:
                loss = model(x).square().mean()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inside", [False, True])
def test_with_compile(inside):
    x = square()
    graphs = []

    def backend(module, inputs):
        graphs.append(str(module.graph))
        return module.forward

    def patched(a):
        with fastnn.patch():
            return (a @ a).relu()

    def plain(a):
        return (a @ a).relu()

    torch._dynamo.reset()
    compiled = torch.compile(patched if inside else plain, backend=backend, fullgraph=True)
    if inside:
        output = compiled(x)
    else:
        with fastnn.patch():
            output = compiled(x)
    torch.testing.assert_close(output, plain(x))
    assert "torch.ops.fastnn.matmul" in graphs[0]
    assert _get_current_function_mode_stack() == []
