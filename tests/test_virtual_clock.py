"""Simulated time follows CUDA's rules of what waits for what, and formulas that fit on one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

import course_lib
from course_lib.spans import Span
from course_lib.virtual.clock import Clock
from course_lib.virtual.network import Nodes
from round_numbers import LATENCY, LAUNCH, SPEC, seconds, spans_of

Devices = list[torch.device]


# What one operation takes.


def test_a_product_takes_its_flops_over_the_peak(gpus: Devices):
    x = torch.ones(200, 300, device=gpus[0])
    y = torch.ones(300, 400, device=gpus[0])
    (span,) = spans_of(lambda: x @ y)
    flops = 2 * 200 * 300 * 400
    assert (span.name, span.kind, span.flops, span.device) == ("mm", "matmul", flops, 0)
    assert span.bytes == 4 * (200 * 300 + 300 * 400 + 200 * 400)
    assert span.end - span.start == seconds(flops / 1e9)


def test_a_product_of_thin_matrices_takes_as_long_as_reading_them(gpus: Devices):
    x, y = torch.ones(1000, 1, device=gpus[0]), torch.ones(1, 1000, device=gpus[0])
    (span,) = spans_of(lambda: x @ y)
    assert span.end - span.start == seconds(4 * (1000 + 1000 + 1_000_000) / 1e8)


def test_everything_else_takes_as_long_as_its_memory_traffic(gpus: Devices):
    x, y = torch.ones(1000, device=gpus[1]), torch.ones(1000, device=gpus[1])
    (add,) = spans_of(lambda: x + y)
    (in_place,) = spans_of(lambda: x.mul_(2))
    assert (add.kind, add.device, add.bytes) == ("other", 1, 3 * 4000)
    assert add.end - add.start == seconds(12_000 / 1e8)
    assert in_place.end - in_place.start == seconds(8_000 / 1e8)


def test_a_product_in_bfloat16_runs_at_the_rate_of_bfloat16(gpus: Devices):
    x = torch.ones(500, 500, device=gpus[0], dtype=torch.bfloat16)
    (span,) = spans_of(lambda: x @ x)
    assert span.end - span.start == seconds(2 * 500**3 / 4e9)


@pytest.mark.parametrize(
    ("name", "program", "flops"),
    [
        ("linear", lambda x: F.linear(x, x, x[0]), 2 * 64**3),
        ("bmm", lambda x: x.expand(3, 64, 64) @ x.expand(3, 64, 64), 3 * 2 * 64**3),
        ("baddbmm", lambda x: torch.baddbmm(x, x[None], x[None]), 2 * 64**3),
        ("conv", lambda x: F.conv1d(x[None], x[:, :, None]), 2 * 64**3),
        (
            "attention",
            lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
            2 * 2 * 64**3,
        ),
    ],
)
def test_every_kind_of_product_counts_its_flops(gpus: Devices, name: str, program, flops: int):
    x = torch.ones(64, 64, device=gpus[0])
    assert sum(span.flops for span in spans_of(lambda: program(x))) == flops


def test_backward_of_a_layer_takes_twice_its_forward_flops(gpus: Devices):
    layer = torch.nn.Linear(64, 64).to(gpus[0])
    x = torch.ones(32, 64, device=gpus[0], requires_grad=True)
    forward = spans_of(lambda: layer(x))
    backward = spans_of(layer(x).sum().backward)
    flops = [sum(span.flops for span in spans) for spans in (forward, backward)]
    assert flops == [2 * 32 * 64 * 64, 2 * 2 * 32 * 64 * 64]


def test_views_take_no_time(gpus: Devices):
    x = torch.ones(10, 10, device=gpus[0])
    course_lib.synchronize()
    began = course_lib.host_seconds()
    assert spans_of(lambda: (x.t(), x[1:], x.view(100), x.expand(3, 10, 10), x.detach())) == []
    assert course_lib.host_seconds() == began


# What waits for what.


def test_the_host_runs_ahead_of_the_device(gpus: Devices):
    x = torch.ones(500, 500, device=gpus[0])
    course_lib.synchronize()
    began = course_lib.host_seconds()
    for _ in range(10):
        x = x @ x
    assert course_lib.host_seconds() - began == seconds(10 * LAUNCH)
    course_lib.synchronize()
    assert course_lib.host_seconds() - began == seconds(LAUNCH + 10 * 2 * 500**3 / 1e9)


def test_small_operations_wait_for_the_host(gpus: Devices):
    x = torch.ones(1, device=gpus[0])
    course_lib.synchronize()
    began = course_lib.host_seconds()
    for _ in range(10):
        x.add_(1)
    course_lib.synchronize()
    assert course_lib.host_seconds() - began == seconds(10 * LAUNCH + 8 / 1e8)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: bool(x.sum() > 0),
        lambda x: x.sum().tolist(),
        lambda x: repr(x),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: torch.vgpu.synchronize(x.device),
    ],
)
def test_reading_a_value_makes_the_host_wait(gpus: Devices, read):
    x = torch.ones(500, 500, device=gpus[0])
    course_lib.synchronize()
    began = course_lib.host_seconds()
    for _ in range(4):
        x = (x @ x) / 500
    read(x)
    assert course_lib.host_seconds() - began > 4 * 2 * 500**3 / 1e9


def test_waiting_for_one_device_does_not_wait_for_another(gpus: Devices):
    x, y = torch.ones(500, 500, device=gpus[0]), torch.ones(1, device=gpus[1])
    course_lib.synchronize()
    began = course_lib.host_seconds()
    x @ x
    y.item()
    assert course_lib.host_seconds() - began < 2 * 500**3 / 1e9


def test_two_devices_compute_at_the_same_time(gpus: Devices):
    x, y = torch.ones(500, 500, device=gpus[0]), torch.ones(500, 500, device=gpus[1])
    with course_lib.trace() as recording:
        x @ x
        y @ y
    first, second = recording.spans
    assert second.start - first.start == seconds(LAUNCH)
    assert recording.seconds == seconds(2 * LAUNCH + 2 * 500**3 / 1e9)


# Copies.


def test_what_is_written_alone_is_not_charged_as_read(gpus: Devices):
    a, b, c = (torch.ones(1000, device=gpus[0]) for _ in range(3))

    def bytes_of(program: Callable[[], object]) -> int:
        with course_lib.trace() as timeline:
            program()
        return sum(span.bytes for span in timeline.spans)

    assert bytes_of(lambda: torch._foreach_zero_([a, b])) == 2 * 4000
    assert bytes_of(lambda: torch._foreach_copy_([a, b], [c, c])) == 4 * 4000
    assert bytes_of(lambda: a.normal_()) == bytes_of(lambda: torch.rand_like(a)) == 4000
    assert bytes_of(lambda: torch.add(a, b, out=c)) == 3 * 4000
    assert bytes_of(lambda: a.add_(b)) == 3 * 4000


def test_a_fused_optimizer_reads_gradients_and_does_not_write_them(gpus: Devices):
    parameter = torch.nn.Parameter(torch.ones(1000, device=gpus[0]))
    parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    with course_lib.trace() as timeline:
        optimizer.step()
    (step,) = [span for span in timeline.spans if span.name == "_fused_adamw_"]
    # It reads weight, gradient and two moments, and writes weight and moments; and the step count.
    assert step.bytes == 7 * 4000 + 4


def test_a_copy_takes_its_latency_and_its_bytes_over_the_bandwidth(gpus: Devices):
    x = torch.ones(1000, device=gpus[0])
    (span,) = spans_of(lambda: x.to(gpus[2]))
    assert (span.kind, span.route, span.bytes) == ("copy", (0, 2), 4000)
    assert span.end - span.start == seconds(LATENCY + 4000 / 1e7)


def test_copies_from_and_to_the_host_run_at_the_hosts_bandwidth(gpus: Devices):
    x = torch.ones(1000)
    (there,) = spans_of(lambda: x.to(gpus[2]))
    y = x.to(gpus[2])
    (back,) = spans_of(y.cpu)
    assert (there.route, back.route) == ((None, 2), (2, None))
    for span in (there, back):
        assert span.end - span.start == seconds(LATENCY + 4000 / 5e6)


def test_a_copy_between_devices_does_not_make_the_host_wait(gpus: Devices):
    x = torch.ones(100_000, device=gpus[0])
    course_lib.synchronize()
    began = course_lib.host_seconds()
    x.to(gpus[1])
    assert course_lib.host_seconds() - began == seconds(LAUNCH)
    x.cpu()
    assert course_lib.host_seconds() - began > LATENCY + 400_000 / 1e7


def test_a_copy_keeps_both_of_its_ends_busy(gpus: Devices):
    x, y, z = (torch.ones(1000, device=gpus[index]) for index in range(3))
    copy, sender, receiver, bystander = spans_of(
        lambda: (x.to(gpus[1]), x.add_(1), y.add_(1), z.add_(1))
    )
    assert sender.start == receiver.start == copy.end
    assert bystander.start < copy.end


def test_a_copy_waits_for_both_of_its_ends(gpus: Devices):
    x, y = torch.ones(10, device=gpus[0]), torch.ones(500, 500, device=gpus[1])
    product, copy = spans_of(lambda: (y @ y, x.to(gpus[1])))
    assert copy.start == product.end


def test_a_cast_sends_the_bytes_of_what_was_there(gpus: Devices):
    x = torch.ones(1000, device=gpus[0])
    (span, *_) = spans_of(lambda: x.to(gpus[1], torch.bfloat16))
    assert span.bytes == 4000


def test_copy_into_a_tensor_on_another_device(gpus: Devices):
    x, y = torch.ones(1000, device=gpus[0]), torch.empty(1000, device=gpus[3])
    (span,) = spans_of(lambda: y.copy_(x))
    assert (span.route, span.bytes) == ((0, 3), 4000)


def test_the_gradient_of_a_copy_is_a_copy_back(gpus: Devices):
    x = torch.ones(1000, device=gpus[0], requires_grad=True)
    loss = x.to(gpus[1]).sum()
    routes = [span.route for span in spans_of(loss.backward) if span.route]
    assert routes == [(1, 0)]


def test_a_chain_over_two_devices_adds_up(gpus: Devices):
    x = torch.ones(500, 500, device=gpus[0])
    with course_lib.trace() as recording:
        y = (x @ x).to(gpus[1])
        y @ y
    product = 2 * 500**3 / 1e9
    assert recording.seconds == seconds(LAUNCH + 2 * product + LATENCY + 1_000_000 / 1e7)


# Always the same.

PROGRAM = """
import torch, course_lib
from course_lib.models import GPT, next_token_loss
torch.set_num_threads(THREADS)
torch.manual_seed(0)
first, second = course_lib.devices(2)
model = GPT(11, context=8, width=16, heads=2, depth=2, dropout=0.1).to(first)
optimizer = torch.optim.AdamW(model.parameters())
with course_lib.trace() as recording:
    tokens = torch.randint(0, 11, (2, 9), device=first)
    loss = next_token_loss(model(tokens[:, :-1]), tokens[:, 1:])
    loss.backward()
    [p.grad.to(second) for p in model.parameters()]
    optimizer.step()
