"""One declaration of an op, and all the ways a call can go: kernels with a classic autograd.Function, ``torch.ops.fastnn``
for whatever traces, a Function with rules for ``torch.func`` and forward mode, or the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from .. import _state
from ._library import define
from ._route import EAGER, LIBRARY, TRANSFORM, is_straight, needs_library, resolve, route, wants_grad

Result = Tensor | tuple[Tensor, ...]


class Op:
    """``op(*args)`` runs the op the way that :func:`fastnn.ops._route.route` finds, differentiable in every one.

    schema: as torch.library has it, without defaults: ``"name(Tensor x, Tensor? b, int[] n) -> Tensor"``.
    kernel: on plain tensors that a backend takes, which it only reads.
    reference: the formula in plain torch, differentiable by itself.
    fake: the result's shape, strides and dtype, for tensors without data.
    save: ``(ctx, args, result) -> tensors``: what the derivatives need. Puts everything else on ctx.
    backward: ``(ctx, *grads) -> gradients``, one an argument; ``ctx.saved_tensors`` holds what was saved. It must be made
        of differentiable functions, so that gradients have gradients.
    jvp: ``(ctx, *tangents) -> tangents``, one an argument, None where there is none; likewise. Without it forward-mode
        AD is refused as torch refuses what has no rule.
    vmap: ``(info, in_dims, *args) -> (result, out_dims)``.
    autocast: whether torch.autocast casts the tensors.
    differentiable: how many of the results have gradients, from the first; ``backward`` gets one of None or zeros for the
        others, which are marked.
    of_integers: whether it takes nothing but integers, whose dtype the kernel chose.
    """

    def __init__(
        self,
        schema: str,
        *,
        kernel: Callable[..., Result],
        reference: Callable[..., Result],
        fake: Callable[..., Result],
        save: Callable[..., tuple[Tensor | None, ...]],
        backward: Callable[..., tuple[Any, ...]],
        vmap: Callable[..., tuple[Result, Any]],
        jvp: Callable[..., Result] | None = None,
        autocast: bool = False,
        differentiable: int = 1,
        of_integers: bool = False,
    ) -> None:
        self.name = schema[: schema.index("(")]
        self.kernel = kernel
        self.of_integers = of_integers
        self.reference = reference

        def on_plain(*args: Any) -> Result:
            if _state.settings().backend == "reference":
                return reference(*args)
            return kernel(*_resolved(args))

        def mark(ctx: FunctionCtx, result: Result) -> None:
            results = (result,) if isinstance(result, Tensor) else result
            if len(results) > differentiable:
                ctx.mark_non_differentiable(*results[differentiable:])

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
            ctx.save_for_backward(*save(ctx, inputs, output))
            mark(ctx, output)

        def forward_eager(ctx: FunctionCtx, *args: Any) -> Result:
            result = kernel(*args)
            ctx.save_for_backward(*save(ctx, args, result))
            mark(ctx, result)
            return result

        def forward_transformed(*args: Any) -> Result:
            if needs_library(*(arg for arg in args if isinstance(arg, Tensor))):
                return getattr(torch.ops.fastnn, self.name)(*args)
            return on_plain(*args)

        def setup_transformed(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Result) -> None:
            saved = save(ctx, inputs, output)
            ctx.save_for_backward(*saved)
            ctx.save_for_forward(*saved)
            mark(ctx, output)

        def function(**methods: Callable[..., Any]) -> type[Function]:
            # Made with its name: that of the node in the graph is fixed with the class.
            return type(Function)(self.name, (Function,), {name: staticmethod(f) for name, f in methods.items()})

        self._eager = function(forward=forward_eager, backward=backward)
        self._transformed = function(
            forward=forward_transformed,
            setup_context=setup_transformed,
            backward=backward,
            vmap=vmap,
            **({} if jvp is None else {"jvp": jvp}),
        )
        define(
            schema,
            impl=on_plain,
            fake=fake,
            setup_context=setup_context,
            backward=backward,
            vmap=vmap,
            autocast=autocast,
        )

    def __call__(self, *args: Any, where: str | None = None) -> Result:
        """Raises :class:`fastnn.ops._route.Unsupported` where the call is torch's, unless ``where`` is given."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        # Integers that go along with other numbers (positions, lengths) decide nothing.
        numbers = [tensor for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]
        tensors = numbers if numbers or self.of_integers else tensors
        if where is None:
            # In a backward most often nothing looks on.
            where = EAGER if is_straight(self.name, *tensors) else route(self.name, *tensors)
        if where == EAGER:
            args = _resolved(args)
            return self._eager.apply(*args) if wants_grad(*tensors) else self.kernel(*args)
        if where == LIBRARY:
            return getattr(torch.ops.fastnn, self.name)(*args)
        if where == TRANSFORM:
            return self._transformed.apply(*args)
        return self.reference(*args)


def sample_by_sample(op: Op, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Tensor, int]:
    """What ``vmap`` gives for an op of one result whose samples no larger call can compute: a call each."""
    pairs = [(arg, dim if isinstance(arg, Tensor) else None) for arg, dim in zip(args, in_dims, strict=True)]
    samples = [op(*(arg if dim is None else arg.select(dim, i) for arg, dim in pairs)) for i in range(info.batch_size)]
    return torch.stack(samples), 0


def _resolved(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(resolve(arg) if isinstance(arg, Tensor) else arg for arg in args)
