"""``examples/train_gpt.py``: killed at any moment, it goes on to the same parameters."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from course_lib import ranks
from course_lib.ranks.__main__ import main as launch
from notebook_tools import PATIENCE
from process_leftovers import nothing_left
from training_runs import EXAMPLES, SCRIPT, SMALL, trained

needs_signals = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with nothing_left(tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "path", [*sys.path, str(EXAMPLES)])  # of the ranks too
        yield


@needs_signals
@pytest.mark.parametrize(
    ("engine", "moments", "last"),
    [("ddp", [1, 2, 3, 4, 5, 6, 7, 8, 8], 2), ("fsdp", [3, 8], 1)],
)
def test_killed_at_any_moment_of_saving_it_ends_with_the_same_parameters(
    tmp_path, capsys, engine, moments, last
):
    """The first of two checkpoints is six or seven changes to the disk, the second one two more."""
    undisturbed = ranks.run(trained, None, engine, tmp_path / "undisturbed", processes=2)
    folder = tmp_path / "disturbed"
    for moment in moments:
        with pytest.raises(RuntimeError, match="rank 0 was killed by SIGKILL"):
            ranks.run(trained, None, engine, folder, moment, processes=2)
    capsys.readouterr()
    found = ranks.run(trained, None, engine, folder, processes=2)
    assert f"from the checkpoint of step {last}" in capsys.readouterr().out
    for first, *others in zip(*undisturbed, *found, strict=True):
        assert all(torch.equal(first, other) for other in others)
    assert max(path.name for path in folder.iterdir()) == "step_00000002"


def saved(folder: Path) -> dict[str, Tensor]:
    """The parameters in the checkpoint."""
    dcp_to_torch_save(folder / "step_00000002", folder / "in_one_file")
    return torch.load(folder / "in_one_file", weights_only=False)["model"]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_it_runs_under_the_launcher_on_virtual_gpus(vgpus, tmp_path, engine):
    virtual, real = tmp_path / "virtual", tmp_path / "real"
    options = [*SMALL, "--engine", engine, "--checkpoints", str(virtual)]
    launch(["--divide", "1000", "2", str(SCRIPT), *options])
    ranks.run(trained, None, engine, real, processes=2)
    ours, theirs = saved(virtual), saved(real)
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert torch.allclose(ours[name].cpu(), parameter, rtol=0, atol=1e-6)


DISTURBED = """
import os, signal, sys
import train_gpt

if (os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]) == ("0", "1"):
    train_step = train_gpt.train_step

    def once_only(*args):
        train_gpt.train_step = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        return train_step(*args)

    train_gpt.train_step = once_only
train_gpt.main()
"""


def launched(script: Path, folder: Path, *options: str, count: int = 1) -> str:
    """What is printed by so many launchers of ``torchrun`` that run ``script`` together."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # see the script
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES), *filter(None, sys.path)]),
    }
    program = [str(script), *SMALL, "--checkpoints", str(folder)]
    launchers = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *options, *program],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(count)
    ]
    try:
        said = [launcher.communicate(timeout=PATIENCE)[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.terminate()  # it stops its workers, if it has not ended
    assert [launcher.returncode for launcher in launchers] == [0] * count, said
    return "".join(said)


def assert_undisturbed(folder: Path, tmp_path: Path) -> None:
    """What was trained is what ranks train that nobody disturbs."""
    ranks.run(trained, None, "ddp", tmp_path / "undisturbed", processes=2)
    ours, theirs = saved(folder), saved(tmp_path / "undisturbed")
    assert all(torch.equal(ours[name], parameter) for name, parameter in theirs.items())


@needs_signals
def test_torchrun_starts_again_after_a_worker_was_killed(tmp_path):
    """Rank 1 is killed in its second step, and all go on from the checkpoint of the first."""
    script = tmp_path / "disturbed.py"
    script.write_text(DISTURBED)
    folder = tmp_path / "checkpoints"
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.1"]
    said = launched(script, folder, *options)
    assert "ddp, 2 ranks on cpu, from the checkpoint of step 1" in said
    assert_undisturbed(folder, tmp_path)


def test_it_runs_on_two_nodes(tmp_path):
    """Two launchers on this machine, who meet in a file, so that no port need be free."""
    folder, meeting = tmp_path / "checkpoints", tmp_path / "meeting"
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint={meeting}", "--rdzv-id=test"]
    conf = ["--rdzv-conf=store_type=file", "--local-addr=localhost"]
    options = ["--nnodes=2", "--nproc-per-node=1", "--monitor-interval=0.1", *rendezvous, *conf]
    said = launched(SCRIPT, folder, *options, count=2)
    assert "ddp, 2 ranks on cpu, from the beginning" in said
    assert_undisturbed(folder, tmp_path)
