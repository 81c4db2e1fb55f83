"""What real GPUs did is read from ``torch.profiler``: tried on events written by hand."""

from __future__ import annotations

import time

import pytest
import torch

import course_lib
from course_lib import Trace, hardware
from course_lib.spans import Span
from course_lib.timeline import real_spans
from course_lib.timeline.real_spans import BLOCK, REGION, record_spans, spans_from_profiler
from course_lib.virtual.machine import machine

pytestmark = pytest.mark.filterwarnings("ignore:CUDA is not available")

MAIN, BACKWARD = 1, 2  # threads


def host(cat: str, name: str, ts: float, dur: float, tid: int = MAIN, **args: int) -> dict:
    """An event on a thread of the host."""
    return {"cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 9, "tid": tid, "args": args}


def gpu(cat: str, name: str, ts: float, dur: float, **args: int) -> dict:
    """An event on a GPU."""
    return {"cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 0, "tid": 7, "args": args}


TRACE = host("user_annotation", BLOCK, 1000.0, 500.0)
EVENTS = [
    {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}},
    host("cpu_op", "aten::mm", 1000.0, 90.0),
    host("cuda_runtime", "cudaLaunchKernel", 1001.0, 3.0, correlation=1),
    TRACE,
    gpu("gpu_user_annotation", BLOCK, 1020.0, 66.0, device=0, stream=7),
    gpu("kernel", "ampere_sgemm_128x64_nn", 1050.0, 20.0, device=1, stream=7, correlation=1),
    gpu("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 1010.0, 4.0,
        device=0, stream=7, bytes=4096),
    gpu("kernel", "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor>",
        1020.0, 2.0, device=0, stream=7),
    gpu("gpu_memcpy", "Memcpy PtoP (Device -> Device)", 1030.0, 5.0,
        fromDevice=1, inDevice=1, toDevice=0, stream=7, bytes=8192),
    gpu("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 1040.0, 1.0,
        device=1, stream=7, bytes=512),
    gpu("gpu_memset", "Memset (Device)", 1045.0, 1.0, device=1, stream=7, bytes=64),
    gpu("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 1080.0, 6.0,
        device=1, stream=7, bytes=16),
]  # fmt: skip


# What ran where and when.


def test_spans_are_the_work_of_the_gpus_in_order():
    spans = spans_from_profiler(EVENTS)
    assert [(span.device, span.kind) for span in spans] == [
        (0, "copy"),
        (0, "other"),
        (1, "copy"),
        (1, "other"),
        (1, "other"),
        (1, "matmul"),
        (1, "copy"),
    ]
    assert [round((span.end - span.start) * 1e6) for span in spans] == [4, 2, 5, 1, 1, 20, 6]


def test_times_count_from_the_start_of_the_block():
    spans = spans_from_profiler(EVENTS)
    assert [round(span.start * 1e6) for span in spans] == [10, 20, 30, 40, 45, 50, 80]


def test_a_profile_tells_from_where_to_where_bytes_were_copied():
    recording = Trace("cuda", 2, spans_from_profiler(EVENTS), seconds=86e-6)
    assert recording.bytes_moved == {
        ("host", "cuda:0"): 4096,
        ("cuda:1", "cuda:0"): 8192,
        ("cuda:1", "host"): 16,
    }
    assert recording.bytes_between_devices == 8192
    assert recording.busy_seconds(0) == pytest.approx(11e-6)
    assert recording.busy_seconds(1) == pytest.approx(33e-6)


@pytest.mark.parametrize(
    "name",
    [
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64",
        "void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_256x128>",
        "void cudnn::cnn::conv2d_grouped_direct_kernel",
        "pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>",
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT",
        "void gemmk1_kernel<int, float>",
    ],
)
def test_kernels_of_matrix_products_are_known_by_their_names(name: str):
    (span,) = spans_from_profiler([TRACE, gpu("kernel", name, 1000.0, 1.0, device=0)])
    assert span.kind == "matmul"


def test_a_profile_without_gpu_work_has_no_spans():
    assert spans_from_profiler(EVENTS[:4]) == []


def test_a_span_knows_its_stream_and_the_default_one_has_no_name():
    kernels = [gpu("kernel", "add", 1001.0, 1.0, device=0, stream=n) for n in (7, 13)]
    copy = gpu("gpu_memcpy", "PtoP", 1003.0, 1.0, fromDevice=0, toDevice=1, stream=13)
    spans = spans_from_profiler([TRACE, *kernels, copy])
    assert [span.streams for span in spans] == [("",), ("stream 13",), ("stream 13", "")]
    assert (spans[2].devices, spans[2].streams) == ((0, 1), ("stream 13", ""))


# Regions.


def regions_of(*events: dict) -> list[str]:
    """The regions of one kernel for each launch among ``events``, in the order of the launches."""
    launches = [event for event in events if event["args"]]
    kernels = [
        gpu("kernel", "add", 2000.0 + n, 1.0, device=0, **event["args"])
        for n, event in enumerate(launches)
    ]
    return [span.region for span in spans_from_profiler([TRACE, *events, *kernels])]


def launch(ts: float, number: int, tid: int = MAIN, cat: str = "cuda_runtime") -> dict:
    return host(cat, "cudaLaunchKernel", ts, 2.0, tid, correlation=number)


def entered(name: str, ts: float, dur: float, tid: int = MAIN) -> dict:
    return host("user_annotation", REGION + name, ts, dur, tid)


def test_a_kernel_belongs_to_the_innermost_region_of_its_launch():
    assert regions_of(
        launch(1005.0, 1),
        entered("outer", 1010.0, 100.0),
        launch(1020.0, 2),
        entered("inner", 1030.0, 10.0),
        launch(1035.0, 3),
        launch(1050.0, 4),
        launch(1150.0, 5),
    ) == ["", "outer", "inner", "outer", ""]


def test_it_does_not_matter_when_the_kernel_ran():
    events = [TRACE, entered("forward", 1000.0, 10.0), entered("backward", 1010.0, 10.0)]
    late = gpu("kernel", "add", 1015.0, 1.0, device=0, correlation=1)
    (span,) = spans_from_profiler([*events, launch(1005.0, 1), late])
    assert span.region == "forward"


def test_copies_and_launches_through_the_driver_have_regions_too():
    copy = gpu("gpu_memcpy", "Memcpy HtoD", 1090.0, 1.0, device=0, correlation=3)
    kernel = gpu("kernel", "nvjet", 1091.0, 1.0, device=0, correlation=4)
    calls = [launch(1010.0, 3), launch(1020.0, 4, cat="cuda_driver")]
    spans = spans_from_profiler([TRACE, entered("forward", 1000.0, 50.0), *calls, copy, kernel])
    assert [span.region for span in spans] == ["forward", "forward"]


def test_the_annotations_of_pytorch_itself_are_no_regions():
    annotation = host("user_annotation", "Optimizer.step#AdamW.step", 1020.0, 50.0)
    assert regions_of(entered("step", 1010.0, 90.0), annotation, launch(1030.0, 1)) == ["step"]
    assert regions_of(annotation, launch(1030.0, 1)) == [""]


def test_what_backwards_thread_launches_belongs_to_the_region_that_called_backward():
    backward = entered("backward", 1010.0, 50.0)
    assert regions_of(backward, launch(1020.0, 1, BACKWARD)) == ["backward"]


def test_a_region_of_the_launching_thread_goes_first():
    events = [entered("main", 1010.0, 50.0), entered("its own", 1015.0, 10.0, BACKWARD)]
    launches = [launch(1020.0, 1, BACKWARD), launch(1021.0, 2), launch(1030.0, 3, BACKWARD)]
    assert regions_of(*events, *launches) == ["its own", "main", "main"]


# With PyTorch's own real_spans. There is no GPU here, so each addition on the CPU is taken for one.


@pytest.fixture
def additions_are_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    read = real_spans._events

    def with_kernels(profile: torch.profiler.profile) -> list[dict]:
        events = read(profile)
        for number, event in enumerate([e for e in events if e["name"] == "aten::add"]):
            call = {**event, "cat": "cuda_runtime", "args": {"correlation": number}}
            where = {"device": number % 2, "correlation": number}
            events += [call, gpu("kernel", "add", event["ts"], event["dur"], **where)]
        return events

    monkeypatch.setattr(real_spans, "_events", with_kernels)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)


