"""What the CUDA compiler made of the kernels: registers, spills, and the instructions that they are written for."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BUILT = Path(__file__).parents[2] / "build/cuda"


def tool():
    """CUDA's own, or the one that comes with Triton."""
    spec = importlib.util.find_spec("triton")
    shipped = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec else None
    return shutil.which("cuobjdump") or (str(shipped) if shipped and shipped.exists() else None)


TOOL = tool()
#: Tensor core instructions, by a part of the kernel's name.
TENSOR_CORES = {
    "SplitF32": "HMMA.16816.F32.BF16",
    "4Bf16": "HMMA.16816.F32.BF16",
    "3F16": "HMMA.16816.F32",
    "2S8": "IMMA",
    "6Float8ILb1ELb0": "HMMA.16816.F32",
}


@pytest.fixture(scope="module")
def extension():
    found = sorted(BUILT.glob("_cuda*.so"))
    if not found or TOOL is None:
        pytest.skip("the CUDA kernels are not built (make cuda), or there is no cuobjdump")
    return found[0]


def dump(*arguments):
    return subprocess.run([TOOL, *map(str, arguments)], capture_output=True, text=True, check=True, timeout=300).stdout


def kernels(extension, arch):
    """Kernel -> its resources."""
    text = dump("--dump-resource-usage", "--gpu-architecture", arch, extension)
    found = re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", text)
    return {name: {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)} for name, line in found}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_no_kernel_spills(extension, arch):
    found = kernels(extension, arch)
    assert sum("product" in name for name in found) == 2 * (5 * 4 + 2 + 3)
    for name, used in found.items():
        assert used["STACK"] == 0, name
        assert used["REG"] <= 255
        assert used["LOCAL"] == 0, name


@pytest.mark.parametrize(
    "kernel", ["product", "implicit", "weight_gradient", "forward_long", "backward_long", "decode"]
)
def test_products_run_on_tensor_cores(extension, kernel):
    names = [name for name in kernels(extension, "sm_80") if kernel in name]
    for part, instruction in TENSOR_CORES.items():
        if part in ("2S8", "6Float8ILb1ELb0") and kernel != "product":
            continue  # convolutions of integers are another kernel, there are none of 8-bit floats, nor attention of either
        name = next(name for name in names if part in name)
        code = dump("--dump-sass", "--gpu-architecture", "sm_80", "--function", name, extension)
        assert instruction in code, part
        assert "LDGSTS.E.BYPASS.128" in code, "cp.async of 16 bytes"
        # Of few queries a thread makes its operands of what it copied itself.
        assert ("LDSM.16" in code) == (part != "SplitF32" and kernel != "decode"), "ldmatrix"
        assert "STL" not in code, "a store to local memory"


@pytest.mark.parametrize(("part", "instruction"), [("2S8", "IMMA.16832.S8.S8"), ("2U8", "IMMA.16832.U8.S8")])
def test_convolutions_of_integers(part, instruction, extension):
    name = next(name for name in kernels(extension, "sm_80") if "int8_tiles" in name and part in name)
    code = dump("--dump-sass", "--gpu-architecture", "sm_80", "--function", name, extension)
    assert instruction in code
    assert "LDGSTS.E.BYPASS.128" in code and "LDSM.16" in code
    assert "STL" not in code


def test_few_rows_of_quantized_layers(extension):
    """Weights go 16 bytes at a time from global memory to the registers that tensor cores multiply."""
    names = kernels(extension, "sm_80")
    for part, instruction in (("few_rowsI13__nv_bfloat16NS1_7NibblesELi4", "HMMA.16816.F32.BF16"), ("3fewENS", "IMMA")):
        name = next(name for name in names if part in name)
        code = dump("--dump-sass", "--gpu-architecture", "sm_80", "--function", name, extension)
        assert instruction in code, part
        assert "LDG.E.128" in code, part
        assert "STL" not in code, part


