"""Judges a function against a `Case`: its error beside the bound and beside torch's, and everything else that can leak."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .._state import FallbackError, strict
from .case import Case, Sample, cases
from .case import case as case_named
from .errors import Roundoff, first_wrong_class, gamma, looks_like, relative_error
from .inputs import LAYOUTS, VALUES, Maker, poisoned, surroundings_intact

__all__ = ["Finding", "Report", "Row", "verify", "verify_all"]

#: How much larger than torch's a root-mean-square error may be before it is taken for a lower precision's. Correct
#: float32 sums differ by the order of their additions, which is a small factor; two bfloat16 parts are 90 times worse.
#: A half precision result is one rounding of a float32 sum, so there every correct result errs alike.
_WIDE_LIMIT, _HALF_LIMIT = 8.0, 1.5

#: Root-mean-square errors (in units of the roundings allowed) below which nothing is suspicious, whatever torch does.
_FLOOR = {torch.float64: 1.0, torch.float32: 0.05, torch.bfloat16: 0.4, torch.float16: 0.4}

_FINDINGS_KEPT = 3

#: Results a call must have for the ratio of its root-mean-square errors to be reported.
_MANY = 1000
_OVER_ALL = "all layouts"


@dataclass(frozen=True)
class Finding:
    """One thing wrong: on which inputs, and what."""

    dtype: str
    values: str
    layout: str
    call: str
    problem: str

    def __str__(self) -> str:
        return f"{self.dtype}, {self.values} values, {self.layout}, ({self.call}): {self.problem}"


@dataclass
class Row:
    """What one dtype and kind of values gave, over every shape and layout.

    `used` is the largest share of the error bound that a result used, `peer_used` torch's; `ratio` is the
    root-mean-square error divided by torch's (below 1: nearer to float64 than torch), and `worst` the largest such ratio
    of a single call, among those with enough results for it to mean something.
    """

    dtype: str
    values: str
    samples: int = 0
    used: float = 0.0
    peer_used: float = 0.0
    ratio: float = math.nan
    worst: float = math.nan
    problems: int = 0


@dataclass
class Report:
    """The outcome of `verify`. True when nothing was found wrong."""

    op: str
    precision: str
    rows: list[Row] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    #: dtype -> why there was nothing of fastnn's to verify: on a GPU, calls that go to torch.
    not_ours: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not any(row.problems for row in self.rows)

    def __bool__(self) -> bool:
        return self.passed

    def to_dict(self) -> dict[str, Any]:
        """The report in JSON's types; a figure that is not finite is null."""
        return {
            "op": self.op,
            "precision": self.precision,
            "passed": self.passed,
            "not_ours": self.not_ours,
            "rows": [
                {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in vars(row).items()}
                for row in self.rows
            ],
            "findings": [vars(finding) for finding in self.findings],
        }

    def raise_if_failed(self) -> None:
        """AssertionError with the findings, for use in a test."""
        if not self.passed:
            raise AssertionError(f"{self.op}:\n" + "\n".join(f"  {finding}" for finding in self.findings))


