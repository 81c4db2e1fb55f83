"""Which of PyTorch's device-generic tests are not expected to pass on virtual GPUs, and why."""

from __future__ import annotations

import re
from typing import NamedTuple


class Excused(NamedTuple):
    file: str  # a part of the file's name
    test: str  # a pattern in the test's name
    words: str  # a pattern in the words it fails with
    reason: str


EXCEPTIONS = [
    Excused("", "", "dense tensors only, not torch.sparse", "sparse tensors are refused"),
    Excused("", "", "dense tensors only, not nested ones", "nested tensors are refused"),
    Excused("", "", "dense tensors only, not quantized ones", "quantized tensors are refused"),
    Excused("", "dlpack", "exported through DLPack", "DLPack is refused"),
    Excused("test_torch", "_map2?_", "map2?_ is not supported", "map_ is for the CPU alone"),
    Excused(
        "test_torch",
        "test_grad_scaling_state_dict",
        "False is not true",
        "takes any device that is not CUDA for the CPU",
    ),
    Excused(
        "test_torch",
        "test_lazy_clone_(DEVICE|view_|binary_op_no_materialize)",
        "^AssertionError: False is not true$",
        "asks for copies that are put off until somebody writes, which are made in C++",
    ),
    Excused(
        "test_torch",
        "test_tensor_storage_type",
        r"None is not <class 'torch\.\w+Storage'>",
        "an old class of storage for each dtype, which no device type of one's own has",
    ),
    Excused("test_torch", "deprecated_warning", "amp.GradScaler", "a deprecated name of torch.cpu"),
    Excused(
        "test_nn",
        "test_module_to_empty",
        r"found at least two devices, vgpu:\d and meta!$",
        "multiplies by a tensor on meta, and gets numbers that nobody computed: refused",
    ),
    Excused(
        "test_nn",
        "test_upsamplingBiMode2d_nonsupported_dtypes_.*_uint8$",
        "^AssertionError: RuntimeError not raised$",
        "expects that all but the CPU lack a kernel for images of bytes; here there is the CPU's",
    ),
    Excused(
        "test_nn",
        "test_transformerencoderlayer_DEVICE",
        "^AssertionError: False is not true$",
        "expects no NaN where neither a CPU nor CUDA takes the fast path; here the CPU's is taken",
    ),
    Excused(
        "test_convolution",
        "test_conv_backend",
        "_ConvBackend",
        "asks for the CPU's convolution backend by its name",
    ),
    Excused(
        "test_sort_and_select",
        "test_stable_sort_against_numpy",
        "at least two devices",
        "fills at indices of the host, which CUDA refuses too: it is spared that part by name",
    ),
]


def reason_for(file: str, test: str, failure: str) -> str | None:
    """Why ``test`` of ``file`` is excused from passing; ``None`` if it is not."""
    for row in EXCEPTIONS:
        is_meant = row.file in file and re.search(row.test, test)
        if is_meant and re.search(row.words, failure):
            return row.reason
    return None
