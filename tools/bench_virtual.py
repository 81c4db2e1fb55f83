"""What virtual GPUs cost: microseconds an operator, the ratio for a GPT step, memory of a trace.

    python tools/bench_virtual.py

The CPU and the virtual GPU take turns within one run, so that whatever else the machine does
falls on both. So does a tensor that PyTorch lets Python wrap and nobody accounts for: what that
costs, no virtual GPU can go below.
"""

from __future__ import annotations

import io
import math
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import course_lib
from course_lib.models import GPT, next_token_loss

DEVICES = ("cpu", "vgpu:0")

# Each on tensors so small that nearly all of its time is overhead.
OPERATORS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "x + y": lambda x, y: x + y,
    "x @ y": lambda x, y: x @ y,
    "x.view(-1)": lambda x, y: x.view(-1),
    "x.add_(y)": lambda x, y: x.add_(y),
    "x.softmax(-1)": lambda x, y: x.softmax(-1),
    "torch.cat([x, y])": lambda x, y: torch.cat([x, y]),
    "F.layer_norm(x)": lambda x, y: F.layer_norm(x, (8,)),
    "F.dropout(x)": lambda x, y: F.dropout(x, 0.1),
    "torch.zeros(8)": lambda x, y: torch.zeros(8, device=x.device),
}


# Those that a tensor without a device's rules cannot run.
OUT_OF_PLACE = OPERATORS.keys() - {"x.add_(y)", "F.dropout(x)", "torch.zeros(8)"}


class Wrapped(torch.Tensor):
    """A wrapper subclass that does nothing but unwrap, run and wrap."""

    held: Tensor
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # a class method, as PyTorch asks for one
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        inner = [
            [item.held for item in value]
            if type(value) is list and type(value[0]) is Wrapped
            else value.held
            if type(value) is Wrapped
            else value
            for value in args
        ]
        out = func._op(*inner, **(kwargs or {}))
        return tuple(map(cls.around, out)) if type(out) is tuple else cls.around(out)

    @classmethod
    def around(cls, held: Tensor) -> Tensor:
        make: Any = torch.Tensor._make_wrapper_subclass
        form = held.shape, held.stride(), held.storage_offset()
        outer = make(cls, *form, None, held.dtype, held.layout, torch.device("vgpu:0"))
        outer.held = held
        return outer


def microseconds(run: Callable[[], object], repeats: int = 100) -> float:
    """The mean of ``repeats`` calls, in this process's own time."""
    began = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - began) / repeats * 1e6


def bench_operators(rounds: int = 25) -> None:
    columns = ("CPU us", "wrapped us", "vgpu us", "wrapped - CPU", "vgpu - CPU")
    print(f"{'operator':20}" + "".join(f"{column:>15}" for column in columns))
    ones = {device: torch.ones(8, 8, device=device) for device in DEVICES}
    inputs = {"cpu": ones["cpu"], "wrapped": Wrapped.around(ones["cpu"]), "vgpu": ones["vgpu:0"]}
    best = {name: dict.fromkeys(inputs, math.inf) for name in OPERATORS}
    for _ in range(rounds):
        for name, operator in OPERATORS.items():
            for kind, x in inputs.items():
                if kind != "wrapped" or name in OUT_OF_PLACE:
                    taken = microseconds(partial(operator, x, x))
                    best[name][kind] = min(best[name][kind], taken)
    overheads: dict[str, list[float]] = {"wrapped": [], "vgpu": []}
    for name, us in best.items():
        over = {kind: us[kind] - us["cpu"] for kind in overheads}
        cells = [*us.values(), *over.values()]
        print(
            f"{name:20}"
            + "".join(f"{'':>15}" if each == math.inf else f"{each:15.1f}" for each in cells)
        )
        for kind, each in over.items():
            overheads[kind] += [each] if each < math.inf else []
    medians = "".join(f"{statistics.median(each):15.1f}" for each in overheads.values())
    print(f"{'median':65}{medians}\n")


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> float:
    """Seconds of one step, until its loss is known."""
    began = time.perf_counter()
    loss = next_token_loss(model(tokens[:, :-1]), tokens[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    loss.item()
    return time.perf_counter() - began


def bench_gpt(depth: int, width: int, batch: int, length: int, steps: int = 9) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 65, (batch, length + 1))
    programs = {}
    for device in DEVICES:
        model = GPT(65, context=length, width=width, heads=6, depth=depth).to(device)
        programs[device] = (model, torch.optim.AdamW(model.parameters()), tokens.to(device))
    seconds: dict[str, list[float]] = {device: [] for device in DEVICES}
    for number in range(steps + 1):
        for device, program in programs.items():
            taken = training_step(*program)
            if number:  # the first step allocates and looks everything up
                seconds[device].append(taken)
    # What else the machine does only ever adds time, so the fastest step says most.
    cpu, virtual = (min(times) for times in seconds.values())
    print(
        f"GPT, {depth} layers of width {width}, {batch} x {length} tokens, AdamW: "
        f"CPU {cpu * 1e3:.0f} ms, vgpu {virtual * 1e3:.0f} ms, ratio {virtual / cpu:.2f} "
        f"(fastest of {steps})"
    )


def resident_megabytes() -> float:
    """Memory of this process (Linux only)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def bench_size(count: int = 1_000_000) -> None:
    gpu = course_lib.devices(1, course_lib.A100)[0]
    x = torch.ones(8, 8, device=gpu)
    x + x
    before, in_use = resident_megabytes(), course_lib.memory_in_use(gpu)
    for _ in range(count):
        x + x
    print(
        f"{count:,} short-lived tensors: {course_lib.memory_in_use(gpu) - in_use} bytes more in "
        f"use, process {resident_megabytes() - before:.1f} MB larger"
    )
    before = resident_megabytes()
    with course_lib.trace() as recording:
        for _ in range(count):
            x + x
    print(f"a trace of {count:,} spans: {resident_megabytes() - before:.0f} MB", end="")
    for draw in (recording.plot, recording.plot_memory):
        began = time.perf_counter()
        figure: Any = draw().figure
        figure.savefig(io.BytesIO())
        print(f", {draw.__name__} in {time.perf_counter() - began:.1f} s", end="")
    print()


def main() -> None:
    os.environ["COURSE_DEVICES"] = "virtual"
    course_lib.devices(1, course_lib.A100)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    bench_operators()
    bench_gpt(depth=2, width=48, batch=8, length=32)
    bench_gpt(depth=6, width=384, batch=8, length=128)
    bench_size()


if __name__ == "__main__":
    main()