#: Of the kernels of sm_90a, by a part of their names: products of warpgroups.
WARPGROUPS = {
    "10HopperBf16ELi256": "HGMMA.64x256x16.F32.BF16",
    "9HopperF16ELi128": "HGMMA.64x128x16.F32",
    "8HopperS8ELi256": "IGMMA.64x256x32.S8.S8",
    "8HopperU8ELi128": "IGMMA.64x128x32.U8.S8",
    "11HopperPartsILi3E": "HGMMA.64x128x16.F32.BF16",
    "12HopperFloat8ELi128": "QGMMA.64x128x32.F32.E5M2.E4M3",
    "12HopperFloat8ELi256": "QGMMA.64x256x32.F32.E4M3.E4M3",
}
#: Whose sums begin anew in every step, and go to others in float32.
SUMMED_BY_STEPS = ("11HopperPartsILi3E", "12HopperFloat8ELi128")


def test_hoppers_products_run_on_warpgroups(extension):
    names = [name for name in kernels(extension, "sm_90a") if "warpgroups" in name]
    assert len(names) == 2 * (2 * 4 + 2) + 3 + 2
    for part, instruction in WARPGROUPS.items():
        name = next(name for name in names if part in name)
        code = dump("--dump-sass", "--gpu-architecture", "sm_90a", "--function", name, extension)
        assert instruction in code, part
        assert "UTMALDG.3D" in code, "copies of tiles"
        assert "SYNCS.ARRIVE.TRANS64" in code and "SYNCS.PHASECHK.TRANS64.TRYWAIT" in code, "mbarriers"
        assert "USETMAXREG" in code, "registers go from the producer to the consumers"
        # The producer keeps to the registers that it is left with: a function that it called might not.
        producer = code[code.index("USETMAXREG.DEALLOC") : code.rindex("UTMALDG")]
        assert "CALL" not in producer
        assert max(int(register) for register in re.findall(r"\bR(\d+)\b", producer)) < 40
        # Where sums do not begin anew a product is begun before the last has ended.
        assert ("gsb0, 0x1" in code) == (part not in SUMMED_BY_STEPS), part
        assert "STL" not in code, "a store to local memory"


@pytest.mark.parametrize("part", ["10HopperBf16ELi128", "10HopperBf16ELi64", "9HopperF16ELi128", "9HopperF16ELi64"])
def test_hoppers_attention_weighs_while_products_are_under_way(part, extension):
    names = [name for name in kernels(extension, "sm_90a") if "hopper_forward" in name]
    assert len(names) == 4
    name = next(name for name in names if part in name)
    code = dump("--dump-sass", "--gpu-architecture", "sm_90a", "--function", name, extension)
    element = "F32.BF16" if "Bf16" in part else "F32"
    assert f"HGMMA.64x128x16.{element} " in code, "queries and keys, from shared memory"
    # Weights from registers, values across.
    columns = part.split("Li")[1]
    assert re.search(rf"HGMMA.64x{columns}x16.{element} R\d+, R\d+, gdesc\[UR\d+\].tnspB", code)
    # Between the wait for scores and that for results, under way since before.
    weighing = code[code.index("gsb0, 0x1") :]
    weighing = weighing[: weighing.index("gsb0, 0x0")]
    assert weighing.count("MUFU.EX2") >= 64 and "HGMMA" not in weighing
    assert "UTMALDG.4D" in code and "USETMAXREG" in code
    producer = code[code.index("USETMAXREG.DEALLOC") : code.rindex("UTMALDG")]
    assert "CALL" not in producer
    assert max(int(register) for register in re.findall(r"\bR(\d+)\b", producer)) < 40
    assert max(int(register) for register in re.findall(r"\bR(\d+)\b", code)) < 232
    assert "STL" not in code and "LDL" not in code, "local memory"


def test_histograms_are_counted_without_loops(extension):
    """An addition in shared memory is one instruction, not a loop that compares and swaps."""
    names = [name for name in kernels(extension, "sm_90a") if "count_bins" in name]
    assert len(names) == 2
    for name in names:
        code = dump("--dump-sass", "--gpu-architecture", "sm_90a", "--function", name, extension)
        assert "ATOMS.ADD" in code and "CAS" not in code


def test_it_imports_without_a_driver(extension):
    code = (
        "import importlib.util as u; "
        f"s = u.spec_from_file_location('_cuda', {str(extension)!r}); m = u.module_from_spec(s); "
        "s.loader.exec_module(m); print(m.emulated, m.devices() >= 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == ["False", "True"], result.stderr
