"""``course_lib.devices`` gives real GPUs or virtual ones, and says which in one line."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import course_lib
from course_lib import A100, CLASSROOM, H100, H200, LAPTOP, Spec
from course_lib.hardware import fresh_devices

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture(autouse=True)
def _virtual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COURSE_DEVICES", "virtual")


def test_devices_are_torch_devices():
    assert course_lib.devices(2) == [torch.device("vgpu", 0), torch.device("vgpu", 1)]
    assert all(course_lib.is_virtual(device) for device in course_lib.devices(3))
    assert not course_lib.is_virtual(torch.device("cpu"))
    assert not course_lib.is_virtual(torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (1, "1 virtual GPU: vgpu:0, each like an A100 / 1000 with 80.00 MB of memory."),
        (4, "4 virtual GPUs: vgpu:0 to vgpu:3, each like an A100 / 1000 with 80.00 MB of memory."),
    ],
)
def test_one_line_says_what_they_are(count: int, words: str, capsys: pytest.CaptureFixture):
    course_lib.devices(count)
    assert capsys.readouterr().out == words + " Times are simulated.\n"


def test_the_line_names_the_kind_that_was_asked_for(capsys: pytest.CaptureFixture):
    device = course_lib.devices(2, H100 / 10)[0]
    assert "H100 / 10 with 8.00 GB" in capsys.readouterr().out
    assert course_lib.memory_capacity(device) == 8e9


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("H100", "an H100 with"),
        ("GB200", "a GB200 with"),
        ("RTX 4060 Laptop", "an RTX 4060 Laptop with"),
        ("test GPU", "a test GPU with"),
        ("Instinct MI300X", "an Instinct MI300X with"),
    ],
)
def test_the_line_reads_as_it_is_spoken(name: str, words: str, capsys: pytest.CaptureFixture):
    course_lib.devices(1, H100.with_(name=name))
    assert f"each like {words}" in capsys.readouterr().out


@pytest.mark.parametrize("count", [0, -1, 129, 300, "4", 2.0, True, None, [1]])
def test_a_count_that_is_none_is_refused(count: object):
    refusal = r"^devices\(count\) takes a whole number from 1 to 128: "
    with pytest.raises(ValueError, match=refusal):
        course_lib.devices(count)
    with pytest.raises(ValueError, match=refusal), fresh_devices(count):
        pass


def test_the_refusal_shows_what_was_given():
    with pytest.raises(ValueError, match=r": '4'$"):
        course_lib.devices("4")


def test_an_unknown_choice_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COURSE_DEVICES", "nonsense")
    with pytest.raises(ValueError) as caught:
        course_lib.devices(2)
    assert str(caught.value) == "COURSE_DEVICES must be 'virtual' or 'cuda', not 'nonsense'"


def test_asking_for_real_gpus_that_are_not_there_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COURSE_DEVICES", "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RuntimeError) as caught:
        course_lib.devices(4)
    message = str(caught.value)
    assert message.startswith("COURSE_DEVICES=cuda asks for real GPUs, and this machine has 1 of")
    assert "4 wanted" in message and "unset it to use virtual ones" in message
    assert "\n" not in message


@pytest.mark.parametrize("choice", ["", None])
def test_enough_real_gpus_are_used(
    choice: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    if choice is None:
        monkeypatch.delenv("COURSE_DEVICES")
    else:
        monkeypatch.setenv("COURSE_DEVICES", choice)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    assert course_lib.devices(2) == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert capsys.readouterr().out == (
        "2 real GPUs: cuda:0 to cuda:1 (NVIDIA H200). Times are measured.\n"
    )
    assert course_lib.devices(3)[2] == torch.device("vgpu", 2)  # one too few: all virtual


def test_virtual_gpus_can_be_forced(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert course_lib.devices(2)[0].type == "vgpu"


def test_the_last_device_of_the_largest_machine_is_itself():
    devices = course_lib.devices(128)
    assert len(set(devices)) == 128
    assert torch.ones(1, device=devices[127]).device == devices[127]


def test_asking_again_sets_the_clock_to_zero():
    device = course_lib.devices(2)[0]
    torch.ones(1000, device=device).add_(1)
    assert course_lib.host_seconds() > 0
    course_lib.devices(2)
    assert course_lib.host_seconds() == 0


def run_python(code: str) -> str:
    """What a Python process of its own prints."""
    environment = {**os.environ, "COURSE_DEVICES": "virtual"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    return done.stdout


def test_importing_the_course_leaves_pytorch_as_it_is():
    said = run_python(
        "import torch, course_lib\n"
        "print(hasattr(torch, 'vgpu'), torch._C._get_privateuse1_backend_name())\n"
        "print(torch.__future__.get_swap_module_params_on_conversion())\n"
        "print(course_lib.host_seconds() > 0)\n"
        "course_lib.synchronize()\n"
        "with course_lib.region('x'): pass"
    )
    assert said.split() == ["False", "privateuseone", "False", "True"]


# What a GPU can do.


def test_a_gpu_divided_by_a_constant_keeps_its_latencies_and_proportions():
    tenth = A100 / 10
    assert tenth.name == "A100 / 10"
    assert tenth.flops == {dtype: rate / 10 for dtype, rate in A100.flops.items()}
    assert tenth.memory == A100.memory / 10
    assert tenth.memory_bandwidth == A100.memory_bandwidth / 10
    assert tenth.link_bandwidth == A100.link_bandwidth / 10
    assert tenth.host_bandwidth == A100.host_bandwidth / 10
    assert (tenth.latency, tenth.launch_overhead) == (A100.latency, A100.launch_overhead)
    assert CLASSROOM.memory == 80e6


@pytest.mark.parametrize("factor", [0, -2, float("nan"), float("inf"), "2"])
def test_a_gpu_cannot_be_divided_by_nothing(factor: float):
    with pytest.raises(ValueError, match="only be divided by a positive number"):
        A100 / factor


def test_some_numbers_of_a_gpu_can_be_changed():
    small = A100.with_(memory=40e9)
    assert small.memory == 40e9
    assert small.link_bandwidth == A100.link_bandwidth
    assert small.name != A100.name
    assert A100.with_(name="mine").name == "mine"


def test_a_field_that_a_gpu_does_not_have_is_named_beside_those_that_it_has():
    with pytest.raises(TypeError) as caught:
        A100.with_(memory=1e9, colour=3)
    assert str(caught.value) == (
        "a Spec has no 'colour'; it has name, flops, memory, memory_bandwidth, link_bandwidth, "
        "host_bandwidth, source, latency, launch_overhead, network, achieved"
    )


@pytest.mark.parametrize(
    "field", ["memory", "memory_bandwidth", "link_bandwidth", "host_bandwidth"]
)
@pytest.mark.parametrize("number", [0, -1.0, float("nan"), float("inf"), "80", None, True])
def test_a_size_or_speed_that_is_no_number_above_zero_is_refused(field: str, number: object):
    with pytest.raises(ValueError) as caught:
        A100.with_(**{field: number})
    assert str(caught.value) == f"{field} of a Spec is a finite number above 0, not {number!r}"


@pytest.mark.parametrize("field", ["latency", "launch_overhead"])
def test_a_latency_may_be_zero_and_not_less(field: str):
    assert getattr(A100.with_(**{field: 0}), field) == 0
    for number in (-1e-6, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"^{field} of a Spec is a finite number, 0 or above"):
            A100.with_(**{field: number})


@pytest.mark.parametrize("rate", [0, -1.0, float("nan"), None])
def test_a_rate_that_is_no_number_above_zero_is_refused_with_its_dtype(rate: object):
    with pytest.raises(ValueError, match=r"^flops\[torch.bfloat16\] of a Spec is a finite number"):
        A100.with_(flops={torch.float32: 1e12, torch.bfloat16: rate})


@pytest.mark.parametrize("flops", [{}, {torch.bfloat16: 1e12}, {"float32": 1e12}, 19.5e12, None])
def test_a_gpu_without_a_rate_for_float32_is_refused(flops: object):
    with pytest.raises(
        ValueError, match=r"a rate for each dtype, torch.float32 at least"
    ) as caught:
        A100.with_(flops=flops)
    assert "\n" not in str(caught.value)


def test_a_dtype_without_a_rate_runs_at_that_of_float32():
    assert A100.peak_flops(torch.bfloat16) == 312e12
    assert A100.peak_flops(torch.int8) == A100.peak_flops(torch.float32) == 19.5e12


@pytest.mark.parametrize("spec", [A100, H100, H200, LAPTOP], ids=lambda spec: spec.name)
def test_every_spec_names_its_source_and_has_sensible_numbers(spec: Spec):
    assert spec.source
    assert spec.flops[torch.float64] <= spec.flops[torch.float32] < spec.flops[torch.bfloat16]
    assert spec.host_bandwidth <= spec.link_bandwidth < spec.memory_bandwidth < 1e13
    assert 1e9 < spec.memory < 1e12
    assert 0 < spec.latency < 1e-4 and 0 < spec.launch_overhead < 1e-4


def test_a_spec_that_is_none_is_refused_and_leaves_the_devices_alone(vgpus):
    with pytest.raises(TypeError, match="takes a Spec"):
        course_lib.devices(2, "A100")
    assert (torch.ones(2, device=vgpus[3]) + 1).sum().item() == 4


def test_devices_inside_a_trace_are_refused(vgpus):
    with course_lib.trace(), pytest.raises(RuntimeError, match="before trace"):
        course_lib.devices(2)


# A device by its name, and devices that are not there.

QUESTIONS = [
    course_lib.side_stream,
    course_lib.current_stream,
    course_lib.event,
    course_lib.memory_in_use,
    course_lib.peak_memory,
    course_lib.reset_peak_memory,
    course_lib.memory_capacity,
]


def test_a_device_may_be_given_by_its_name(vgpus):
    held = torch.ones(250, device=vgpus[1])
    del held
    kept = torch.ones(100, device=vgpus[1])
    assert course_lib.is_virtual("vgpu:1") and course_lib.is_virtual("vgpu")
    assert not course_lib.is_virtual("cuda:0") and not course_lib.is_virtual("cpu")
    assert course_lib.side_stream("vgpu:1").device == vgpus[1]
    assert course_lib.current_stream("vgpu:1") is course_lib.current_stream(vgpus[1])
    assert course_lib.memory_in_use("vgpu:1") == kept.nbytes
    assert course_lib.peak_memory("vgpu:1") == 1000
    course_lib.reset_peak_memory("vgpu:1")
    assert course_lib.peak_memory("vgpu:1") == kept.nbytes
    assert course_lib.memory_capacity("vgpu:1") == CLASSROOM.memory
    with course_lib.side_stream("vgpu:1"):
        moment = course_lib.event("vgpu:1")
        moment.record()
        assert course_lib.current_stream("vgpu").device == vgpus[1]  # the current device
    moment.synchronize()
    assert moment.query()


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.__name__)
def test_a_device_that_is_not_there_is_named(question, vgpus):
    for device in ("vgpu:4", torch.device("vgpu", 4)):
        with pytest.raises(RuntimeError, match=r"^vgpu:4 does not exist: this machine has 4 "):
            question(device)
    with pytest.raises(RuntimeError, match=r"^this is for GPUs, real or virtual, and not"):
        question("cpu")
    with pytest.raises(TypeError, match=r"^a device is a torch.device or its name"):
        question(3)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.__name__)
def test_a_real_gpu_that_is_not_there_is_named(question, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RuntimeError) as caught:
        question("cuda:1")
    assert str(caught.value) == "cuda:1 does not exist: this machine has 1 real GPU"


def test_before_there_are_devices_a_name_says_what_to_call():
    said = run_python(
        "import course_lib\n"
        "print(course_lib.is_virtual('vgpu:0'))\n"
        "try: course_lib.side_stream('vgpu:0')\n"
        "except RuntimeError as error: print(error)"
    )
    assert said == "True\nthere are no virtual GPUs yet: call course_lib.devices(4) first\n"


# Other devices for a while.


def test_what_is_made_elsewhere_is_refused_in_one_line(vgpus):
    outside = torch.ones(3, 3, device=vgpus[3])
    mine = course_lib.side_stream(vgpus[0])
    moment = mine.record_event()
    uses = [
        lambda: outside + 1,
        lambda: torch.ones(3, 3, device="vgpu:0") @ outside,
        lambda: outside.cpu(),
        lambda: outside.to("vgpu:0"),
        lambda: outside[0, 0].item(),
        lambda: repr(outside),
        lambda: torch.ones(3, 3, device="vgpu:0").copy_(outside),
        lambda: torch.nn.functional.dropout(outside, 0.5),
    ]
    with fresh_devices(1):
        for use in uses:
            with pytest.raises(RuntimeError, match=r"^this tensor on vgpu:3 is of other virtual"):
                use()
        inside = torch.ones(3, 3, device="vgpu:0")
        stream = course_lib.side_stream("vgpu:0")
        for use in (mine.__enter__, mine.synchronize, mine.query, moment.synchronize):
            with pytest.raises(RuntimeError, match=r"^this stream, or the stream of this event"):
                use()
        with pytest.raises(RuntimeError, match="is of other virtual GPUs"):
            stream.wait_event(moment)
    for use in (lambda: inside + 1, lambda: outside.to(vgpus[0]) + inside, inside.cpu):
        with pytest.raises(RuntimeError, match=r"^this tensor on vgpu:0 is of other virtual GPUs"):
            use()
    with pytest.raises(RuntimeError, match="is of other virtual GPUs"), stream:
        pass
    assert (outside + 1).sum().item() == 18
    with mine:
        moment.synchronize()


def test_fresh_devices_have_a_clock_memories_and_dice_of_their_own(vgpus):
    held = torch.ones(1000, device=vgpus[0])
    time, peak = course_lib.host_seconds(), course_lib.peak_memory(vgpus[0])
    state = torch.vgpu.get_rng_state(0)
    with fresh_devices(2):
        assert (course_lib.host_seconds(), course_lib.memory_in_use("vgpu:0")) == (0, 0)
        torch.randn(5000, device="vgpu:0") + 1
    assert course_lib.host_seconds() == time
    assert course_lib.memory_in_use(vgpus[0]) == held.nbytes
    assert course_lib.peak_memory(vgpus[0]) == peak
    assert torch.vgpu.get_rng_state(0).equal(state)


def test_missing_waits_inside_fresh_devices_are_not_told_to_a_trace_outside(vgpus):
    def forget_a_wait() -> None:
        with course_lib.side_stream("vgpu:0"):
            x = torch.ones(1000, device="vgpu:0") * 2
        x + 1

    with course_lib.trace() as outside:
        with fresh_devices(1), course_lib.trace() as inside:
            forget_a_wait()
        with fresh_devices(1), pytest.warns(course_lib.StreamHazard):
            forget_a_wait()  # nobody listens there: Python warns
    assert len(inside.hazards) == 1
    assert (outside.hazards, outside.spans) == ([], [])


def test_devices_with_their_numbers_elsewhere_are_others(vgpus):
    held = torch.ones(3, device=vgpus[0])
    gpu = course_lib.devices(1, backing="meta")[0]
    with pytest.raises(RuntimeError, match="or before devices\\(\\) with another backing="):
        held + torch.ones(3, device=gpu)
