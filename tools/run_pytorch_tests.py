"""PyTorch's own device-generic tests on virtual GPUs, compared with the CPU.

    python tools/run_pytorch_tests.py FOLDER             # the files below, found in FOLDER
    python tools/run_pytorch_tests.py FOLDER test_nn.py  # one of them

FOLDER is the folder ``test`` of PyTorch's source, of a version near the one that is installed. Its
tests are instantiated for the CPU and for ``vgpu`` as for any device type of an out-of-tree backend
(``torch.testing._internal.common_device_type.instantiate_device_type_tests``). Compared are those
that pass on the CPU and are not skipped on ``vgpu``; what fails is grouped by its last words.
``pytorch_test_exceptions.py`` says what is not expected to pass, and why.

Each run of a file is a process: a test that ends it is counted, and the next process goes on after
it. The CPU's results are kept in ``build/pytorch_tests``, and what did not pass there is not run on
``vgpu``.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import json
import os
import re
import resource
import signal
import subprocess
import sys
import unittest
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

from pytorch_test_exceptions import reason_for

FILES = [
    *("test_torch.py", "test_nn.py", "test_reductions.py", "test_autograd.py", "test_view_ops.py"),
    *("test_tensor_creation_ops.py", "test_type_promotion.py", "test_sort_and_select.py"),
    *("test_shape_ops.py", "nn/test_convolution.py", "nn/test_embedding.py"),
]
SECONDS_A_TEST = 60
ADDRESSES = 8_000_000_000  # bytes; some tests would take all that a computer has
ENDED_THE_PROCESS = "ended the process"
KEPT = Path(__file__).resolve().parent.parent / "build" / "pytorch_tests"

Results = dict[str, tuple[str, str]]  # for each test "passed", "skipped" or "failed", and why


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("files", nargs="*", default=FILES)
    parser.add_argument("--child", choices=["cpu", "vgpu"], help=argparse.SUPPRESS)
    parser.add_argument("-k", default="", metavar="TEXT", help="only tests with TEXT in their name")
    arguments = parser.parse_args()
    if arguments.child:
        run_here(arguments.folder, arguments.files[0], arguments.child, arguments.k)
        return 0
    missing = [name for name in arguments.files if not (arguments.folder / name).exists()]
    if missing:
        parser.error(f"{arguments.folder} has no {missing[0]}: give the folder test of PyTorch")
    unexpected = 0
    for name in arguments.files:
        cpu = results(arguments.folder, name, "cpu", arguments.k)
        _log(name, "vgpu", arguments.k).unlink(missing_ok=True)
        virtual = results(arguments.folder, name, "vgpu", arguments.k)
        unexpected += report(name, cpu, virtual)
    return int(unexpected > 0)


def report(name: str, cpu: Results, virtual: Results) -> int:
    """Print the counts and what failed; returns how many failures are in no table."""
    compared = {
        test: virtual[test]
        for test, (outcome, _) in cpu.items()
        if outcome == "passed" and test in virtual and virtual[test][0] != "skipped"
    }
    failed = {test: why for test, (outcome, why) in compared.items() if outcome == "failed"}
    excused = {test: reason for test in failed if (reason := reason_for(name, test, failed[test]))}
    passed, counted = len(compared) - len(failed), len(compared) - len(excused)
    print(
        f"{name}: {passed} of {len(compared)} pass; without the {len(excused)} of the table "
        f"{passed} of {counted} ({100 * passed / max(counted, 1):.2f} %)"
    )
    for reason, count in Counter(excused.values()).most_common():
        print(f"  {count:4} excused: {reason}")
    groups = defaultdict(list)
    for test, why in failed.items():
        if test not in excused:
            groups[re.sub(r"\d+", "N", why)[:120]].append(test)
    for why, tests in sorted(groups.items(), key=lambda item: -len(item[1])):
        print(f"  {len(tests):4} {why}")
        print(*[f"         {test}" for test in tests[:3]], sep="\n")
    return len(failed) - len(excused)


def results(folder: Path, name: str, device: str, text: str) -> Results:
    """Run, in processes of their own, the tests of a file that the log does not have yet."""
    KEPT.mkdir(parents=True, exist_ok=True)
    log = _log(name, device, text)
    command = [sys.executable, __file__, str(folder), name, "--child", device, "-k", text]
    environment = {
        **os.environ,
        "COURSE_DEVICES": "virtual",
        "PYTORCH_TESTING_DEVICE_ONLY_FOR": "cpu" if device == "cpu" else "privateuse1",
    }
    while True:
        before = len(_read(log))
        with open(log.with_suffix(".txt"), "w") as output:
            done = subprocess.run(command, env=environment, stdout=output, stderr=output)
        if done.returncode == 0:
            return _read(log)
        if len(_read(log)) == before:
            raise SystemExit(f"{name} does not start: see {log.with_suffix('.txt')}")


def _log(name: str, device: str, text: str) -> Path:
    part = f".{re.sub(r'[^A-Za-z0-9_]', '', text)}" if text else ""
    return KEPT / f"{name.replace('/', '_')}.{device}{part}.jsonl"


def _read(log: Path) -> Results:
    """The last line about a test counts; one that began and did not end, ended the process."""
    lines = log.read_text().splitlines() if log.exists() else []
    return {test: (outcome, why) for test, outcome, why in map(json.loads, lines)}


def run_here(folder: Path, name: str, device: str, text: str) -> None:
    """Run what the log does not have yet of the file's device-generic tests, in this process."""
    file, log = folder.resolve() / name, _log(name, device, text)
    done = set(_read(log))
    if device == "vgpu":
        on_cpu = _read(_log(name, "cpu", text))
        done |= {test for test, (outcome, _) in on_cpu.items() if outcome != "passed"}
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    sys.path[:0] = [str(file.parent), str(file.parent.parent)]
    os.chdir(file.parent)
    if device == "vgpu":
        import course_lib

        course_lib.devices(2, course_lib.A100)  # before PyTorch's helpers ask what there is
    _prepare_expecttest()
    _stand_in_for_what_is_missing(file)
    module = _imported(file)
    endings = ("CPU",) if device == "cpu" else ("PRIVATEUSE1", "VGPU")
    with open(log, "a") as lines:

        def note(*line: str) -> None:
            lines.write(json.dumps(line) + "\n")
            lines.flush()

        for kind in vars(module).copy().values():
            if not (isinstance(kind, type) and kind.__name__.endswith(endings)):
                continue
            for method in unittest.defaultTestLoader.getTestCaseNames(kind):
                test = kind(method)
                neutral = _neutral(test, endings, device)
                if neutral in done or text not in neutral:
                    continue
                note(neutral, "failed", ENDED_THE_PROCESS)
                note(neutral, *_run(test))
    lines.close()
    os._exit(0)  # threads that a failed test left would keep the process