def verify(
    function: Callable[..., torch.Tensor],
    case: Case | str,
    *,
    dtypes: Iterable[torch.dtype] | None = None,
    gradients: bool | None = None,
    out: bool | None = None,
    device: torch.device | str = "cpu",
) -> Report:
    """Verifies that `function` computes what `case` declares, called as torch's op is.

    Every shape of the case is tried with every kind of values and every layout (`fastnn.testing.VALUES`, `LAYOUTS`).
    A result must
      * have torch's shape and dtype,
      * be NaN or infinite exactly where the float64 reference or torch is,
      * stay within the case's error bound, or be no further from float64 than torch's; integers be equal, or, where the case
        sees a tie, the next,
      * not err like a lower precision, by its root-mean-square error over all shapes beside torch's,
      * be exact for small integers, the same on a second call, and leave its inputs as they were,
      * with `out=`, return it, fill it whatever its strides, and write nothing around it,
    and its gradients must not err more than torch's by more than the same factors.

    Args:
        function: anything with the signature of `case.peer`.
        case: a `Case`, or the name of a registered one.
        dtypes: instead of the case's own.
        gradients: whether to verify gradients; by default whatever the case says.
        out: whether to verify `out=`; by default whatever the case says.
        device: where the tensors are. On a GPU a dtype whose calls go to torch is not verified, and the report says so.

    Raises:
        ValueError: if there is no such device.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r}: torch {torch.__version__} finds no GPU")
    the_case = case_named(case) if isinstance(case, str) else case
    precision = torch.get_float32_matmul_precision() if the_case.product else "highest"
    gradients = the_case.differentiable if gradients is None else gradients
    out = the_case.out if out is None else out
    report = Report(the_case.name, precision)
    for dtype in tuple(the_case.dtypes if dtypes is None else dtypes):
        judge = _Judge(function, the_case, dtype, precision, report, device)
        if torch.device(device).type == "cpu":
            judge.everything(out, gradients)
            continue
        rows = len(report.rows)
        try:
            with strict():
                judge.everything(out, gradients)
        except FallbackError as error:
            del report.rows[rows:]
            report.not_ours[_name(dtype)] = str(error)
    return report


def verify_all(
    only: Iterable[str] = (),
    *,
    dtypes: Iterable[torch.dtype] | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[str], None] = lambda name: None,
) -> list[Report]:
    """Verifies fastnn's own functions: those named, or all. `dtypes` limits each case's own; `device` is that of the
    tensors. KeyError for an unknown name, ValueError for a device that is not there."""
    wanted = [case_named(name) for name in only] or list(cases().values())
    reports = []
    for each in wanted:
        progress(each.name)
        chosen = [d for d in each.dtypes if dtypes is None or d in tuple(dtypes)]
        if chosen:
            reports.append(verify(each.resolve(), each, dtypes=chosen, device=device))
    return reports


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Pool:
    """Root mean square over many tensors."""

    def __init__(self) -> None:
        self.squares, self.count = 0.0, 0

    def add(self, errors: torch.Tensor) -> None:
        self.squares += errors.square().sum().item()
        self.count += errors.numel()

    def value(self) -> float:
        return math.sqrt(self.squares / self.count) if self.count else 0.0


class _Judge:
    """One function in one dtype."""

    def __init__(
        self,
        function: Callable[..., torch.Tensor],
        case: Case,
        dtype: torch.dtype,
        precision: str,
        report: Report,
        device: torch.device | str,
    ) -> None:
        self.device = device
        self.function, self.case, self.dtype, self.report = function, case, dtype, report
        self.roundoff = Roundoff.of(dtype, precision)
        self.full_precision = precision == "highest" or dtype != torch.float32
        self.relative = _Pool()
        self.limit = _WIDE_LIMIT if dtype in (torch.float32, torch.float64) else _HALF_LIMIT

    def everything(self, out: bool, gradients: bool) -> None:
        for values in VALUES:
            if self.dtype.is_floating_point or values == "integer":
                self.results(values)
        if out:
            self.out()
        if gradients and self.dtype.is_floating_point:
            self.gradients()

    def _row(self, values: str) -> Row:
        row = Row(_name(self.dtype), values)
        self.report.rows.append(row)
        return row

    def _samples(self, values: str, layout: str) -> Iterable[Sample]:
        # The seed is a constant: a verdict must not change from run to run.
        maker = Maker(self.dtype, values, layout, seed=len(values) + 101 * LAYOUTS.index(layout), device=self.device)
        for sample in self.case.samples(maker):
            maker.tensors = 0
            yield sample

    def _problem(self, row: Row, layout: str, sample: Sample | str, problem: str) -> None:
        row.problems += 1
        # What was found over all layouts says most, and comes last.
        if row.problems <= _FINDINGS_KEPT or layout == _OVER_ALL:
            self.report.findings.append(Finding(row.dtype, row.values, layout, str(sample), problem))

    def results(self, values: str) -> None:
        row = self._row(values)
        ours, peers, self.relative = _Pool(), _Pool(), _Pool()
        for layout in LAYOUTS:
            for sample in self._samples(values, layout):
                row.samples += 1
                problem = self._one(row, values, sample, ours, peers)
                if problem:
                    self._problem(row, layout, sample, problem)
        if values == "special" or (values == "integer" and self.case.exact):
            return
        mine, torchs = ours.value(), peers.value()
        row.ratio = mine / torchs if torchs else math.nan
        allowed = self.limit * max(torchs, _FLOOR[self.dtype])
        if self.full_precision and not mine <= allowed:
            self._problem(
                row,
                _OVER_ALL,
                f"{row.samples} calls",
                f"its root-mean-square error is {mine / torchs if torchs else math.inf:.3g} times torch's, like a "
                f"computation in {looks_like(self.relative.value())}",
            )

    def _one(self, row: Row, values: str, sample: Sample, ours: _Pool, peers: _Pool) -> str | None:
        """Runs one call and returns what is wrong with it."""
        before = [tensor.clone() for tensor in sample.tensors()]
        with torch.no_grad():
            result = sample.call(self.function)
            again = sample.call(self.function)
            peer = sample.call(self.case.peer)
        for number, (was, tensor) in enumerate(zip(before, sample.tensors(), strict=True)):
            if not _same_bits(was, tensor):
                return f"tensor argument {number} was changed"
        if result.shape != peer.shape:
            return f"shape {tuple(result.shape)}, torch's is {tuple(peer.shape)}"
        if result.dtype != peer.dtype:
            return f"dtype {result.dtype}, torch's is {peer.dtype}"
        if not _same_bits(result, again):
            return "a second call gave different bits"
        reference = self.case.exactly(sample)
        rounded = reference.to(result.dtype)
        if values == "integer" and self.case.exact:
            error, peer_error = (result.double() - rounded).abs(), (peer.double() - rounded).abs()
            # torch rounds some half precision sums twice; a result that does the same is no indexing bug.
            wrong = ((result != rounded) & ~(error <= peer_error.max())).nonzero() if error.numel() else ()
            if len(wrong):
                at = tuple(wrong[0].tolist())
                return (
                    f"{len(wrong)} of {result.numel()} values are not exact; at {at}: {result[at].item()}, "
                    f"exactly {reference[at].item()}"
                )
            return None
        # Just below the largest finite value a result may round either way.
        largest = torch.finfo(result.dtype).max if result.is_floating_point() else math.inf
        edge = reference.abs() > 0.99 * largest
        at = first_wrong_class(result, rounded, peer, skip=edge & reference.isfinite())
        if at is not None:
            return f"at {at}: {result[at].item()}, in float64 {reference[at].item()}"
        magnitude = self.case.magnitude(reference, *sample.wide().args, **sample.wide().kwargs)
        depth = self.case.depth(*sample.args, **sample.kwargs)
        r = self.roundoff
        if not result.is_floating_point():
            r = replace(r, result=0.0, tiny=0.0)  # what rounding to integers does is in the reference
        ties = self.case.ties(reference, *sample.wide().args, **sample.wide().kwargs) if self.case.ties else 0.0
        # In float64 the reference errs as much as what it judges.
        twice = 2 if self.dtype == torch.float64 else 1
        unit = r.compute * magnitude + r.result * reference.abs() + r.tiny + ties
        bound = (
            twice * gamma(depth + 2, r.compute) * magnitude
            + (1 + r.compute) * r.result * reference.abs()
            + r.tiny * (depth + 2)
            + ties
        )
        judged = reference.isfinite() & magnitude.isfinite() & result.isfinite() & peer.isfinite() & ~edge
        error = (result.double() - reference)[judged].abs()
        peer_error = (peer.double() - reference)[judged].abs()
        if not error.numel():
            return None
        used, peer_used = error / bound[judged], peer_error / bound[judged]
        # Zero over zero: an empty sum, exactly right.
        used, peer_used = used.nan_to_num(0.0, math.inf), peer_used.nan_to_num(0.0, math.inf)
        row.used = max(row.used, used.max().item())
        row.peer_used = max(row.peer_used, peer_used.max().item())
        ours.add((error / unit[judged]).nan_to_num(0.0, math.inf))
        # What a random sum of these terms comes to, so that cancellation does not look like a coarse format.
        typical = torch.maximum(reference.abs(), magnitude / math.sqrt(max(depth, 1)))[judged]
        self.relative.add(error.norm().reshape(1) / typical.norm().clamp_min(r.tiny or 1e-300))
        peers.add((peer_error / unit[judged]).nan_to_num(0.0, math.inf))
        if error.numel() >= _MANY and peer_error.norm() > 0:
            ratio = (error.norm() / peer_error.norm()).item()
            row.worst = ratio if math.isnan(row.worst) else max(row.worst, ratio)
        worst = used.argmax().item()
        if used[worst] > max(1.0, peer_used.max().item()):
            at = tuple(judged.nonzero()[worst].tolist())
            return (
                f"at {at}: {result[at].item()}, in float64 {reference[at].item()}: {used[worst].item():.3g} times the "
                f"error bound (torch: {peer_used.max().item():.3g})"
            )
        return None

    def out(self) -> None:
        row = self._row("out=")
        for sample in self._samples("normal", "contiguous"):
            row.samples += 1
            with torch.no_grad():
                expected = sample.call(self.function)
                shape = tuple(expected.shape)
                plain = poisoned(shape, expected.dtype, device=self.device)
                spread = poisoned((*shape[:-1], 2 * shape[-1]), expected.dtype, device=self.device) if shape else plain
                strided = spread[..., ::2] if shape else plain
                for out, layout in ((plain, "contiguous"), (strided, "sliced")):
                    returned = sample.call(self.function, out=out)
                    if returned is not out:
                        self._problem(row, layout, sample, "did not return the tensor given as out=")
                    # Not bit for bit: torch's own sums differ in order between contiguous and strided results.
                    error = relative_error(out, expected)
                    if not error <= 32 * self.roundoff.result:
                        self._problem(
                            row,
                            layout,
                            sample,
                            f"out= differs from the plain result by {error:.3g}",
                        )
                if not surroundings_intact(plain):
                    self._problem(row, "contiguous", sample, "wrote outside the tensor given as out=")
                if shape and not spread[..., 1::2].isnan().all():
                    self._problem(row, "sliced", sample, "wrote between the elements of out=")

    def gradients(self) -> None:
        row = self._row("gradient")
        ours, peers = _Pool(), _Pool()
        for layout in ("contiguous", "transposed"):
            for sample in self._samples("normal", layout):
                row.samples += 1
                wide = sample.wide()
                cotangent = torch.randn(
                    wide.call(self.case.reference or self.case.peer).shape,
                    generator=torch.Generator().manual_seed(row.samples),
                ).to(self.device, self.dtype)
                exact = _gradients(self.case.reference or self.case.peer, wide, cotangent.double())
                peer = _gradients(self.case.peer, sample, cotangent)
                mine = _gradients(self.function, sample, cotangent)
                for number, (reference, theirs, got) in enumerate(zip(exact, peer, mine, strict=True)):
                    if got is None and (theirs is None or theirs.numel() == 0):
                        continue
                    if (got is None) != (theirs is None):
                        self._problem(
                            row,
                            layout,
                            sample,
                            f"the gradient of tensor argument {number} is "
                            f"{'missing' if got is None else 'not None, but torch gives none'}",
                        )
                    else:
                        if got.shape != theirs.shape or got.dtype != theirs.dtype:
                            self._problem(
                                row,
                                layout,
                                sample,
                                f"the gradient of tensor argument {number} is {tuple(got.shape)} {got.dtype}, "
                                f"torch's {tuple(theirs.shape)} {theirs.dtype}",
                            )
                            continue
                        error, peer_error = (
                            relative_error(got, reference),
                            relative_error(theirs, reference),
                        )
                        ours.add(torch.tensor([error], dtype=torch.float64))
                        peers.add(torch.tensor([peer_error], dtype=torch.float64))
                        if not math.isfinite(error) and math.isfinite(peer_error):
                            self._problem(
                                row,
                                layout,
                                sample,
                                f"the gradient of tensor argument {number} is not finite",
                            )
        mine_rms, torchs = ours.value(), peers.value()
        row.ratio = mine_rms / torchs if torchs else math.nan
        floor = (16 if self.dtype == torch.float64 else 0.5) * self.roundoff.result
        if self.full_precision and not mine_rms <= self.limit * max(torchs, floor):
            self._problem(
                row,
                _OVER_ALL,
                f"{row.samples} calls",
                f"relative error of the gradients {mine_rms:.3g}, torch's {torchs:.3g}: like a computation in "
                f"{looks_like(mine_rms)}",
            )


def _gradients(
    function: Callable[..., torch.Tensor], sample: Sample, cotangent: torch.Tensor
) -> list[torch.Tensor | None]:
    inputs: list[torch.Tensor] = []

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach().requires_grad_(tensor.is_floating_point())
        if tensor.requires_grad:
            inputs.append(tensor)
        return tensor

    result = sample.map(leaf).call(function)
    if not result.requires_grad:
        return [None] * len(inputs)
    return list(torch.autograd.grad(result, inputs, cotangent, allow_unused=True))


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, with NaN equal to NaN."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
