"""Compiles each Triton kernel for the architecture in argv, without a GPU, and prints as JSON what came out.

A process of its own: the interpreter, which the other tests run, is chosen when Triton is imported.
"""

import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastnn.backends.reference.quantize import PACKED
from fastnn.backends.triton import (
    _scores,
    attention_backward,
    attention_decode,
    attention_forward,
    conv,
    cross_entropy,
    dropout,
    elementwise,
    embedding,
    fake_quantize,
    gemm,
    int8_conv,
    int8_linear,
    layer_norm,
    norm,
    pool,
    quantize,
    reduce,
    scaled_mm,
    softmax,
    tree_binning,
    tree_borders,
    tree_children,
    tree_histograms,
    tree_nodes,
    tree_rows,
    weight_only,
)

LARGE, SMALL = (128, 128, 8, 3), (64, 64, 4, 4)


def compiled(kernel, types, constants, arch, anything=(), **options):
    """``types`` of arguments; all others are ``constants``. Sizes and addresses are multiples of 16, as they mostly are, but
    those that may be ``anything``."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    at = {name: i for i, name in enumerate(kernel.arg_names)}
    known = {(at[name],): constants.get(name) for name in at if name not in types}
    divisible = {}
    for name, type in types.items():
        if name in anything:
            continue
        if isinstance(type, tuple):  # such as strides, of which the last is 1
            for i, part in enumerate(type):
                if part == "constexpr":
                    known[at[name], i] = 1
                else:
                    divisible[at[name], i] = [["tt.divisibility", 16]]
        elif type.startswith(("*", "i")):
            divisible[at[name],] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, known, divisible)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": True, **options})


def products(arch):
    strides = {f"{name}_strides": ("i32", "constexpr") for name in ("a", "b", "c", "residual")}
    batches = {name: ("i32",) for name in ("batch", "a_batch", "b_batch", "c_batch", "residual_batch")}
    numbers = dict(m="i32", n="i32", k="i32", a_step="i32", b_step="i32", alpha="fp32", beta="fp32")
    cases = [
        ("fp32", "fp32", 3, SMALL),
        ("bf16", "bf16", 0, LARGE),
        ("fp16", "fp16", 0, SMALL),
        ("i8", "i8", 0, SMALL),
        ("u8", "i8", 0, SMALL),
    ]
    for a, b, parts, (rows, columns, warps, stages) in cases:
        c = "fp32" if a in ("i8", "u8") else a
        pointers = dict(a=f"*{a}", b=f"*{b}", c=f"*{c}", bias=f"*{c}", residual=f"*{c}")
        constants = dict(
            bias_stride=1,
            ACTIVATION="gelu",
            PARTS=parts,
            GROUP=512,
            DIMS=1,
            EVEN_K=False,
            BLOCK_M=rows,
            BLOCK_N=columns,
            BLOCK_K=64 if c != a else 32,
            BAND=8,
        )
        types = {**pointers, **strides, **batches, **numbers}
        yield a, compiled(gemm.multiply, types, constants, arch, num_warps=warps, num_stages=stages)


def convolutions(arch):
    """Of channels-last tensors."""
    image, three = ("i32", "constexpr", "i32", "i32", "i32"), ("i32",) * 3
    for element, parts, (rows, columns, warps, stages) in (("fp32", 3, SMALL), ("bf16", 0, LARGE), ("fp16", 0, SMALL)):
        constants = dict(PARTS=parts, BLOCK_M=rows, BLOCK_N=columns, BLOCK_K=32)
        options = dict(num_warps=warps, num_stages=stages)
        tensors = {name: f"*{element}" for name in ("image", "filters", "out", "residual", "bias")}
        axes = [
            "image_size",
            "positions",
            "first",
            "stride",
            "step",
            "taps",
            "tap_first",
            "tap_step",
            "out_first",
            "out_step",
        ]
        types = tensors | dict(images="i32", channels="i32", columns="i32", filter_group="i32")
        types |= {f"{name}_strides": image for name in ("image", "filter", "out")} | {name: three for name in axes}
        activation = dict(ACTIVATION="relu")
        kernel = compiled(conv.implicit, types, constants | activation, arch, {*axes, "images"}, **options)
        yield f"convolution {element}", kernel
        types = dict(x=f"*{element}", y=f"*{element}", partial="*fp32", rows="i32", columns="i32", x_strides=image)
        axes = ["x_size", "y_size", "kernel", "stride", "padding", "dilation"]
        numbers = dict(y_strides=image, groups="i32", pixels="i32", piece="i32") | {name: three for name in axes}
        any_of = {*axes, "groups", "pixels", "piece"}
        kernel = compiled(conv.weight_gradient, types | numbers, constants, arch, any_of, **options)
        yield f"convolution's weight {element}", kernel


def attentions(arch):
    """Of causal masks and, of the queries' gradient, an added one whose gradient is wanted."""
    lies = ("i32", "i32", "i32", "constexpr")
    beside = {name: "i32" for name in (*_scores.COUNTS, "heads", "group")} | dict(log_sum="*fp32", delta="*fp32")
    mask = dict(mask="*fp32", by_scores="*fp32", mask_strides=lies)
    for name, table, element, size, given in (
        ("attention bf16", attention_forward.FORWARD, "bf16", 128, dict(seed="*i64")),
        ("attention fp32", attention_forward.FORWARD, "fp32", 64, {}),
        ("attention by queries fp16", attention_backward.BY_QUERIES, "fp16", 64, mask),
        ("attention of long rows by keys", attention_backward.BY_KEYS, "bf16", 512, {}),
    ):
        kernel, by_keys = (
            attention_forward.forward if table is attention_forward.FORWARD else attention_backward.backward,
            table is attention_backward.BY_KEYS,
        )
        kept, passing, warps, stages = table[size][element == "fp32"]
        names = ("q", "k", "v", "out", "x", "x2", "y", "y2", "by_x", *(["by_x2"] if by_keys else []))
        types = {name: f"*{element}" for name in names} | {f"{name}_strides": lies for name in names}
        types |= beside | given | dict(scale="fp32", kept="fp32")
        constants = {"low" if not by_keys else "high": None, "BY_KEYS": by_keys, "PARTS": 3 if element == "fp32" else 0}
        constants |= dict.fromkeys(("HEAD", "VALUE", "COLUMNS", "VALUE_COLUMNS"), size)
        constants |= dict(QUERIES=kept, KEYS=passing, KEPT=kept, PASSING=passing)
        types = {name: types[name] for name in kernel.arg_names if name in types and name not in constants}
        options = dict(num_warps=warps, num_stages=stages)
        yield name, compiled(kernel, types, constants, arch, set(_scores.COUNTS), **options)


