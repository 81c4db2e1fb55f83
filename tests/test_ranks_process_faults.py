"""Faults of ranks in processes: each is named, and leaves no process and no file behind."""

from __future__ import annotations

import gc
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from multiprocessing.util import get_temp_dir
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from course_lib import ranks
from course_lib.ranks.processes import calling
from course_lib.ranks.processes.impatience import interrupts_come_later
from process_leftovers import assert_usable, nothing_left

needs_signals = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with nothing_left(tmp_path, monkeypatch):
        yield


class Pipe:
    """A named pipe: ranks say in it that they are there; when all have ended it ends.

    It waits for two minutes at most, which a test that passes never does.
    """

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def read(self) -> bytes:
        """What has been said since, at least something; nothing if all have ended."""
        ready, _, _ = select.select([self._descriptor], [], [], 120)
        assert ready, "no rank said anything"
        return os.read(self._descriptor, 1000)

    def wait_for(self, count: int) -> None:
        """Wait until so many have said that they are there."""
        said = b""
        while said.count(b"here") < count:
            said += self.read()

    def wait_for_the_end(self) -> None:
        """Wait until no process has the pipe open."""
        while self.read():
            pass

    def close(self) -> None:
        os.close(self._descriptor)
        self.path.unlink()


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Pipe]:
    made = Pipe(tmp_path / "pipe")
    yield made
    made.close()


def test_the_error_of_the_rank_that_failed_first_ends_in_its_own_line(capsys):
    def fail() -> None:
        dist.init_process_group()
        print("so far")
        x = torch.ones(2)
        if dist.get_rank() == 1:
            x.view(5)  # the line
        dist.all_reduce(x)

    with pytest.raises(RuntimeError, match=r"shape '\[5\]' is invalid") as caught:
        ranks.run(fail, processes=2)
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert (last.name, last.line) == ("fail", "x.view(5)  # the line")
    assert caught.value.__notes__ == ["(rank 1 of 2 failed first)"]
    assert capsys.readouterr().out == "[rank 0] so far\n[rank 1] so far\n"
    assert_usable()


def test_an_error_brings_its_cause_along():
    class CannotBeMadeAnew(Exception):
        def __init__(self, one: int, other: int) -> None:
            super().__init__("of its own kind")

    def fail() -> None:
        try:
            raise CannotBeMadeAnew(1, 2)
        except CannotBeMadeAnew as error:
            raise KeyError("gone") from error

    with pytest.raises(KeyError, match="gone") as caught:
        ranks.run(fail, processes=1)
    cause = caught.value.__cause__
    assert isinstance(cause, RuntimeError)
    assert str(cause).endswith("CannotBeMadeAnew: of its own kind")
    assert traceback.extract_tb(cause.__traceback__)[-1].line == "raise CannotBeMadeAnew(1, 2)"


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (lambda x: dist.broadcast(x, 0), "ALLREDUCE.*BROADCAST"),
        (lambda x: dist.all_reduce(x[:2]), r"TensorShape=\[4\].*TensorShape=\[2\]"),
        (lambda x: dist.all_reduce(x.int()), "TensorDtypes=Float.*TensorDtypes=Int"),
    ],
)
def test_collectives_that_differ_name_both_sides(one, words):
    def differ() -> None:
        dist.init_process_group()
        x = torch.ones(4)
        one(x) if dist.get_rank() == 1 else dist.all_reduce(x)

    with pytest.raises(ranks.MismatchError, match=f"Rank 0 .*{words}") as caught:
        ranks.run(differ, processes=3)
    assert caught.value.__notes__ == ["(rank 0 of 3 failed first)"]  # all three did
    assert_usable()


def test_a_rank_that_ends_early_is_named():
    def leave() -> None:
        dist.init_process_group()
        if dist.get_rank() == 0:
            dist.barrier()

    with pytest.raises(RuntimeError) as caught:
        ranks.run(leave, processes=2)
    assert "(rank 1 had ended)" in caught.value.__notes__
    assert_usable()


@needs_signals
def test_a_rank_that_is_killed_in_a_collective_is_named():
    def die() -> None:
        dist.init_process_group()
        x = torch.ones(4)
        if dist.get_rank() == 1:
            dist.all_reduce(x, async_op=True)
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(x)

    with pytest.raises(RuntimeError, match="rank 1 was killed by SIGKILL\n  rank 0 "):
        ranks.run(die, processes=3)
    assert_usable()


@needs_signals
def test_a_rank_that_someone_else_ends_is_named():
    def die() -> None:
        dist.init_process_group()
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)  # the signal by which ranks are stopped, too
        dist.barrier()

    with pytest.raises(RuntimeError, match="rank 1 was killed by SIGTERM\n  rank 0 "):
        ranks.run(die, processes=2)
    assert_usable()


@needs_pipes
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs groups of processes")
def test_what_a_rank_has_started_ends_with_it(pipe):
    """As a ``DataLoader`` starts workers."""
    path = str(pipe.path)

    def leave_a_child() -> None:
        with open(path, "w"):
            if os.fork() == 0:
                while True:
                    signal.pause()
            raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        ranks.run(leave_a_child, processes=2)
    pipe.wait_for_the_end()


