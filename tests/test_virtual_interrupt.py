"""Ctrl-C may come at any moment of work on virtual GPUs: it stops the work, and nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.usefixtures("vgpus"),
    pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends a program there"),
]

# A thread interrupts the program at random moments of its work.
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
ROUNDS = int(sys.argv[1])
HANDLER = sys.argv[2]

def stop(signum, frame):
    raise KeyboardInterrupt

if HANDLER == "set before":
    signal.signal(signal.SIGINT, stop)
device = course_lib.devices(1)[0]
if HANDLER == "set after":
    signal.signal(signal.SIGINT, stop)
assert signal.getsignal(signal.SIGINT) is (
    signal.default_int_handler if HANDLER == "Python's" else stop
)
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

train()  # AdamW keeps a half-made state for ever if it is interrupted in its first step
lost = []
sys.unraisablehook = lambda info: lost.append((info.exc_value, info.object))
counted = 0
for work in [train, forward, backward, recompute] * ROUNDS:
    thread = threading.Thread(target=interrupt)
    try:
        thread.start()
        while not lost:
            work()
    except KeyboardInterrupt:
        counted += 1
    thread.join()
assert not lost, lost
assert counted == 4 * ROUNDS, counted

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


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=100
    )


@pytest.mark.parametrize(
    ("handler", "rounds"), [("Python's", 50), ("set before", 10), ("set after", 10)]
)
def test_every_interrupt_ends_the_work_once_and_leaves_numbers_and_memory_right(
    handler: str, rounds: int
):
    result = run(PROGRAM, str(rounds), handler)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("fine\n")


def test_a_handler_that_the_program_chose_stays():
    result = run(
        "import signal, course_lib\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "course_lib.devices(1)\n"
        "assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN\n"
    )
    assert result.returncode == 0, result.stderr


def test_an_interrupt_ends_a_sleep():
    result = run(
        "import os, signal, threading, time, course_lib\n"
        "course_lib.devices(1)\n"
        "threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "time.sleep(3600)\n"
    )
    assert result.stderr.endswith("KeyboardInterrupt\n")
