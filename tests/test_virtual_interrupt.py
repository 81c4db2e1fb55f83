"""Ctrl-C may come at any moment of work on virtual GPUs: it stops the work, and nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest

from notebook_tools import PATIENCE

pytestmark = [
    pytest.mark.usefixtures("vgpus"),
    pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends a program there"),
]

# A thread interrupts the program at a random moment of its work, two hundred times; in the last
# fifty by a handler of its own.
PROGRAM = """
import gc
import os
import random
import signal
import sys
import threading
import time

import torch
from torch.utils.checkpoint import checkpoint

import course_lib
from course_lib.models import MLP

torch.set_num_threads(1)
random.seed(0)
torch.manual_seed(0)
device = course_lib.devices(1)[0]
model = MLP(8, 8, 8, 1).to(device)
optimizer = torch.optim.AdamW(model.parameters())
x = torch.randn(16, 8).to(device)

def loss():
    return model(x).square().mean()

def train():
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()

def forward():
    loss()

def backward():
    y = torch.ones(2, device=device, requires_grad=True)
    for _ in range(50):
        y = y.sin() + y * 0.5
        y.register_hook(lambda grad: grad * 1.0)
    y.sum().backward()

def recompute():
    optimizer.zero_grad()
    checkpoint(loss, use_reentrant=False).backward()

def interrupt():
    time.sleep(random.uniform(0.001, 0.02))
    os.kill(os.getpid(), signal.SIGINT)

def repeat(work):
    while not lost:  # not in the block of try itself: Python 3.13 can miss an interrupt there
        work()

train()  # AdamW keeps a half-made state for ever if it is interrupted in its first step
lost = []
sys.unraisablehook = lambda info: lost.append((info.exc_value, info.object))
counted = 0

def stop(signum, frame):
    raise KeyboardInterrupt

for work in [train, forward, backward, recompute] * 50:
    if counted == 150:
        assert signal.signal(signal.SIGINT, stop) is signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is stop
    thread = threading.Thread(target=interrupt)
    try:
        thread.start()
        repeat(work)
    except KeyboardInterrupt:
        counted += 1
    assert not lost, (counted, work, lost)
    thread.join()
assert counted == 200, counted

before = loss().item()
for _ in range(20):
    train()
on_cpu = MLP(8, 8, 8, 1)
on_cpu.load_state_dict({name: value.cpu() for name, value in model.state_dict().items()})
assert torch.equal(on_cpu(x.cpu()), model(x).cpu())
assert loss().item() < before
optimizer.zero_grad()
del model, optimizer, x
gc.collect()
assert course_lib.memory_in_use(device) == 0
print("fine")
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE
    )


def test_every_interrupt_ends_the_work_once_and_leaves_numbers_and_memory_right():
    result = run(PROGRAM)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("fine\n")


def test_handlers_that_the_program_chose_stay_and_end_the_work_but_not_the_process():
    result = run(
        "import signal, sys\n"
        "def give_up(*_):\n"
        "    raise TimeoutError\n"
        "signal.signal(signal.SIGALRM, give_up)\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "import course_lib, torch\n"
        "course_lib.devices(1)\n"
        "assert signal.getsignal(signal.SIGALRM) is give_up\n"
        "assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN\n"
        "x = torch.ones(2, device='vgpu:0', requires_grad=True)\n"
        "(x * 2).sum().backward()\n"
        "lost = []\n"
        "sys.unraisablehook = lost.append\n"
        "def repeat():\n"
        "    while not lost:\n"  # in no block of try, as above
        "        (x * 2).sum().backward()\n"
        "for number in range(200):\n"
        "    try:\n"
        "        signal.setitimer(signal.ITIMER_REAL, 0.0005 + number % 17 * 1e-4)\n"
        "        repeat()\n"
        "    except TimeoutError:\n"
        "        pass\n"
        "assert not lost, lost\n"
        "print('fine')\n"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("fine\n")


def test_an_interrupt_ends_a_sleep():
    result = run(
        "import os, signal, threading, time, course_lib\n"
        "course_lib.devices(1)\n"
        "threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "time.sleep(3600)\n"
    )
    assert result.stderr.endswith("KeyboardInterrupt\n")


def test_an_interrupt_that_comes_while_a_weak_dictionary_forgets_is_not_lost():
    # The profiler is called at the beginning of every function: of the one that forgets, too.
    result = run(
        "import signal, sys, weakref, course_lib\n"
        "course_lib.devices(1)\n"
        "class Thing:\n"
        "    pass\n"
        "lost = []\n"
        "sys.unraisablehook = lambda info: lost.append((info.exc_value, info.object))\n"
        "def interrupt_when_it_forgets(frame, event, argument):\n"
        "    if event == 'call' and frame.f_code.co_name in ('remove', '_remove'):\n"
        "        sys.setprofile(None)\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "def forget(kind):\n"
        "    thing, weak = Thing(), kind()\n"
        "    weak.add(thing) if kind is weakref.WeakSet else weak.__setitem__(\n"
        "        *(('name', thing) if kind is weakref.WeakValueDictionary else (thing, 'name')))\n"
        "    sys.setprofile(interrupt_when_it_forgets)\n"
        "    del thing\n"
        "    for _ in range(100):\n"
        "        pass\n"
        "    return 'no interrupt'\n"
        "for kind in (weakref.WeakKeyDictionary, weakref.WeakSet, weakref.WeakValueDictionary):\n"
        "    try:\n"
        "        print(kind.__name__, forget(kind), lost)\n"
        "    except KeyboardInterrupt:\n"
        "        assert not lost, lost\n"
        "        print('interrupted')\n"
    )
    assert result.stdout.endswith(3 * "interrupted\n"), result.stdout + result.stderr
