"""How near the simulated times and bytes of virtual GPUs come to a real GPU.

    python tools/compare_with_gpu.py

Needs an NVIDIA A100, H100 or H200 (SXM). The training steps of lesson 01, small and large, run on
it and on a virtual GPU of its kind, which computes no numbers and so needs no memory. What comes
out is written to course_lib/virtual/MEASURED.md. It takes a few minutes.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import course_lib
from course_lib import A100, H100, H200, Spec
from course_lib.models import GPT, MLP, next_token_loss

RESULT = Path(course_lib.__file__).parent / "virtual" / "MEASURED.md"
WARM_UP, STEPS = 5, 11
VOCABULARY = 74
SPECS = {  # by the names that CUDA gives them; the PCIe and NVL boards are slower
    "NVIDIA A100-SXM4-80GB": A100,
    "NVIDIA A100-SXM-80GB": A100,
    "NVIDIA H100 80GB HBM3": H100,
    "NVIDIA H200": H200,
}
KINDS = {"matmul": "matrix products", "other": "other operations", "copy": "copies"}


@dataclass(frozen=True)
class Case:
    """One training step.

    Attributes:
        name: of the model and the batch.
        model: makes the model, on the CPU.
        batch: makes inputs and targets, on the CPU.
        loss: takes outputs and targets.
        compute_bound: whether the GPU, and not the host that launches, takes the time.
        precision: ``torch.float32`` (without TF32), or ``torch.bfloat16`` by autocast.
    """

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, ...]]
    loss: Callable[[Tensor, Tensor], Tensor]
    compute_bound: bool
    precision: torch.dtype

    @property
    def title(self) -> str:
        return f"{self.name}, {str(self.precision).removeprefix('torch.')}"


@dataclass
class Measurement:
    """What one step took on a device: medians over several.

    Attributes:
        seconds: from its first line until the device had finished.
        by_kind: device seconds of ``"matmul"``, ``"other"`` and ``"copy"``.
        by_operator: device seconds of each operator, by PyTorch's name for it.
        peak_memory: bytes.
    """

    seconds: float
    by_kind: dict[str, float]
    by_operator: dict[str, float]
    peak_memory: int


# A name, a model, a batch and a loss: what a Case begins with.
Training = tuple[
    str,
    Callable[[], nn.Module],
    Callable[[], tuple[Tensor, ...]],
    Callable[[Tensor, Tensor], Tensor],
]


def mlp(layers: int, width: int, batch: int) -> Training:
    return (
        f"MLP, {layers} layers of width {width}, {batch} images",
        lambda: MLP(64, *[width] * (layers - 1), 10),
        lambda: (torch.randn(batch, 64), torch.randint(10, (batch,))),
        F.cross_entropy,
    )


def gpt(depth: int, width: int, batch: int, length: int) -> Training:
    return (
        f"GPT, {depth} blocks of width {width}, {batch} x {length} tokens",
        lambda: GPT(VOCABULARY, context=length, width=width, heads=width // 64, depth=depth),
        lambda: tuple(torch.randint(VOCABULARY, (2, batch, length))),
        next_token_loss,
    )


CASES = [
    Case(*model, compute_bound, precision)
    for model, compute_bound in (
        (mlp(layers=3, width=512, batch=128), False),
        (mlp(layers=8, width=4096, batch=8192), True),
        (gpt(depth=2, width=64, batch=16, length=64), False),
        (gpt(depth=12, width=768, batch=32, length=512), True),
        (gpt(depth=8, width=2048, batch=16, length=1024), True),
    )
    for precision in (torch.float32, torch.bfloat16)
]


def spec_of(gpu_name: str) -> Spec:
    """The Spec of a real GPU; ends the program with one line if there is none."""
    if gpu_name not in SPECS:
        raise SystemExit(f"there is no Spec for this {gpu_name}, only for {', '.join(SPECS)}")
    return SPECS[gpu_name]


def measure(case: Case, gpu: torch.device) -> Measurement:
    """Run the step of ``case`` on ``gpu``, real or virtual."""
    torch.manual_seed(0)
    model = case.model().to(gpu)
    optimizer = torch.optim.AdamW(model.parameters())
    x, y = case.batch()

    def step() -> None:
        inputs, targets = x.to(gpu), y.to(gpu)
        optimizer.zero_grad()
        use_bfloat16 = case.precision == torch.bfloat16
        with torch.autocast(gpu.type, dtype=torch.bfloat16, enabled=use_bfloat16):
            loss = case.loss(model(inputs), targets)
        loss.backward()
        optimizer.step()

    virtual = course_lib.is_virtual(gpu)
    # From the second on, every simulated step takes the same time.
    warm_up, steps = (1, 1) if virtual else (WARM_UP, STEPS)
    for _ in range(warm_up):
        step()
    seconds = [_seconds(step) for _ in range(steps)]
    traces = [_traced(step) for _ in range(steps)]
    course_lib.reset_peak_memory(gpu)
    step()
    course_lib.synchronize()
    by_kinds = [trace.seconds_by_kind() for trace in traces]
    return Measurement(
        seconds=median(seconds),
        by_kind={kind: median(by_kind[kind] for by_kind in by_kinds) for kind in KINDS},
        by_operator=_operators_of(traces[-1]) if virtual else _operators_profiled(step),
        peak_memory=course_lib.peak_memory(gpu),
    )


def _seconds(step: Callable[[], None]) -> float:
    course_lib.synchronize()
    began = course_lib.host_seconds()
    step()
    course_lib.synchronize()
    return course_lib.host_seconds() - began


def _traced(step: Callable[[], None]) -> course_lib.Trace:
    with course_lib.trace() as trace:
        step()
    return trace


def _operators_of(trace: course_lib.Trace) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for span in trace.spans:
        total[operator_name(span.name)] += span.end - span.start
    return dict(total)


def _operators_profiled(step: Callable[[], None]) -> dict[str, float]:
    """Seconds of the kernels that each operator launched itself, in one of several steps."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(STEPS):
            step()
        course_lib.synchronize()
    total: dict[str, float] = defaultdict(float)
    for row in profile.key_averages():
        if row.key.startswith("aten::"):
            total[operator_name(row.key)] += row.self_device_time_total * 1e-6 / STEPS
    return dict(total)