for span in recording.spans:
    print(span.name, span.device, span.start.hex(), span.end.hex(), span.flops, span.bytes)
print(recording.peak_memory, loss.item().hex())
"""


def test_the_same_program_takes_the_same_time_in_another_process_with_other_threads(
    vgpus: Devices, capsys: pytest.CaptureFixture
):
    before = torch.get_num_threads()
    exec(PROGRAM.replace("THREADS", "1"), {})
    torch.set_num_threads(before)
    elsewhere = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("THREADS", "4")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COURSE_DEVICES": "virtual", "PYTHONHASHSEED": "7"},
    )
    here = capsys.readouterr().out
    assert here.count("\n") > 100
    assert here[here.index("2 virtual GPUs") :] == elsewhere.stdout


def test_the_same_program_takes_the_same_time_again(vgpus: Devices):
    def run() -> list[Span]:
        device = course_lib.devices(1)[0]
        x = torch.ones(20, 20, device=device, requires_grad=True)
        return spans_of(lambda: (x @ x).softmax(-1).sum().backward())

    assert run() == run()


# Whole programs take what their formula says.


def test_a_chain_of_products_takes_one_launch_and_its_flops(gpus: Devices):
    x = torch.ones(100, 100, device=gpus[0])

    def program():
        y = x
        for _ in range(50):
            y = y @ x

    assert spans_of(program)[-1].end == seconds(LAUNCH + 50 * 2 * 100**3 / 1e9)


def test_a_naive_split_takes_the_sum_of_its_stages_and_of_its_copies(gpus: Devices):
    weights = [torch.ones(100, 100, device=gpu) for gpu in gpus]

    def program():
        y = weights[0]
        for weight in weights:
            y = y.to(weight.device) @ weight

    product, copy = 2 * 100**3 / 1e9, LATENCY + 40_000 / 1e7
    assert spans_of(program)[-1].end == seconds(LAUNCH + 4 * product + 3 * copy)


@pytest.mark.parametrize("microbatches", [1, 4, 9])
def test_a_saturated_pipeline_takes_m_and_p_minus_1_steps(vgpus: Devices, microbatches: int):
    free = {"latency": 0.0, "link_bandwidth": 1e30, "launch_overhead": 0.0}
    gpus = course_lib.devices(4, SPEC.with_(**free))
    weights = [torch.ones(100, 100, device=gpu) for gpu in gpus]

    def program():
        for _ in range(microbatches):
            y = weights[0]
            for weight in weights:
                y = y.to(weight.device) @ weight

    product = 2 * 100**3 / 1e9
    assert spans_of(program)[-1].end == seconds((microbatches + 4 - 1) * product)


# The clock alone.


def test_the_clock_by_itself():
    clock = Clock(SPEC, 2, Nodes.of(2, 1, SPEC.network))
    clock.compute("mm", 0, flops=1e9, nbytes=8, peak=1e9)
    assert clock.host == seconds(LAUNCH)
    assert [stream.free_at for stream in clock.current] == [seconds(LAUNCH + 1), 0]
    clock.copy(0, 1, 10_000_000)
    both = [seconds(LAUNCH + 1 + LATENCY + 1)] * 2
    assert [stream.free_at for stream in clock.current] == both
    clock.synchronize(1)
    assert clock.host == seconds(LAUNCH + 1 + LATENCY + 1)
    clock.synchronize(0)
    assert clock.host == seconds(LAUNCH + 1 + LATENCY + 1)