def test_last_words_in_cpp_are_shown():
    def die() -> None:
        os.write(2, b"terminate called")
        os._exit(3)

    words = "rank 0 exited with 3, and its last words were: terminate called"
    with pytest.raises(RuntimeError, match=words):
        ranks.run(die, processes=1)


def test_sys_exit_with_a_code_is_a_failure():
    with pytest.raises(RuntimeError, match=r"rank 0 ended with sys.exit\(3\)"):
        ranks.run(lambda: sys.exit(3), processes=2)
    assert ranks.run(lambda: sys.exit(), processes=2) == [None, None]


class Clock:
    """A clock that is far ahead as soon as an event is set."""

    def __init__(self, is_late: threading.Event) -> None:
        self._is_late = is_late

    def monotonic(self) -> float:
        return time.monotonic() + (10_000 if self._is_late.is_set() else 0)


@needs_pipes
def test_ranks_that_hang_are_stopped_after_the_timeout_and_say_where(pipe, monkeypatch):
    path = str(pipe.path)

    def receives_in_vain() -> None:
        dist.recv(torch.ones(1), src=1)

    def hang() -> None:
        dist.init_process_group()
        with open(path, "w") as file:
            file.write("here")
            file.flush()
            if dist.get_rank() == 0:
                receives_in_vain()
            while True:
                pass

    is_late = threading.Event()
    monkeypatch.setattr(calling, "time", Clock(is_late))

    def wait_for_both() -> None:
        pipe.wait_for(2)
        is_late.set()

    helper = threading.Thread(target=wait_for_both)
    helper.start()
    with pytest.raises(TimeoutError, match="not all ranks have ended after 5000 seconds") as caught:
        ranks.run(hang, processes=2, timeout=5000)
    helper.join()
    zero, one = str(caught.value).splitlines()[1:]
    assert zero.startswith("  rank 0 was at test_ranks_process_faults.py:")
    assert one.startswith("  rank 1 was at test_ranks_process_faults.py:") and "in hang" in one
    pipe.wait_for_the_end()
    monkeypatch.undo()
    assert_usable()


@needs_pipes
def test_an_interrupt_ends_all_ranks_and_says_where_they_were(pipe):
    path = str(pipe.path)

    def loop() -> None:
        with open(path, "w") as file:
            file.write("here")
            file.flush()
            while True:
                pass

    def interrupt() -> None:
        pipe.wait_for(2)
        signal.raise_signal(signal.SIGINT)

    helper = threading.Thread(target=interrupt)
    helper.start()
    with pytest.raises(KeyboardInterrupt) as caught:
        ranks.run(loop, processes=2)
    helper.join()
    pipe.wait_for_the_end()
    assert "rank 1 was at test_ranks_process_faults.py:" in caught.value.__notes__[0]
    assert_usable()


def test_an_interrupt_at_the_wrong_moment_comes_later():
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_come_later():
        signal.raise_signal(signal.SIGINT)
        done.append("cleared up")
    assert done == ["cleared up"]


def test_an_interrupt_that_is_ignored_stays_ignored():
    """As of a script in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts_come_later():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_at_the_wrong_moment_goes_to_its_handler():
    came = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append("handled"))
    try:
        with interrupts_come_later():
            signal.raise_signal(signal.SIGINT)
            came.append("cleared up")
    finally:
        signal.signal(signal.SIGINT, before)
    assert came == ["cleared up", "handled"]


@needs_signals
def test_a_rank_that_will_not_end_is_killed(monkeypatch):
    monkeypatch.setattr(calling, "_TO_END", 0.0)

    def refuse() -> None:
        dist.init_process_group()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        dist.barrier()
        if dist.get_rank() == 0:
            raise KeyError("gone")
        while True:
            pass

    with pytest.raises(KeyError, match="gone"):
        ranks.run(refuse, processes=2)
    assert_usable()


CALLER = """
import sys
from course_lib import ranks

def hang():
    with open(sys.argv[1], "w") as file:
        file.write("here")
        file.flush()
        while True:
            pass

ranks.run(hang, processes=2)
"""


@needs_pipes
def test_a_caller_that_is_killed_leaves_no_rank_and_no_file(tmp_path, pipe):
    """Another one goes on beside it. A script needs no ``if __name__ == "__main__"``."""
    script = tmp_path / "caller.py"
    script.write_text(CALLER)
    # Not in tmp_path: the path to a socket has 107 characters at most.
    with tempfile.TemporaryDirectory(dir=Path(get_temp_dir()).parent) as folder:
        caller = subprocess.Popen(
            [sys.executable, str(script), str(pipe.path)],
            env={**os.environ, "TMPDIR": folder},
            stdout=subprocess.PIPE,
        )
        try:
            pipe.wait_for(2)
            assert_usable()
        finally:
            caller.kill()
        pipe.wait_for_the_end()
        caller.communicate()  # until its fork server has ended too
        # torch._dynamo makes a folder for what it compiles, wherever it is imported.
        assert [path.name for path in Path(folder).glob("[!t]*")] == []


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_an_error_that_is_kept_keeps_no_pipe():
    def fail() -> None:
        raise KeyError("gone")

    def descriptors() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    assert_usable()
    before = descriptors()
    kept = []
    for _ in range(3):
        with pytest.raises(KeyError) as caught:
            ranks.run(fail, processes=2)
        kept.append(caught)
    assert descriptors() == before