def few_queries(arch):
    """Of a cache, without a mask."""
    lies = ("i32", "i32", "i32", "constexpr")
    known = dict(q="*bf16", k="*bf16", v="*bf16", scale="fp32") | {
        f"{name}_strides": lies for name in ("q", "k", "v", "out")
    }
    known |= dict.fromkeys(("log_sum", "sums", "softmax"), "*fp32")
    numbers = ("length", "keys", "high", "shift", "begin", "end", "each", "splits")
    known |= dict.fromkeys((*numbers, "kv_heads", "heads", "group", "tiles"), "i32")
    (keys, warps, stages), _ = attention_decode.TILES[128]
    constants = dict(WHOLE=False, PARTS=0, ROWS=attention_decode.ROWS, KEYS=keys, SPLITS=32, TOGETHER=16)
    constants |= dict.fromkeys(("HEAD", "VALUE", "COLUMNS", "VALUE_COLUMNS"), 128)
    for name, kernel, out, options in (
        ("attention of few queries", attention_decode.decode, "*fp32", dict(num_warps=warps, num_stages=stages)),
        ("few queries' splits", attention_decode.combine, "*bf16", {}),
    ):
        types = {name: (known | {"out": out})[name] for name in kernel.arg_names if name in known or name == "out"}
        yield name, compiled(kernel, types, constants, arch, set(numbers), **options)


