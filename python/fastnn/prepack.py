"""``fastnn.prepack_(model)``: keeps the weights of linear layers in the order in which the kernels read them."""

from __future__ import annotations

import warnings

from ._modules import Model, check_model
from .nn.linear import PackableWeight
from .ops.packed_linear import PackedWeight, why_not


def prepack_(model: Model) -> Model:
    """Keep a packed copy of the weight of each fastnn linear layer, for inference; return the model.

    A matrix product copies its operands into blocks before it multiplies. For a weight that does not change, that work
    can be done once. It takes as much memory again as the weights (three bfloat16 parts, half as much more, where float32
    is multiplied in split bfloat16 parts). Where a gradient is needed, under autocast, under ``torch.compile``, and for
    small products (fewer than 16 rows, or than a million multiplications), which are done sooner with the weight where
    it lies, the packed copy is not used.

    A packed copy is given up, and the layer goes on without one, as soon as a call sees that the weight is another
    tensor, is at another address, has another dtype, or has another version counter: that covers in-place operations,
    optimizer steps, ``load_state_dict``, ``.data = ...``, ``to(dtype)`` and swapped parameters. Call ``prepack_`` again
    after such a change. While another instruction set or ``torch.set_float32_matmul_precision`` is in force than at the
    time of packing, the copy rests. :func:`fastnn.revert` drops all copies; ``copy.deepcopy``, pickle and ``torch.save``
    leave them behind.

    **Not seen:** writes that change no version counter, which are those through ``weight.data`` (such as
    ``weight.data.copy_(...)`` or ``weight.data[0] = 1``), through ``weight.numpy()`` or ``weight.detach().numpy()``, and
    through any other pointer to the memory. After those, call ``prepack_`` again. (The fused steps of ``torch.optim``
    change no version counter either; those are seen, because the copies watch the optimizers.)

    Layers whose weight cannot be packed (not a plain dense float32, float64, bfloat16 or float16 CPU tensor; recomputed at
    each call, as by ``weight_norm`` or pruning) are left as they are. Warns if nothing was packed.

    Raises:
        TypeError: ``model`` is no module.
    """
    check_model("prepack_", model)
    layers = [module for module in model.modules() if isinstance(module, PackableWeight)]
    packed = 0
    reasons: set[str] = set()
    for layer in layers:
        layer.__dict__.pop("_packed_weight", None)
        weight = layer._parameters.get(layer.packed_parameter)
        reason = why_not(weight) if weight is not None else "its weight is computed at each call"
        if reason is None:
            layer.__dict__["_packed_weight"] = PackedWeight(weight, transposed=layer.weight_is_transposed)
            packed += 1
        else:
            reasons.add(reason)
    if not packed:
        why = "; ".join(sorted(reasons)) if reasons else "it has no fastnn linear layer; call fastnn.convert first"
        warnings.warn(f"prepack_: nothing to pack in this model: {why}", stacklevel=2)
    return model
