"""The interactive explorers: sliders above a picture, drawn anew when a slider moves.

Where no live widget can be shown (on GitHub, on a printed page), an explorer shows the picture of
its first setting.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from typing import Any

import ipywidgets
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch.nn import functional as F

from course_lib import (
    collectives,
    data_parallel,
    hardware,
    methods,
    pipeline,
    schedules,
    sharding,
    style,
    timeline,
)
from course_lib.context_parallel import ring_attention
from course_lib.layer_parallel import LayerParallel
from course_lib.models import GPT, MLP, Block
from course_lib.tensor_parallel import ParallelBlock
from course_lib.virtual.spec import A100, CLASSROOM, Spec


class Explorer(ipywidgets.VBox):
    """Controls above a figure, or above a line that says why there is none.

    Args:
        draw: makes the figure; is called with one keyword argument for each control.
        controls: ipywidgets with a ``value``, by the name that ``draw`` knows them under.
    """

    def __init__(self, draw: Callable[..., Figure], **controls: ipywidgets.ValueWidget) -> None:
        self._draw = draw
        self._controls = controls
        self._picture = ipywidgets.Image(format="png")
        self._picture.layout.width, self._picture.layout.max_width = "900px", "100%"
        self._error = ipywidgets.HTML()
        for control in controls.values():
            control.style.description_width = "190px"
            control.layout.width = "480px"
            control.observe(self._refresh, names="value")
        super().__init__([*controls.values(), self._picture])
        self.layout.align_items = "flex-start"
        self._refresh()

    @property
    def values(self) -> dict[str, Any]:
        """What the controls are set to."""
        return {name: control.value for name, control in self._controls.items()}

    def _refresh(self, change: object = None) -> None:
        self._picture.layout.opacity = "0.4"  # a sign of work going on
        open_before = set(plt.get_fignums())
        buffer = io.BytesIO()
        try:
            self._draw(**self.values).savefig(buffer, format="png", dpi=100)
        except Exception as error:
            first_line = next(iter(str(error).splitlines()), "")
            self._error.value = html.escape(f"{type(error).__name__}: {first_line}")
            self._show(self._error)
        else:
            self._picture.value = buffer.getvalue()
            self._show(self._picture)
        finally:
            self._picture.layout.opacity = "1"
            for number in set(plt.get_fignums()) - open_before:
                plt.close(number)

    def _show(self, result: ipywidgets.DOMWidget) -> None:
        self.children = [*self._controls.values(), result]

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.values.items())
        return f"<explorer: {settings}>"

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        bundle = super()._repr_mimebundle_(**kwargs)
        bundle["text/plain"] = repr(self)
        if self._picture in self.children:
            bundle["image/png"] = base64.b64encode(self._picture.value).decode()
        return bundle


def choice(label: str, options: list, value: Any) -> ipywidgets.SelectionSlider:
    """A slider over ``options``, which updates when it is let go."""
    return ipywidgets.SelectionSlider(
        description=label, options=options, value=value, continuous_update=False
    )


def explore_queues() -> Explorer:
    """Lesson 00: two GPUs multiply matrices, with or without a read in the loop."""

    def draw(side: int, products: int, read: bool) -> Figure:
        with hardware.other_devices(2) as gpus:
            matrices = [torch.ones(side, side, device=gpu) for gpu in gpus]
            with timeline.trace() as t:
                for matrix in matrices:
                    for _ in range(products):
                        matrix = matrix @ matrix / side
                    if read:
                        matrix.sum().item()
        figure, ax = style.figure(height=2.6)
        t.plot(ax, title=f"{t.seconds * 1e3:.2f} ms, vgpu:0 idle {t.idle_fraction(0):.0%}")
        return figure

    return Explorer(
        draw,
        side=choice("side of the matrices", [16, 32, 64, 128, 256, 512], 256),
        products=choice("products on each GPU", [1, 2, 4, 8], 4),
        read=ipywidgets.Checkbox(description="read a value in the loop", value=True),
    )


def explore_step() -> Explorer:
    """Lesson 01: the memory and the time of one training step of the MLP."""
    optimizers = {
        "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        "AdamW": lambda parameters: torch.optim.AdamW(parameters),
    }

    def draw(batch: int, width: int, optimizer: str) -> Figure:
        with hardware.other_devices(1) as (gpu,):
            holders, seconds = _measure_step(gpu, batch, width, optimizers[optimizer])
            capacity = hardware.memory_capacity(gpu)
        figure, (memory_ax, time_ax) = style.figure(columns=2, height=2.6)
        memory_ax.barh(
            list(holders), [nbytes / 1e6 for nbytes in holders.values()], color=style.CYCLE
        )
        used = sum(holders.values())
        memory_ax.set(xlabel="MB", title=f"{used / 1e6:.1f} of {capacity / 1e6:.0f} MB held")
        memory_ax.invert_yaxis()
        time_ax.barh(list(seconds), [s * 1e3 for s in seconds.values()], color=style.GREY)
        total = sum(seconds.values())
        time_ax.set(
            xlabel="milliseconds", title=f"{batch / total:,.0f} examples a second (simulated)"
        )
        time_ax.invert_yaxis()
        return figure

    return Explorer(
        draw,
        batch=choice("batch size", [1, 4, 16, 64, 256, 1024], 64),
        width=choice("width", [64, 128, 256, 512, 1024], 512),
        optimizer=choice("optimizer", list(optimizers), "AdamW"),
    )


def _measure_step(
    gpu: torch.device, batch: int, width: int, make_optimizer: Callable
) -> tuple[dict[str, int], dict[str, float]]:
    """Bytes of the four holders, and device seconds of the three phases."""
    model = MLP(64, width, width, 10).to(gpu)
    optimizer = make_optimizer(model.parameters())
    x = torch.randn(batch, 64, device=gpu)
    y = torch.zeros(batch, dtype=torch.int64, device=gpu)
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    with timeline.trace() as t:
        start = hardware.memory_in_use(gpu)
        with timeline.region("forward"):
            loss = F.cross_entropy(model(x), y)
        activations = hardware.memory_in_use(gpu) - start
        with timeline.region("backward"):
            loss.backward()
        before_step = hardware.memory_in_use(gpu)
        with timeline.region("step"):
            optimizer.step()
        state = hardware.memory_in_use(gpu) - before_step
    holders = {
        "parameters": parameters,
        "gradients": parameters,
        "optimizer state": state,
        "activations": activations,
    }
    phases = ("forward", "backward", "step")
    return holders, {phase: sum(t.seconds_by_kind(phase).values()) for phase in phases}


def explore_data_parallel() -> Explorer:
    """Lesson 02: computing and exchange in one step, for one to eight GPUs."""
    counts = [1, 2, 3, 4, 6, 8]

    def draw(batch: int, width: int, link: float) -> Figure:
        spec = CLASSROOM.with_(link_bandwidth=CLASSROOM.link_bandwidth * link)
        computing, exchange = [], []
        for count in counts:
            seconds = _measure_data_parallel(count, batch, width, spec)
            computing.append(seconds[0] * 1e3)
            exchange.append(seconds[1] * 1e3)
        total = [a + b for a, b in zip(computing, exchange, strict=True)]
        best = min(range(len(counts)), key=total.__getitem__)
        title = f"Fastest with {counts[best]} (simulated; speed-up above each bar)"
        return _draw_speed_ups(
            "GPUs", counts, {"computing": computing, "exchange": exchange}, title
        )

    return Explorer(
        draw,
        batch=choice("batch size", [64, 128, 256, 512, 1024, 2048], 1024),
        width=choice("width", [64, 128, 256, 512], 512),
        link=choice("link speed, times this GPU's", [0.1, 0.5, 1, 2, 10, 100], 1),
    )


def _draw_speed_ups(
    what: str, counts: list[int], parts: dict[str, list[float]], title: str
) -> Figure:
    """Two parts of the milliseconds of a step, stacked, for several numbers of GPUs."""
    (name, lower), (other_name, upper) = parts.items()
    total = [a + b for a, b in zip(lower, upper, strict=True)]
    figure, ax = style.figure(height=3.0)
    places = range(len(counts))
    ax.bar(places, lower, color=style.BLUE, label=name)
    ax.bar(
        places, upper, bottom=lower, label=other_name,
        color=style.ORANGE, hatch="////", edgecolor="white", linewidth=0,
    )  # fmt: skip
    for place, milliseconds in zip(places, total, strict=True):
        ax.text(place, milliseconds, f"{total[0] / milliseconds:.2f}x", ha="center", va="bottom")
    ax.set_xticks(places, counts)
    ax.set(xlabel=what, ylabel="milliseconds a step", ylim=(0, 1.15 * max(total)), title=title)
    figure.legend(loc="outside lower right", ncols=2)
    return figure


def _measure_data_parallel(count: int, batch: int, width: int, spec: Spec) -> tuple[float, float]:
    """Seconds of computing and of the exchange in one data-parallel step."""
    with hardware.other_devices(count, spec) as gpus:
        replicas = data_parallel.replicate(MLP(64, width, width, 10), gpus)
        optimizers = [torch.optim.SGD(r.parameters(), lr=0.1) for r in replicas]
        xs = data_parallel.split_batch(torch.randn(batch, 64), gpus)
        ys = data_parallel.split_batch(torch.zeros(batch, dtype=torch.int64), gpus)
        with timeline.trace() as computing:
            data_parallel.backward_on_shards(replicas, xs, ys, F.cross_entropy)
            for optimizer in optimizers:
                optimizer.step()
        with timeline.trace() as exchange:
            data_parallel.all_reduce_gradients(replicas)
    return computing.seconds, exchange.seconds


def explore_all_reduce() -> Explorer:
    """Lesson 03: the seconds of three ways to all-reduce."""
    ways = {
        "naive": collectives.all_reduce,
        "tree": collectives.tree_all_reduce,
        "ring": collectives.ring_all_reduce,
    }

    def draw(count: int, kilobytes: float, latency: float, link: float) -> Figure:
        spec = CLASSROOM.with_(
            launch_overhead=0.0,
            latency=latency * 1e-6,
            link_bandwidth=CLASSROOM.link_bandwidth * link,
        )
        numel = round(kilobytes * 1e3 / 4)
        milliseconds = [_measure_all_reduce(way, count, numel, spec) * 1e3 for way in ways.values()]
        fastest = list(ways)[milliseconds.index(min(milliseconds))]
        figure, ax = style.figure(height=2.4)
        ax.barh(list(ways), milliseconds, color=style.ORANGE, hatch="////", edgecolor="white")
        for place, taken in enumerate(milliseconds):
            ax.text(taken, place, f"  {taken:.3g} ms", va="center")
        ax.set(xlabel="milliseconds", xlim=(0, 1.15 * max(milliseconds)))
        ax.set_title(f"{kilobytes:g} kB on {count} GPUs: fastest is {fastest} (simulated)")
        ax.invert_yaxis()
        return figure

    return Explorer(
        draw,
        count=choice("GPUs", [2, 3, 4, 8, 16], 8),
        kilobytes=choice("kilobytes", [0.04, 0.4, 4, 40, 400, 4000], 4),
        latency=choice("latency, microseconds", [1, 2.5, 5, 10, 25, 100], 2.5),
        link=choice("link speed, times this GPU's", [0.1, 0.5, 1, 2, 10, 100], 1),
    )


def _measure_all_reduce(way: Callable, count: int, numel: int, spec: Spec) -> float:
    with hardware.other_devices(count, spec, backing="meta") as gpus:
        tensors = [torch.empty(numel, device=gpu) for gpu in gpus]
        with timeline.trace() as t:
            way(tensors)
    return t.seconds


def explore_schedules() -> Explorer:
    """Lesson 05: the drawing and the bubble of a schedule."""
    makers = {
        "naive": schedules.naive,
        "GPipe": schedules.gpipe,
        "1F1B": schedules.one_f_one_b,
        "interleaved": lambda p, m: schedules.interleaved(p, m, 2),
        "zero bubble": schedules.zero_bubble,
    }

    def draw(name: str, count: int, microbatches: int, transfer: float) -> Figure:
        schedule = makers[name](count, microbatches)
        part = 0.5 if "interleaved" in name else 1.0  # of a stage that is half as long
        figure, ax = style.figure(height=1.4 + 0.36 * count)
        pipeline.draw(
            schedule, ax, forward=part, input_gradient=part, weight_gradient=part, transfer=transfer
        )
        held = max(schedules.held(schedule))
        ax.set_xlabel(f"time; a device holds at most {held} activations")
        return figure

    return Explorer(
        draw,
        name=choice("schedule", list(makers), "1F1B"),
        count=choice("GPUs", [2, 4, 8], 4),
        microbatches=choice("microbatches", [8, 16, 32], 8),
        transfer=choice("a transfer, in forwards", [0, 0.1, 0.25, 0.5], 0),
    )


def explore_tensor_parallel() -> Explorer:
    """Lesson 06: computing and waiting of a transformer block on one to eight A100."""
    counts = [1, 2, 4, 8]

    def draw(width: int, tokens: int, link: int) -> Figure:
        spec = A100.with_(launch_overhead=0.0, link_bandwidth=link * 1e9)
        seconds = [_measure_block(count, width, tokens, spec) for count in counts]
        products = [first * 1e3 for first, _ in seconds]
        total = [whole * 1e3 for _, whole in seconds]
        rest = [whole - product for whole, product in zip(total, products, strict=True)]
        parts = {"matrix products": products, "all else: exchange, norms, sums": rest}
        title = "One block, forward and backward (simulated; speed-up above each bar)"
        return _draw_speed_ups("A100", counts, parts, title)

    return Explorer(
        draw,
        width=choice("width", [1024, 2048, 4096, 8192], 4096),
        tokens=choice("tokens", [512, 1024, 2048, 4096], 2048),
        link=choice("link, GB/s", [3, 25, 64, 300, 450], 300),
    )


def _measure_block(count: int, width: int, tokens: int, spec: Spec) -> tuple[float, float]:
    """Seconds in matrix products on one GPU, and of the whole."""
    with hardware.other_devices(count, spec, backing="meta") as gpus:
        with gpus[0]:
            block = ParallelBlock(Block(width, 32, 0.0), gpus).bfloat16()
        xs = [
            torch.empty(tokens, 1, width, dtype=torch.bfloat16, device=gpu, requires_grad=True)
            for gpu in gpus
        ]
        with timeline.trace() as t:
            outs = block(xs)
            torch.autograd.backward(outs, [torch.empty_like(out) for out in outs])
    products = t.seconds_by_kind()["matmul"] / count
    return products, t.seconds


def explore_ring_attention() -> Explorer:
    """Lesson 07: the timeline of causal ring attention on four A100."""

    def draw(order: str, tokens: int, link: int) -> Figure:
        spec = A100.with_(launch_overhead=0.0, link_bandwidth=link * 1e9)
        with hardware.other_devices(4, spec, backing="meta") as gpus:
            parts = [
                [
                    torch.empty(
                        1, 32, tokens // 4, 128,
                        dtype=torch.bfloat16, device=gpu, requires_grad=True,
                    )
                    for gpu in gpus
                ]
                for _ in "qkv"
            ]  # fmt: skip
            with timeline.trace() as t:
                outs = ring_attention(*parts, causal=True, zigzag=order == "zigzag")
                torch.autograd.backward(outs, [torch.empty_like(out) for out in outs])
        figure, ax = style.figure(height=4.4)
        t.plot(ax, title=f"Causal, forward and backward, {t.seconds * 1e3:.1f} ms")
        return figure

    return Explorer(
        draw,
        order=choice("order of the tokens", ["contiguous", "zigzag"], "contiguous"),
        tokens=choice("tokens", [2048, 8192, 32768], 8192),
        link=choice("link, GB/s", [3, 25, 300], 300),
    )


def explore_sharding() -> Explorer:
    """Lesson 08: bytes of parameters, gradients and optimizer state on each GPU, by stage."""
    counts = [1, 2, 4, 8, 16, 32, 64, 128]

    def draw(billions: float, memory: int) -> Figure:
        figure, ax = style.figure()
        fits = []
        for stage, marker in zip(range(4), "os^D", strict=True):
            held = [billions * sharding.bytes_a_parameter(stage, count) for count in counts]
            ax.loglog(counts, held, f"{marker}-", label=f"stage {stage}")
            enough = [count for count, gigabytes in zip(counts, held, strict=True)
                      if gigabytes <= memory]  # fmt: skip
            fits.append(f"{stage}: {enough[0] if enough else 'never'}")
        ax.axhline(memory, linestyle="--", color=style.GREY, label=f"{memory} GB")
        ax.set(xlabel="GPUs", ylabel="GB on each GPU")
        ax.set_xticks(counts, counts)
        ax.minorticks_off()
        ax.set_title(f"{billions:g} billion parameters; GPUs needed in stage {', '.join(fits)}")
        figure.legend(loc="outside lower right", ncols=5)
        return figure

    return Explorer(
        draw,
        billions=choice("billion parameters", [1, 3, 7, 13, 30, 70, 175, 405], 7),
        memory=choice("GB of a GPU", [24, 40, 80, 141], 80),
    )


def explore_methods() -> Explorer:
    """Lesson 09: which methods fit, and which is the fastest."""

    def draw(width: int, batch: int, count: int, memory: int, link: float) -> Figure:
        spec = CLASSROOM.with_(
            launch_overhead=0.0,
            memory=memory * 1e6,
            link_bandwidth=CLASSROOM.link_bandwidth * link,
        )
        gpt = GPT(65, context=64, width=width, heads=8, depth=4, tied=False)
        measured = methods.compare(gpt, batch, 64, count, spec, list(methods.METHODS))
        milliseconds = [m.seconds * 1e3 if m else 0.0 for m in measured.values()]
        figure, ax = style.figure(height=3.0)
        ax.barh(list(measured), milliseconds, color=style.BLUE)
        for place, m in enumerate(measured.values()):
            words = f"{m.seconds * 1e3:.0f} ms, {m.peak / 1e6:.0f} MB" if m else "does not fit"
            ax.text(milliseconds[place], place, f"  {words}", va="center")
        ax.set(xlabel="milliseconds a step", xlim=(0, 1.35 * max(*milliseconds, 1.0)))
        fitting = {name: m.seconds for name, m in measured.items() if m}
        fastest = min(fitting, key=fitting.__getitem__) if fitting else "none fits"
        ax.set_title(f"{count} GPUs of {memory} MB: fastest is {fastest} (simulated)")
        ax.invert_yaxis()
        return figure

    return Explorer(
        draw,
        width=choice("width of the GPT", [64, 128, 256], 128),
        batch=choice("batch size", [8, 16, 32], 16),
        count=choice("GPUs", [2, 4], 4),
        memory=choice("MB of a GPU", [15, 30, 60, 200], 200),
        link=choice("link speed, times this GPU's", [0.1, 1, 10], 1),
    )


def explore_stages() -> Explorer:
    """Lesson 04: forward and backward of an MLP in stages, and whether a training step fits."""

    def draw(stages: int, width: int, batch: int) -> Figure:
        with hardware.other_devices(stages, CLASSROOM.with_(memory=1e9)) as gpus:
            t, peak = _measure_stages(gpus, width, batch)
        idle = sum(t.idle_fraction(index) for index in range(stages)) / stages
        fits = "fits" if peak <= CLASSROOM.memory else "does not fit"
        figure, ax = style.figure(height=1.6 + 0.3 * stages)
        t.plot(
            ax,
            title=f"{t.seconds * 1e3:.0f} ms, each idle {idle:.0%}; with AdamW at most "
            f"{peak / 1e6:.1f} MB on one GPU, {fits} in 80",
        )
        return figure

    return Explorer(
        draw,
        stages=choice("GPUs", [1, 2, 4, 8], 4),
        width=choice("width", [128, 256, 512, 768, 1024], 768),
        batch=choice("batch size", [16, 64, 256, 1024], 64),
    )


def _measure_stages(gpus: list[torch.device], width: int, batch: int) -> tuple[timeline.Trace, int]:
    """Forward and backward of an MLP of eight equal layers, and peak bytes of a whole step."""
    cuts = [16 // len(gpus) * stage for stage in range(1, len(gpus))]  # a layer is two modules
    model = LayerParallel(MLP(*[width] * 9), gpus, cuts)
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(batch, width, device=gpus[0])
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with timeline.trace() as t:
        model(x).sum().backward()
    optimizer.step()
    return t, max(hardware.peak_memory(gpu) for gpu in gpus)