def others(arch):
    matrix = dict(x="*bf16", to="*fp32", rows="i32", columns="i32", row_stride="i32", piece="i32")
    yield "sum_pieces", compiled(reduce.sum_pieces, matrix, dict(column_stride=1, ROWS=32, COLUMNS=64), arch)
    lies = {f"{name}strides": ("i32", "constexpr") for name in ("x_", "saved_", "y_")}
    tensors = dict(x="*bf16", y="*bf16", count="i32", shape=("i32", "i32"), **lies)
    for name, saved in (("activation", {}), ("activation_backward", {"saved": "*bf16"})):
        constants = dict(KIND="gelu_tanh", DIMS=2, BLOCK=1024)
        yield name, compiled(elementwise.each, {**tensors, **saved}, constants, arch)
    types = dict(x="*bf16", y="*bf16", seed="*i64", count="i32", shape=("i32",), threshold="i32", scale="fp32")
    strides = dict(x_strides=("constexpr",), y_strides=("constexpr",))
    yield "dropout", compiled(dropout.drop, types | strides, dict(DIMS=1, BLOCK=1024), arch)
    # A row's stride is 1, those of the rows any.
    sizes = dict(size="i32", shape=("i32", "i32"))
    for log in (False, True):
        constants = dict(LOG=log, DIMS=2, BLOCK=1024)
        for kernel, names in ((softmax.rows_forward, "x y"), (softmax.rows_backward, "grad saved to")):
            types = {name: "*bf16" for name in names.split()} | sizes
            types |= {f"{name}_strides": ("i32", "i32") for name in names.split()}
            steps = {f"{name}_step": 1 for name in names.split()}
            yield f"{kernel.fn.__name__} {log}", compiled(kernel, types, constants | steps, arch)


def quantization(arch):
    lies = {f"{name}_strides": ("i32", "constexpr") for name in ("x", "q")} | {"scale_strides": ("i32", "i32")}
    tensors = dict(x="*bf16", q="*u8", scale="*fp32", zero_point="*i32", count="i32", shape=("i32", "i32"), **lies)
    limits = dict(least="fp32", most="fp32")
    for packed, digits, bias, seed in (
        (False, 0, 0, {}),
        (True, 0, 0, {"seed": "*i64"}),
        (False, 3, 7, {"seed": "*i64"}),
    ):
        constants = dict(PACKED=packed, DIGITS=digits, BIAS=bias, DIMS=2, BLOCK=1024)
        types = tensors | limits | seed
        name = f"{digits} digits, {'packed' if packed else 'bytes'}"
        yield f"quantize {name}", compiled(quantize.quantize_each, types, constants, arch, enable_fp_fusion=False)
        constants |= dict(SIGN=8 if packed else 128, LARGEST=0x7E)
        yield f"dequantize {name}", compiled(quantize.dequantize_each, tensors, constants, arch, enable_fp_fusion=False)
    found = dict(low="*fp32", high="*fp32", scales="i32", pieces="i32")
    dims = {f"{name}_{part}": ("i32",) for name in ("own", "shared") for part in ("shape", "strides")}
    sizes = dict(OWN=1, SHARED=1, SCALES=32, ELEMENTS=64)
    types = dict(x="*bf16", elements="i32", piece="i32", **found, **dims)
    yield "ranges", compiled(quantize.ranges, types, sizes, arch)
    types = dict(scale="*fp32", zero_point="*i32", **found, **limits)
    yield "choose", compiled(quantize.choose, types, dict(BLOCK=128), arch, enable_fp_fusion=False)