def _imported(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None  # a file that ends in .py has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def _neutral(test: unittest.TestCase, endings: tuple[str, ...], device: str) -> str:
    """The test's name without the device's."""
    owner = re.sub(f"({'|'.join(endings)})$", "", type(test).__name__)
    method = re.sub(rf"_({device}|privateuse1)(?=_|$)", "_DEVICE", test._testMethodName)
    return f"{owner}.{method}"


def _run(test: unittest.TestCase) -> tuple[str, str]:
    """Run one test with its class's setup; returns the outcome and its reason."""

    def give_up(*_: Any) -> None:
        raise TimeoutError(f"took longer than {SECONDS_A_TEST} s")

    signal.signal(signal.SIGPROF, give_up)  # seconds of this process, not of the wall's clock
    signal.setitimer(signal.ITIMER_PROF, SECONDS_A_TEST)
    result = unittest.TestResult()
    try:
        unittest.TestSuite([test]).run(result)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if result.skipped or result.expectedFailures:
        return "skipped", "".join(why for _, why in result.skipped)
    if result.failures or result.errors:
        return "failed", _last_words((result.failures + result.errors)[0][1])
    return "passed", ""


def _last_words(traceback: str) -> str:
    """The line of a traceback that names the error."""
    lines = [line for line in traceback.splitlines() if line and not line.startswith(" ")]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return (errors or lines or ["?"])[-1][:300]


def _stand_in_for_what_is_missing(file: Path) -> None:
    """Let the file's imports work, of packages and of helpers of another version of PyTorch."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            try:
                module = importlib.import_module(node.module)
            except ImportError:
                module = sys.modules[node.module] = ModuleType(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name) and alias.name != "*":
                    setattr(module, alias.name, _Nothing())


def _prepare_expecttest() -> None:
    if importlib.util.find_spec("expecttest") is None:
        # For tests that rewrite themselves; the device-generic ones do not.
        stand_in: Any = ModuleType("expecttest")
        sys.modules["expecttest"] = stand_in
        stand_in.TestCase = unittest.TestCase


class _Nothing(list):
    """In place of a helper that is gone: an empty list, a decorator that leaves the test as it
    is, or a question about hardware, whose answer is no."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and inspect.isfunction(args[0]) else self


if __name__ == "__main__":
    sys.exit(main())
