"""``--cuda``: scripts that say "cuda" run on virtual GPUs; what was read differently is said."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch

from course_lib.ranks.__main__ import main
from course_lib.ranks.cuda_scripts import Reading, read_differently

MODEL = """
import torch
class Net(torch.nn.Linear):
    def forward(self, x):
        assert x.is_cuda
        return super().forward(x)
"""

SCRIPT = """
import argparse, os
import torch
import torch.distributed as dist
from torch.cuda.amp import GradScaler, autocast
from torch.nn.parallel import DistributedDataParallel as DDP
from model import Net

options = argparse.ArgumentParser()
options.add_argument("--device", default="cpu")
assert options.parse_args().device == "cuda"
assert torch.cuda.is_available() and dist.is_nccl_available()
rank = int(os.environ["LOCAL_RANK"])
torch.cuda.set_device(rank)
dist.init_process_group(backend="nccl")
torch.cuda.manual_seed(0)
model = DDP(Net(3, 2).cuda(), device_ids=[rank])
scaler = GradScaler(enabled=False)
x = torch.ones(2, 3).to(f"cuda:{rank}", non_blocking=True)
with autocast(dtype=torch.bfloat16), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
    loss = model(x).float().sum()
scaler.scale(loss).backward()
torch.cuda.synchronize()
saved = torch.load(PATH, map_location={"cuda:%d" % 0: "cuda:%d" % rank}) if False else None
print(loss.device, x.cuda(rank).device, torch.device("cuda:{}".format(rank)), "on cuda")
dist.destroy_process_group()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text(MODEL)
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def run(script: Path, *arguments: str) -> None:
    main(["--divide", "1000", "--cuda", "2", str(script), *arguments])


def test_a_script_that_says_cuda_runs_and_is_said_to_be_read_differently(script, capsys, recwarn):
    run(script, "--device=cuda")
    assert not [warning for warning in recwarn if "nccl" in str(warning.message)]
    out = capsys.readouterr().out
    assert "[rank 0] vgpu:0 vgpu:0 vgpu:0 on cuda\n[rank 1] vgpu:1 vgpu:1 vgpu:1 on cuda" in out
    assert (
        'read differently, "vgpu" for "cuda": its arguments (1 place), model.py (1 place), '
        "train.py (14 places)\n" in out
    )
    assert script.read_text() == SCRIPT
    assert sorted(each.name for each in script.parent.iterdir()) == ["model.py", "train.py"]
    assert "model" not in sys.modules


def read(text: str, tmp_path: Path) -> str:
    path = tmp_path / "some.py"
    path.write_text(text)
    seen = {}
    with read_differently(tmp_path) as reading:
        exec(reading.code(path), {"seen": seen, "record": lambda **what: seen.update(what)})
    return str(seen)


@pytest.mark.parametrize(
    ("written", "means"),
    [
        ("'cuda'", "vgpu"),
        ("'cuda:1'", "vgpu:1"),
        ("'cuda:' + str(2)", "vgpu:2"),
        ("'cuda:%d' % 3", "vgpu:3"),
        ("'cuda:{}'.format(2)", "vgpu:2"),
        ("f'cuda:{1 + 1}'", "vgpu:2"),
        ("f'{1} cuda: {2}'", "1 cuda: 2"),
        ("'say cuda'", "say cuda"),
        ("'cudagraphs'", "cudagraphs"),
        ("'nccl'", "nccl"),
        ("str('cuda' in 'cuda:1')", "True"),
    ],
)
def test_what_strings_mean(tmp_path, written, means):
    assert read(f"record(value={written})", tmp_path) == str({"value": means})


@pytest.mark.parametrize(
    "text",
    [
        "import torch as th\nrecord(value=th.cuda)",
        "from torch import cuda\nrecord(value=cuda)",
        "from torch import cuda as gpu\nrecord(value=gpu)",
        "import torch.cuda as gpu\nrecord(value=gpu)",
        "import torch.cuda\nrecord(value=torch.cuda)",
    ],
)
def test_torch_cuda_by_any_name(vgpus, tmp_path, text):
    assert read(text, tmp_path) == str({"value": torch.vgpu})


@pytest.mark.parametrize("text", ["record(value=args.cuda)", "record(value=not args.cuda)"])
def test_an_option_called_cuda_is_none_of_a_device(tmp_path, text):
    read(f"class args:\n    cuda = True\n{text}", tmp_path)  # and raises no AttributeError


def test_a_fault_is_at_the_script_s_own_line(tmp_path, capsys):
    path = tmp_path / "train.py"
    path.write_text("import torch\nx = torch.ones(2, device='cuda')\nx @ torch.ones(3).cuda()\n")
    with pytest.raises(RuntimeError) as caught:
        run(path)
    last = caught.traceback[-1]
    assert (Path(last.path), last.lineno) == (path, 2)  # from zero
    assert str(last.statement) == "x @ torch.ones(3).cuda()"
    assert "train.py (2 places)" in capsys.readouterr().out  # said all the same


def test_a_device_that_was_named_elsewhere_is_explained(tmp_path):
    (tmp_path / "settings.json").write_text('["cuda:0"]')
    path = tmp_path / "train.py"
    path.write_text(
        "import json, torch\n"
        f"torch.ones(1, device=json.load(open({str(tmp_path / 'settings.json')!r}))[0])"
    )
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        run(path)
    assert any("this device was named elsewhere" in note for note in caught.value.__notes__)


def test_without_the_option_it_is_named(tmp_path):
    path = tmp_path / "train.py"
    path.write_text("import torch\ntorch.ones(1, device='cuda')")
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        main(["1", str(path)])
    assert 'a script that says "cuda" runs with --cuda' in caught.value.__notes__


def test_what_virtual_gpus_do_not_have_is_named(tmp_path):
    path = tmp_path / "train.py"
    path.write_text("import torch\ntorch.cuda.CUDAGraph()")
    with pytest.raises(AttributeError, match=r"no torch.vgpu.CUDAGraph for virtual GPUs, as torch"):
        run(path)


def test_installed_packages_are_left_as_they_are(tmp_path):
    reading = Reading(tmp_path)
    assert reading.owns(tmp_path / "package" / "module.py")
    assert not reading.owns(tmp_path / "venv" / "site-packages" / "module.py")
    assert not reading.owns(tmp_path.parent / "module.py")
    assert not reading.owns(tmp_path / "module.so")


def test_a_script_that_says_nothing_of_cuda_is_said_to_be_as_it_is(tmp_path, capsys):
    path = tmp_path / "train.py"
    path.write_text("print(1)")
    run(path)
    assert 'nothing was read differently: "cuda" stands nowhere' in capsys.readouterr().out


def test_a_module_of_the_script_is_read_once_for_all_ranks(script, monkeypatch):
    seen = []
    parse = ast.parse
    monkeypatch.setattr(ast, "parse", lambda text, name: seen.append(name) or parse(text, name))
    run(script, "--device=cuda")
    assert sorted(Path(each).name for each in seen) == ["model.py", "train.py"]