def quantized_layers(arch):
    sizes = dict(rows="i32", columns="i32", m="i32", n="i32", k="i32", q_row="i32")
    types = dict(x="*bf16", q="*i8", scale="*fp32", zero_point="*i32", **sizes, x_strides=("i32", "constexpr"))
    types = {name: types[name] for name in int8_linear.quantize_rows.arg_names if name in types}
    constants = dict(EACH=True, ROWS=4, BLOCK=1024)
    kernel = compiled(int8_linear.quantize_rows, types, constants, arch, enable_fp_fusion=False)
    yield "quantize rows", kernel
    types = dict(
        x="*i8", sums="*i32", rows="i32", columns="i32", row_stride="i32", shape=("i32",), strides=("constexpr",)
    )
    yield "sum_rows", compiled(int8_linear.sum_rows, types, dict(DIMS=1, ROWS=4, BLOCK=1024), arch)
    pointers = dict(
        q="*i8", weight="*i8", out="*bf16", scale="*fp32", zero_point="*i32", weight_scale="*fp32", bias="*fp32"
    )
    for name, (rows, columns, warps, stages), sums in (
        ("int8 linear", int8_linear._LARGE, {"sums": "*i32"}),
        ("int8 linear of few rows", int8_linear._FEW, {}),
    ):
        types = pointers | sums | dict(m="i32", n="i32", k="i32", q_row="i32", weight_strides=("i32", "constexpr"))
        constants = dict(scale_step=1, weight_scale_step=1, ACTIVATION="relu", EVEN_K=False)
        constants |= dict(BLOCK_M=rows, BLOCK_N=columns, BLOCK_K=int8_linear._BLOCK_K, BAND=8)
        options = dict(num_warps=warps, num_stages=stages, enable_fp_fusion=False)
        yield name, compiled(int8_linear.multiply, types, constants, arch, **options)


def weight_only_layers(arch):
    numbers = {name: "i32" for name in ("m", "n", "k", "x_row", "weight_row", "group", "groups")}
    for name, element, scheme, (rows, columns, warps, stages), block, given in (
        ("of 4 bits, few rows", "bf16", "uint4", weight_only._FEW, weight_only._FEW_BLOCK_K, dict(GROUPED=True)),
        ("of 8 bits", "bf16", "int8", weight_only._LARGE, weight_only._BLOCK_K, {}),
        ("of float8", "fp32", "float8_e4m3fn", weight_only._LARGE_PARTS, weight_only._PARTS_BLOCK_K, dict(PARTS=3)),
        (
            "scaled first",
            "fp32",
            "int4",
            weight_only._SCALED,
            weight_only.STEP,
            dict(PARTS=3, SCALED=True, GROUPED=True),
        ),
    ):
        types = dict(x=f"*{element}", weight="*u8", out=f"*{element}", scale="*fp32", bias=f"*{element}", **numbers)
        if scheme in PACKED:
            types["zero_point"] = "*i32"
        constants = dict(PARTS=0, SCALED=False, GROUPED=False) | given | quantize.decoding(scheme)
        constants |= dict(PACKED=scheme in PACKED, ACTIVATION="none", EVEN_K=False)
        constants |= dict(BLOCK_M=rows, BLOCK_N=columns, BLOCK_K=block, BAND=8)
        kernel = compiled(weight_only.multiply, types, constants, arch, num_warps=warps, num_stages=stages)
        yield f"weight {name}", kernel


def products_of_float8(arch):
    """As tensor cores take them where there are such: mat_a row by row, mat_b column by column."""
    native = arch >= 89
    types = dict(c="*bf16", scale_a="*fp32", scale_b="*fp32", bias="*bf16")
    types |= dict.fromkeys(("m", "n", "k", "a_step", "b_step"), "i32")
    types |= dict(a_strides=("i32", "constexpr"), b_strides=("constexpr", "i32"))
    for name, b_e4m3, by_row, tiles, widened in (
        ("8-bit floats", True, True, scaled_mm._LARGE, scaled_mm._LARGE_WIDENED),
        ("8-bit floats e5m2", False, False, scaled_mm._SMALL, scaled_mm._SMALL_WIDENED),
    ):
        rows, columns, block, warps, stages = tiles if native else widened
        types |= dict(a="*fp8e4nv", b="*fp8e4nv" if b_e4m3 else "*fp8e5") if native else dict(a="*u8", b="*u8")
        constants = dict(bias_stride=1, A_E4M3=True, B_E4M3=b_e4m3, BY_ROW=by_row, NATIVE=native, FAST=False)
        constants |= dict(EVEN_K=True, BLOCK_M=rows, BLOCK_N=columns, BLOCK_K=block, BAND=8)
        options = dict(num_warps=warps, num_stages=stages)
        yield name, compiled(scaled_mm.multiply_float8, types, constants, arch, **options)


