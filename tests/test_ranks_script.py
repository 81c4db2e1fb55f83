"""The launcher runs a script for ``torchrun`` once a rank, each with modules of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from course_lib.ranks.__main__ import main

HELPER = """
seen = []  # of one process
"""

SCRIPT = """
import argparse, os, sys
import torch
import torch.distributed as dist
import helper

class Point:
    pass

def train():
    options = argparse.ArgumentParser()
    options.add_argument("--size", type=int)
    size = options.parse_args().size
    acc = torch.accelerator.current_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    torch.accelerator.set_device_index(local_rank)
    device = torch.device(acc.type, local_rank)
    dist.init_process_group(backend=dist.get_default_backend_for_device(acc))
    helper.seen.append(dist.get_rank())
    x = torch.ones(size, device=device)
    dist.all_reduce(x)
    dist.barrier()
    print(helper.seen, x.tolist(), sys.modules["__main__"].Point is Point)
    dist.destroy_process_group()

if __name__ == "__main__":
    train()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text(HELPER)
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def test_a_script_for_torchrun_runs_unmodified(script, capsys):
    before = (list(sys.argv), list(sys.path), sys.modules["__main__"])
    trace = script.parent / "trace.json"
    main(["--divide", "1000", "--trace", str(trace), "2", str(script), "--size", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == [
        "[rank 0] [0] [2.0, 2.0, 2.0] True",
        "[rank 1] [1] [2.0, 2.0, 2.0] True",
    ]
    assert lines[3].endswith("ms simulated")
    assert lines[4].startswith("rank 0: sent 12 B, held 20 B at most")
    assert json.loads(trace.read_text())["traceEvents"]
    assert (list(sys.argv), list(sys.path), sys.modules["__main__"]) == before
    assert "helper" not in sys.modules
    assert not torch.distributed.is_initialized()


def test_a_script_that_is_not_there_is_said(tmp_path):
    with pytest.raises(SystemExit, match="there is no script"):
        main(["2", str(tmp_path / "none.py")])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["0"], "takes a whole number from 1 to 128: 0"),
        (["500"], "takes a whole number from 1 to 128: 500"),
        (["--backing", "gpu", "2"], "backing='gpu' is not on this machine"),
        (["--divide", "0", "2"], "divided by a positive number"),
    ],
)
def test_gpus_that_cannot_be_are_said_in_one_line(tmp_path, options, words):
    script = tmp_path / "script.py"
    script.touch()
    with pytest.raises(SystemExit, match=words) as caught:
        main([*options, str(script)])
    assert "\n" not in str(caught.value.code)
