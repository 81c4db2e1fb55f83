"""``torch.distributed.checkpoint`` on virtual GPUs: saved on four ranks, loaded on any number."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import course_lib
from course_lib import ranks
from course_lib.models import GPT, next_token_loss

V, T, D, SAVED_ON = 32, 8, 16, 4


@pytest.fixture
def vgpus() -> list[torch.device]:
    return course_lib.devices(8)


@pytest.fixture
def gpt() -> GPT:
    return GPT(V, context=T, width=D, heads=4, depth=1, tied=False)


def begin(gpt: nn.Sequential) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    dist.init_process_group()
    model = copy.deepcopy(gpt)
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    parameters, moments = get_state_dict(model, optimizer)
    return {"model": parameters, "optimizer": moments}


def flat(state: Any, name: str = "") -> dict[str, Any]:
    """All that is in a state, by name, whole."""
    if isinstance(state, dict):
        named = state.items()
    elif isinstance(state, list):
        named = enumerate(state)  # type: ignore[assignment]
    else:
        return {name: state.full_tensor().cpu() if isinstance(state, DTensor) else state}
    return {key: each for k, v in named for key, each in flat(v, f"{name}/{k}").items()}


def train_and_save(gpt: nn.Sequential, folder: Path) -> dict[str, Any]:
    model, optimizer = begin(gpt)
    x = torch.full((2, T), dist.get_rank(), device="vgpu")
    for _ in range(2):
        optimizer.zero_grad()
        next_token_loss(model(x), x).backward()
        optimizer.step()
    dcp.save(state_of(model, optimizer), checkpoint_id=folder)
    return flat(state_of(model, optimizer))


def load(gpt: nn.Sequential, folder: Path) -> dict[str, Any]:
    model, optimizer = begin(gpt)
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    return flat(state_of(model, optimizer))


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def test_a_checkpoint_of_four_ranks_loads_on_two_and_on_eight(vgpus, gpt, tmp_path):
    saved = ranks.run(train_and_save, vgpus[:SAVED_ON], gpt, tmp_path)[0]
    moments = [name for name in saved if name.endswith("exp_avg_sq")]
    assert len(moments) == len(list(gpt.parameters()))
    assert all(saved[name].any() for name in moments)
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == [".metadata", *(f"__{rank}_0.distcp" for rank in range(SAVED_ON))]
    for count in (2, 8):
        for loaded in ranks.run(load, vgpus[:count], gpt, tmp_path):
            assert loaded.keys() == saved.keys()
            assert all(same(loaded[name], saved[name]) for name in saved)


class FailsOnRank2(dcp.FileSystemWriter):
    def write_data(self, plan: Any, planner: Any) -> Any:
        if dist.get_rank() == 2:
            raise OSError("no space left on device")
        return super().write_data(plan, planner)


def test_a_half_written_checkpoint_has_no_table_and_is_not_loaded(vgpus, gpt, tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)  # a kept record keeps the frames of its error, and tensors

    def save() -> None:
        dcp.save(state_of(*begin(gpt)), storage_writer=FailsOnRank2(tmp_path))

    with pytest.raises(dcp.CheckpointException, match="no space left"):
        ranks.run(save, vgpus[:SAVED_ON])
    assert list(tmp_path.glob("*.distcp"))
    assert not (tmp_path / ".metadata").exists()
    with pytest.raises(dcp.CheckpointException, match="metadata"):
        ranks.run(load, vgpus[:2], gpt, tmp_path)


def test_a_rank_that_dies_before_the_table_leaves_none(vgpus, gpt, tmp_path):
    class EndsTheRun(dcp.FileSystemWriter):
        def finish(self, metadata: Any, results: Any) -> None:
            raise KeyError("killed")

    def save() -> None:
        dcp.save(state_of(*begin(gpt)), storage_writer=EndsTheRun(tmp_path))

    with pytest.raises(dcp.CheckpointException, match="killed"):
        ranks.run(save, vgpus[:SAVED_ON])
    assert len(list(tmp_path.glob("*.distcp"))) == SAVED_ON
    assert not (tmp_path / ".metadata").exists()


def test_saving_beside_training_is_refused_in_one_line(vgpus, gpt, tmp_path):
    def save() -> None:
        dcp.async_save(state_of(*begin(gpt)), checkpoint_id=tmp_path)

    with pytest.raises(RuntimeError, match="async_save: call"):
        ranks.run(save, vgpus[:2])