def int8_convolutions(arch):
    """Of channels-last images."""
    image, three = ("i32", "constexpr", "i32", "i32", "i32"), ("i32",) * 3
    tensors = dict(filters="*i8", filter_sums="*i32", x_zero="*i32")
    numbers = (*["*fp32"] * 3, "constexpr", "*fp32", "*i32", "*u8", "*fp32", "*i32")
    known = tensors | dict(numbers=numbers) | dict.fromkeys(("images", "channels", "columns", "groups"), "i32")
    axes = dict.fromkeys(("image_size", "out_size", "taps", "stride", "padding", "dilation"), three)
    known |= axes | {f"{name}_strides": image for name in ("image", "filter", "out")}
    constants = dict(ACTIVATION="relu6", LEAST=0.0, MOST=255.0)
    for kernel, name, element, (rows, columns, warps, stages), step in (
        (int8_conv.tiles, "convolution u8", "u8", LARGE, dict(BLOCK_K=64)),
        (int8_conv.tiles, "convolution i8", "i8", SMALL, dict(BLOCK_K=128)),
        (int8_conv.direct, "convolution of few channels", "u8", (*int8_conv._DIRECT, 1), {}),
    ):
        types = {n: known[n] for n in kernel.arg_names if n in known} | dict(image=f"*{element}", out=f"*{element}")
        sizes = constants | step | dict(BLOCK_M=rows, BLOCK_N=columns)
        options = dict(num_warps=warps, num_stages=stages, enable_fp_fusion=False)
        yield f"int8 {name}", compiled(kernel, types, sizes, arch, {*axes, "images", "groups"}, **options)


def fake_quantization(arch):
    row, spread = ("i32", "constexpr"), ("i32",)
    known = dict(zip(("x", "grad", "out", "to"), ["*bf16"] * 4, strict=True)) | dict(mask="*u8", scale="*fp32")
    known |= dict(
        zero_point="*i32", seed="*i64", by_scale="*fp32", by_zero_point="*fp32", lowest="fp32", highest="fp32"
    )
    known |= dict.fromkeys(("mask_size", "count", "scales", "elements", "piece", "pieces"), "i32")
    known |= {f"{name}_strides": row for name in ("x", "out", "scale", "zero", "grad")} | dict(shape=("i32", "i32"))
    known |= {f"{part}_{name}": spread for part in ("own", "shared") for name in ("shape", "grad", "x", "to", "index")}
    known |= dict(of_scale="*fp32", of_zero_point="*fp32", factor="*fp64")
    constants = dict(AS_TORCH=False, DIMS=2, BYTES=128, OWN=1, SHARED=1, SCALES=32, ELEMENTS=16, BLOCK=128)
    for kernel in (
        *(fake_quantize.round_each, fake_quantize.mask_each),
        *(fake_quantize.sum_gradients, fake_quantize.add_pieces),
    ):
        types = {name: known[name] for name in kernel.arg_names if name in known}
        name = f"fake_quantize: {kernel.fn.__name__}"
        yield name, compiled(kernel, types, constants, arch, enable_fp_fusion=False)


def batch_norms(arch):
    sizes = {name: "i32" for name in ("images", "channels", "groups", "share", "elements", "chunks")}
    half, wide = ("x", "residual", "out", "grad", "to", "to_residual"), ("means", "squares", "sums", "products")
    pointers = {name: "*bf16" for name in half} | {
        name: "*fp64" for name in (*wide, "mean", "var", "by_weight", "by_bias")
    }
    pointers |= dict(weight="*fp32", bias="*fp32", coefficients="*fp32")
    numbers = dict(sqrt_eps="fp32", eps="fp32", weight_stride="i32", bias_stride="i32")
    for layout, channels, elements in (("planes", 1, 4096), ("channels last", 64, 64)):
        lie = ("i32", "i32", "constexpr") if channels == 1 else ("i32", "constexpr", "i32")
        strides = {f"{name}_strides": lie for name in half}
        known = pointers | sizes | numbers | strides | dict(shape=("i32",))
        constants = dict(NARROW=True, DIMS=1, ELEMENTS=elements, CHANNELS=channels, CHUNKS=256, SHARE=1)
        constants |= dict(RELU=True, TRAINING=True)
        for kernel in (
            *(norm.statistics, norm.combine, norm.results),
            *(norm.gradient_sums, norm.combine_gradients, norm.gradients),
        ):
            types = {name: known[name] for name in kernel.arg_names if name in known}
            yield f"{kernel.fn.__name__}, {layout}", compiled(kernel, types, constants, arch)