CUDA = [torch.device("cuda", 0), torch.device("cuda", 1)]


def test_regions_and_the_start_are_found_in_what_this_pytorch_writes(additions_are_kernels):
    one, spans = torch.ones(3), []
    with record_spans(spans, CUDA):
        one + one
        with course_lib.region("forward"):
            one + one
            with course_lib.region("inner"):
                one + one
    assert [span.region for span in spans] == ["", "forward", "inner"]
    assert 0 <= spans[0].start < spans[0].end < spans[1].start


@pytest.mark.parametrize("name", ["vorwärts → 50 %", 'a "quote"', "a\\b", "two\nlines", "x" * 300])
def test_a_region_can_have_any_name(additions_are_kernels, name: str):
    spans: list[Span] = []
    with record_spans(spans, CUDA), course_lib.region(name):
        torch.ones(3) + 1
    assert [span.region for span in spans] == [name]


def test_only_the_gpus_in_use_are_waited_for_and_recorded(additions_are_kernels, monkeypatch):
    one, spans, waited_for = torch.ones(3), [], []
    monkeypatch.setattr(torch.cuda, "synchronize", waited_for.append)
    with record_spans(spans, CUDA[1:]):
        for _ in range(4):
            one + one
    assert [span.device for span in spans] == [1, 1]
    assert waited_for == CUDA[1:]


def test_a_trace_that_an_error_ends_keeps_what_it_saw(additions_are_kernels):
    spans: list[Span] = []
    with pytest.raises(ZeroDivisionError), record_spans(spans, CUDA):
        torch.ones(3) + 1
        raise ZeroDivisionError
    assert [span.name for span in spans] == ["add"]


def test_a_trace_of_real_gpus_inside_another_is_refused(additions_are_kernels):
    with (
        record_spans([], CUDA),
        pytest.raises(RuntimeError, match="cannot start inside another trace"),
        record_spans([], CUDA),
    ):
        pass


def test_trace_on_real_gpus_is_measured_from_its_start(additions_are_kernels, monkeypatch):
    monkeypatch.setattr(machine, "device_count", 0)
    monkeypatch.setattr(hardware, "real_devices", CUDA, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(CUDA))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 100 + device.index)
    with course_lib.trace() as recording:
        before = time.perf_counter()
        torch.randn(300, 300) @ torch.randn(300, 300)  # takes time, and is no kernel here
        host_seconds = time.perf_counter() - before
        torch.ones(3) + 1
    (span,) = recording.spans
    assert span.start > host_seconds
    assert recording.seconds == span.end
    assert (recording.device_type, recording.device_count) == ("cuda", 2)
    assert recording.peak_memory == [100, 101]
    assert "measured" in repr(recording)
