"""Train the course's GPT on one GPU or many, on one machine or several, and go on after a crash.

    torchrun --nproc-per-node 4 examples/train_gpt.py      # on GPUs, or else on the CPU
    python -m course_lib.ranks 4 examples/train_gpt.py     # on virtual GPUs
    torchrun --nproc-per-node 4 examples/train_gpt.py --engine fsdp

Two machines, which must share the folder of the checkpoints (or two launchers on one machine):

    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        --max-restarts 3 examples/train_gpt.py

``train_gpt.slurm`` beside this file is the same as a job of Slurm. Restarts on the CPU need
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment: without it, gloo finds the addresses of the
processes before (PyTorch 2.13).

Killed at any moment, it loses the steps since its last checkpoint and nothing else. Started again,
with as many processes as before, it ends with the same parameters to the bit: the passages and the
random numbers of a step follow from its number alone. With another number of processes it goes on
as well, and sums in another order.
"""

from __future__ import annotations

import argparse
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import course_lib
from course_lib.data import Text, text
from course_lib.models import GPT, next_token_loss


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    device = own_device()
    dist.init_process_group()
    try:
        train(options, device)
    finally:
        dist.destroy_process_group()


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--engine", choices=["ddp", "fsdp"], default="ddp")
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--batch", type=int, default=16, help="passages a step, over all ranks")
    options.add_argument("--length", type=int, default=64, help="characters in a passage")
    options.add_argument("--width", type=int, default=64)
    options.add_argument("--depth", type=int, default=2)
    options.add_argument("--dropout", type=float, default=0.1)
    options.add_argument("--learning-rate", type=float, default=1e-3)
    options.add_argument("--checkpoints", type=Path, default=Path("checkpoints"))
    options.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    options.add_argument("--print-every", type=int, default=10, help="steps between reports")
    return options


def own_device() -> torch.device:
    """The GPU of this process, which the launcher chose, or the CPU if the machine has none."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return torch.device("cpu")
    index = int(os.environ["LOCAL_RANK"])
    torch.accelerator.set_device_index(index)
    return torch.device(kind.type, index)


def train(options: argparse.Namespace, device: torch.device) -> nn.Module:
    """Train, from the last checkpoint if there is one; the model."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if options.batch % world_size:
        raise SystemExit(f"{world_size} ranks cannot share {options.batch} passages evenly")
    passages = text()
    model = parallel(make_model(options, passages).to(device), options.engine, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    checkpoints = Checkpoints(options.checkpoints)

    began = checkpoints.load(model, optimizer)
    if rank == 0:
        place = f"from the checkpoint of step {began}" if began else "from the beginning"
        print(f"{options.engine}, {world_size} ranks on {device.type}, {place}", flush=True)
    seconds = course_lib.host_seconds()
    for step in range(began + 1, options.steps + 1):
        loss = train_step(model, optimizer, *share(passages, options, step, device))
        if step % options.print_every == 0 or step == options.steps:
            mean = mean_over_ranks(loss)
            if rank == 0:
                passed = course_lib.host_seconds() - seconds
                rate = (step - began) * options.batch * options.length / passed
                print(
                    f"step {step} of {options.steps}: loss {mean:.4f}, {rate:,.0f} tokens a second",
                    flush=True,
                )
        if step % options.save_every == 0 or step == options.steps:
            checkpoints.save(model, optimizer, step)
    return model


def make_model(options: argparse.Namespace, passages: Text) -> GPT:
    """The same on every rank."""
    torch.manual_seed(0)
    return GPT(
        len(passages.vocabulary),
        context=options.length,
        width=options.width,
        depth=options.depth,
        dropout=options.dropout,
    )


def parallel(model: GPT, engine: str, device: torch.device) -> nn.Module:
    """``model`` on all ranks: a copy on each, or a shard on each."""
    if engine == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    _, blocks, _ = model.parts()
    for block in blocks:  # a block is gathered when it computes
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def share(
    passages: Text, options: argparse.Namespace, step: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """This rank's part of the passages of a step, and their next characters.

    From here on, its random numbers are those of the step too.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    x_BT, y_BT = passages.batch(options.batch, options.length, seed=step)
    torch.manual_seed(step * world_size + rank)  # for dropout
    return x_BT.chunk(world_size)[rank].to(device), y_BT.chunk(world_size)[rank].to(device)


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x_BT: Tensor, y_BT: Tensor
) -> Tensor:
    """One step. The engine averages the gradients over the ranks in ``backward``."""
    optimizer.zero_grad()
    loss = next_token_loss(model(x_BT), y_BT)
    loss.backward()
    optimizer.step()
    return loss.detach()


def mean_over_ranks(loss: Tensor) -> float:
    total = loss.clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints in a folder, of which the newest is always whole.

    One is a folder ``step_00000050``, to which every rank writes its part. It is written under
    another name and renamed at the end: whoever is killed before has not made a checkpoint.
    """

    folder: Path

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Put the newest one in ``model`` and ``optimizer``; its step, or 0 if there is none."""
        newest = [max(self.whole(), default=None)]
        dist.broadcast_object_list(newest)  # all ranks read the one that rank 0 sees
        if newest[0] is None:
            return 0
        state = self._state(model, optimizer, step=0)
        dcp.load(state, checkpoint_id=newest[0])
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        return state["step"]

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Make a checkpoint, and remove those before it."""
        whole = self.folder / f"step_{step:08}"
        part = whole.with_suffix(".part")
        if dist.get_rank() == 0:
            shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
        dist.barrier()
        dcp.save(self._state(model, optimizer, step), checkpoint_id=part)  # is on disk after this
        if dist.get_rank() == 0:
            part.rename(whole)
            for path in self.folder.glob("step_*"):
                if path != whole:
                    shutil.rmtree(path)

    def whole(self) -> list[Path]:
        """Those that are complete."""
        return [path for path in self.folder.glob("step_*") if not path.suffix]

    @staticmethod
    def _state(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
        """What a checkpoint holds. Names and shapes do not depend on engine and ranks."""
        in_model, in_optimizer = get_state_dict(model, optimizer)
        return {"model": in_model, "optimizer": in_optimizer, "step": step}


if __name__ == "__main__":
    main()