def norms(arch):
    numbers = dict(share="fp32", unshare="fp32", eps="fp32", sqrt_eps="fp32")
    for kernel, names, given in (
        (layer_norm.rows_forward, "x y", dict(weight="*fp32", bias="*fp32")),
        (layer_norm.rows_backward, "grad x to", dict(weight="*fp32", by_weight="*fp32", by_bias="*fp32")),
    ):
        types = {name: "*bf16" for name in names.split()} | given | numbers
        types |= dict(count="i32", size="i32", shape=("i32",)) | {f"{name}_strides": ("i32",) for name in names.split()}
        constants = {f"{name}_step": 1 for name in names.split()} | dict(CENTERED=True, DIMS=1)
        for rows, block in ((8, 128), (1, 4096)):
            options = dict(ROWS=rows, BLOCK=block, HELD=rows > 1)
            yield f"{kernel.fn.__name__} {block}", compiled(kernel, types, constants | options, arch)
    yield from batch_norms(arch)
    matrix = dict(x="*fp32", to="*fp64", rows="i32", columns="i32", row_stride="i32", piece="i32")
    yield "sum_pieces fp64", compiled(reduce.sum_pieces, matrix, dict(column_stride=1, ROWS=32, COLUMNS=64), arch)


def losses(arch):
    """Of logits whose rows lie dense, and tables of dense rows."""
    numbers = dict(size="i32", shape=("i32", "i32"), ignore_index="i32", base="fp32", hard="fp32")
    numbers |= {name: "*fp64" for name in ("lse", "mass_of", "total")} | dict(
        index="*i64", weight="*fp32", grad="*fp32"
    )
    for indexed, spread in ((True, False), (True, True), (False, True)):
        constants = dict(INDEX=indexed, SPREAD=spread, WEIGHTED=spread, EACH=False, MEAN=True, DIMS=2, BLOCK=1024)
        for kernel, names in ((cross_entropy.forward, "x t out"), (cross_entropy.backward, "x t to")):
            known = numbers | {name: "*bf16" for name in names.split()}
            known |= {f"{name}_strides": ("i32", "i32") for name in names.split()}
            types = {name: known[name] for name in kernel.arg_names if name in known}
            steps = {name: 1 for name in kernel.arg_names if name.endswith("_step")}
            yield (
                f"cross entropy {kernel.fn.__name__} {indexed} {spread}",
                compiled(kernel, types, constants | steps, arch),
            )
    types = dict(losses="*fp64", index="*i64", weight="*fp32", out="*bf16", total="*fp64", positions="i32")
    constants = dict(INDEX=True, WEIGHTED=True, MEAN=True, BLOCK=1024)
    yield "loss sum", compiled(cross_entropy.sum_losses, types | dict(ignore_index="i32"), constants, arch)
    sizes = dict(rows="i32", count="i32", columns="i32", row_stride="i32")
    tile = dict(ROWS=16, COLUMNS=128, column_stride=1, BY_FREQUENCY=True)
    tensors = dict(table="*bf16", indices="*i64", out="*bf16")
    yield "embedding", compiled(embedding.gather, tensors | sizes, tile, arch)
    types = dict(grad="*bf16", order="*i64", begins="*i64", out="*bf16", columns="i32", row_stride="i32", padding="i32")
    yield "embedding backward", compiled(embedding.sum_places, types, tile, arch)


