"""`python -m fastnn demo | verify | bench | info`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

DTYPES = ("float32", "float64", "bfloat16", "float16", "int8", "uint8")
#: What operations on 8-bit floats are timed with; they are verified in the dtypes of their results.
TIMED_DTYPES = (*DTYPES, "float8_e4m3fn")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 if a verification failed, 2 for a mistake in the command."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "matplotlib", "sklearn"):
            raise
        print(f"fastnn: {options.command} needs the package {error.name}: pip install 'fastnn[cli]'", file=sys.stderr)
    except (KeyError, ValueError) as error:
        print(f"fastnn: {error.args[0] if error.args else error}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastnn", description="Hand-written CPU kernels behind PyTorch layers.")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="convert, verify, train and time a model on handwritten digits")
    demo.add_argument("--out", default="demo-results", metavar="DIR", help="where to write the JSON and the plot")
    demo.add_argument("--epochs", type=_positive, default=10, help="of training (default: 10)")
    demo.add_argument("--width", type=_positive, default=1024, help="of the two hidden layers (default: 1024)")
    demo.add_argument("--seconds", type=float, default=1.0, help="for each timing (default: 1)")
    demo.set_defaults(run=_demo)

    verify = commands.add_parser("verify", help="compare fastnn's ops with float64, beside torch")
    verify.add_argument("op", nargs="*", help="which (default: all)")
    verify.add_argument("--dtype", action="append", choices=DTYPES, help="only this one; may be repeated")
    verify.add_argument("--precision", choices=("highest", "high", "medium"), help="of float32 products")
    _add_device(verify)
    verify.add_argument("--threads", type=_positive, help="torch.set_num_threads")
    _add_json(verify)
    verify.set_defaults(run=_verify)

    bench = commands.add_parser("bench", help="time fastnn's ops against torch's")
    bench.add_argument("op", nargs="*", help="which (default: all)")
    bench.add_argument("--shape", action="append", metavar="MxNxK", help="such as 1024x1024x1024; may be repeated")
    bench.add_argument("--dtype", action="append", choices=TIMED_DTYPES, help="default: float32, or what the op has")
    bench.add_argument("--against", metavar="PEER", help="such as torch (default: the fastest of all there are)")
    _add_device(bench)
    bench.add_argument("--threads", type=_positive, help="torch.set_num_threads")
    bench.add_argument("--precision", choices=("highest", "high", "medium"), help="of float32 products")
    bench.add_argument("--seconds", type=float, default=1.0, help="for each shape (default: 1)")
    _add_json(bench)
    bench.set_defaults(run=_bench)

    info = commands.add_parser("info", help="what runs here, and how")
    _add_json(info)
    info.set_defaults(run=_info)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return value


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="cpu", help="of the tensors: cpu, cuda or cuda:1 (default: cpu)")


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE, or to standard output"
    )


def _write_json(data: Any, where: str) -> None:
    text = json.dumps(data, indent=2, default=str)
    if where == "-":
        print(text)
    else:
        with open(where, "w") as file:
            file.write(text + "\n")


def _console(options: argparse.Namespace) -> Any:
    """Where tables go: standard error when standard output is for JSON. A pipe gets a width that cuts nothing."""
    from rich.console import Console

    stream = sys.stderr if getattr(options, "json", None) == "-" else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 160)


def _set_torch(options: argparse.Namespace) -> None:
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    if options.precision:
        torch.set_float32_matmul_precision(options.precision)


def _dtypes(options: argparse.Namespace) -> list[Any] | None:
    import torch

    return [getattr(torch, name) for name in options.dtype] if options.dtype else None


def _device(options: argparse.Namespace) -> Any:
    import torch

    try:
        return torch.device(options.device)
    except RuntimeError as error:
        raise ValueError(f"--device: {error}") from None


def _demo(options: argparse.Namespace) -> int:
    from . import demo

    return demo.run(options.out, epochs=options.epochs, width=options.width, seconds=options.seconds)


def _verify(options: argparse.Namespace) -> int:
    from . import testing
    from .testing import table

    _set_torch(options)
    console = _console(options)
    with console.status("verifying") as status:
        reports = testing.verify_all(
            options.op,
            dtypes=_dtypes(options),
            device=_device(options),
            progress=lambda name: status.update(f"verifying {name}"),
        )
    if not reports:
        raise ValueError("verify: none of these ops has that dtype")
    table.show(reports, console)
    if options.json:
        _write_json([report.to_dict() for report in reports], options.json)
    return 0 if all(reports) else 1


def _bench(options: argparse.Namespace) -> int:
    from . import FallbackError, bench
    from .bench import gpu, table

    _set_torch(options)
    console = _console(options)
    device = _device(options)
    described = gpu.machine_of(device).describe()
    ops = [bench.benchmark(name) for name in options.op] or list(bench.benchmarks().values())
    found = []
    with console.status("timing") as status:
        for op in ops:
            shapes = [bench.parse_shape(text, op.axes) for text in options.shape] if options.shape else None
            try:
                results = bench.run(
                    op,
                    shapes,
                    _dtypes(options),
                    against=options.against,
                    seconds=options.seconds,
                    device=device,
                    progress=lambda label: status.update(f"timing {label}"),
                )
            except FallbackError as error:
                print(f"fastnn: {op.name} is not timed: {error}", file=sys.stderr)
                continue
            except bench.WrongResult as error:
                print(f"fastnn: {error}", file=sys.stderr)
                return 1
            table.show(results, described, console)
            found += results
    if options.json:
        _write_json({"machine": described, "results": [result.to_dict() for result in found]}, options.json)
    return 0


def _info(options: argparse.Namespace) -> int:
    import fastnn

    found = fastnn.info()
    if options.json:
        _write_json(found, options.json)
    else:
        print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