def operator_name(name: str) -> str:
    """One name for what CPUs, GPUs and virtual GPUs call differently."""
    name = name.removeprefix("aten::")
    if "attention" in name:
        return "attention backward" if "backward" in name else "attention"
    return "copy" if name in ("copy_", "_to_copy") else name


# What is written.


def report(measured: dict[Case, Measurement], simulated: dict[Case, Measurement], on: str) -> str:
    """A Markdown page on all cases; ``on`` says with what it was measured."""
    lines = [
        "# Simulated and measured",
        "",
        f"Measured on {on}.",
        f"Medians of {STEPS} steps, after {WARM_UP} to warm up. A ratio is measured / simulated: "
        "above 1, the real",
        "GPU took longer, or held more, than was computed.",
        "",
        *_table(
            ["a training step (AdamW)", "bound by", "time", *KINDS.values(), "peak memory"],
            [
                [
                    case.title,
                    "the GPU" if case.compute_bound else "launches",
                    *(_ratio(*pair) for _, *pair, _ in _pairs(measured[case], simulated[case])),
                ]
                for case in measured
            ],
        ),
        "",
        *fit(measured, simulated),
    ]
    for case in measured:
        rows = [
            [what, show(real), show(virtual), _ratio(real, virtual)]
            for what, real, virtual, show in _pairs(measured[case], simulated[case])
        ]
        lines += ["", f"## {case.title}", ""]
        lines += _table(["", "measured", "simulated", "ratio"], rows)
        lines += ["", *_operator_table(measured[case].by_operator, simulated[case].by_operator)]
    return "\n".join(lines) + "\n"


def _pairs(real: Measurement, virtual: Measurement) -> list[tuple]:
    """(what, measured, simulated, how to write it) of everything that is compared."""
    kinds = [(KINDS[kind], real.by_kind[kind], virtual.by_kind[kind], _time) for kind in KINDS]
    return [
        ("time of a step", real.seconds, virtual.seconds, _time),
        *kinds,
        ("peak memory", real.peak_memory, virtual.peak_memory, course_lib.format_bytes),
    ]


def _operator_table(real: dict[str, float], virtual: dict[str, float]) -> list[str]:
    """The operators that both have, longest first, and how much of the time is not among them."""
    both = sorted(real.keys() & virtual.keys(), key=lambda name: -real[name])
    rows = [
        [f"`{name}`", _time(real[name]), _time(virtual[name]), _ratio(real[name], virtual[name])]
        for name in both
        if real[name] and virtual[name]
    ]
    missing = [
        f"{1 - sum(times[name] for name in both) / sum(times.values()):.0%} of the {what} time"
        for what, times in (("measured", real), ("simulated", virtual))
        if sum(times.values())
    ]
    table = _table(["operator", "measured", "simulated", "ratio"], rows)
    return [*table, "", f"In operators that only one of them has: {', '.join(missing)}."]


def fit(measured: dict[Case, Measurement], simulated: dict[Case, Measurement]) -> list[str]:
    """How much of their peaks real kernels reach, and what the times would be with that."""
    cases = [case for case in measured if case.compute_bound]
    reached = {
        kind: sum(simulated[case].by_kind[kind] for case in cases)
        / sum(measured[case].by_kind[kind] for case in cases)
        for kind in ("matmul", "other")
    }
    off = []
    for case in cases:
        kinds = simulated[case].by_kind
        corrected = sum(kinds[kind] / reached.get(kind, 1) for kind in KINDS)
        off.append(abs(corrected / measured[case].seconds - 1))
    return [
        "Over the steps bound by the GPU, kernels reach this part of the simulated speed: matrix",
        f"products {reached['matmul']:.0%}, other operations {reached['other']:.0%}. With these "
        "efficiencies, the simulated time of each of",
        f"those steps is within {max(off):.0%} of the measured one.",
    ]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def _ratio(real: float, virtual: float) -> str:
    return f"{real / virtual:.2f}" if virtual else "–"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:,.1f} µs"


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this machine has no NVIDIA GPU that PyTorch can use: nothing to compare")
    gpu_name = torch.cuda.get_device_name(0)
    spec = spec_of(gpu_name)
    torch.set_float32_matmul_precision("highest")  # no TF32
    os.environ["COURSE_DEVICES"] = "cuda"
    (gpu,) = course_lib.devices(1)
    measured = {case: measure(case, gpu) for case in CASES}
    (gpu,) = course_lib.devices(1, spec, backing="meta")
    simulated = {case: measure(case, gpu) for case in CASES}
    python = ".".join(map(str, sys.version_info[:3]))
    RESULT.write_text(
        report(
            measured,
            simulated,
            on=f"one {gpu_name}, {date.today()}, with PyTorch {torch.__version__}, CUDA "
            f"{torch.version.cuda} and Python {python}",
        ),
        encoding="utf-8",
    )
    print(f"written to {os.path.relpath(RESULT)}")


if __name__ == "__main__":
    main()