def trees(arch):
    """Of two classes and 256 bins, rows with weights and without."""
    integers = ("sums", "nodes", "weights", "weights_below", "below", "plan", "counts", "above")
    known = {name: "*i32" for name in integers} | {name: "*i64" for name in ("order", "spare")}
    known |= dict(x="*fp32", edges="*fp32", least="*u32", largest="*u32", bins="*u8", min_weight="*fp64")
    known |= dict(proxies="*fp64", words_of="*i32", halves_of="*i16", bytes_of="*u8")
    sizes = ("rows", "columns", "groups", "row_step", "column_step", "slots", "count", "classes", "words", "lines")
    known |= dict.fromkeys((*sizes, "step", "min_split", "min_leaf"), "i32")
    given = dict(GROUP=32, COUNTED=4096, MOVED=1024, NODES=256, TOP=False, DIGITS=1, UPPER=16, LINES=16, SLOTS=256)
    for kernel, weighted, own in (
        (tree_binning.put_into_bins, False, dict(ROWS=64)),
        (tree_nodes.plan_level, False, {}),
        (tree_histograms.count_bins, False, dict(WORDS=2, PIECE=4096, ROWS=64)),
        (tree_histograms.count_bins, True, dict(WORDS=4, PIECE=4096, ROWS=64, DIGITS=4)),
        (tree_histograms.sum_bins, False, {}),
        (tree_borders.find_borders, True, dict(COLUMNS=4)),
        (tree_children.choose_columns, True, dict(COLUMNS=128, WORDS=4)),
        (tree_rows.move_rows, False, dict(PIECE=1024)),
        (tree_rows.copy_rows, False, dict(PIECE=1024)),
    ):
        types = {name: known[name] for name in kernel.arg_names if name in known}
        constants = given | own | dict(WEIGHTED=weighted)
        name = "trees: " + kernel.fn.__name__ + " of weights" * weighted
        yield name, compiled(kernel, types, constants, arch, set(sizes), enable_fp_fusion=False)


def pools(arch):
    """Of channels-last images."""
    image, axis = ("i32", "constexpr", "i32", "i32", "i32"), ("i32",) * 6
    known = {name: "*bf16" for name in ("x", "out", "grad", "to")} | {
        name: image for name in ("x_strides", "to_strides")
    }
    known |= {f"{name}_strides": image for name in ("out", "grad", "code")} | {f"{name}_axis": axis for name in "zyx"}
    known |= dict(codes="*u8", count="i32", size=("i32",) * 4, users=("i32",) * 3, divisor="fp32")
    sizes = {"size", "users", "z_axis", "y_axis", "x_axis"}
    given = dict(INCLUDE_PADDING=True, CHANNELS_LAST=True, WIDE=False)
    for kernel, *cases in (
        (pool.reduce_windows, (True, False, 512, 1), (False, False, 512, 1), (False, True, 16, 64)),
        (pool.gather_gradient, (True, False, 512, 1), (False, True, 512, 1)),
        (pool.follow_codes, (True, False, 512, 1)),
    ):
        for maximum, adaptive, block, elements in cases:
            types = {name: known[name] for name in kernel.arg_names if name in known}
            if not maximum:
                types.pop("codes")
            constants = given | dict(MAXIMUM=maximum, ADAPTIVE=adaptive, BLOCK=block, ELEMENTS=elements)
            name = f"{kernel.fn.__name__} {'of maxima' if maximum else 'of averages'} {elements}"
            yield name, compiled(kernel, types, constants, arch, sizes)


def main():
    arch = int(sys.argv[1])
    found = {}
    for name, kernel in (
        *products(arch),
        *convolutions(arch),
        *attentions(arch),
        *few_queries(arch),
        *others(arch),
        *losses(arch),
        *norms(arch),
        *quantization(arch),
        *quantized_layers(arch),
        *weight_only_layers(arch),
        *products_of_float8(arch),
        *int8_convolutions(arch),
        *fake_quantization(arch),
        *trees(arch),
        *pools(arch),
    ):
        ptx = kernel.asm["ptx"]
        found[name] = {
            "tensor_cores": sorted(set(re.findall(r"(?:mma|wgmma\.mma_async)\.sync\.aligned\S*", ptx))),
            "asynchronous_copies": len(re.findall(r"cp\.async\.c[ag]", ptx)),
            "shared": kernel.metadata.shared,
            "fused": ptx.count("fma.rn.f32"),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
