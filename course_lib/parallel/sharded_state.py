"""The state of sharded training, whole and on the host: for another number of devices, or stage.

PyTorch's own is ``torch.distributed.checkpoint.state_dict`` with ``full_state_dict=True``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from course_lib.parallel.flat_unit import FlatUnit
from course_lib.parallel.kinds import MakeOptimizer

# Cuts a row into each device's part of it.
Cut = Callable[[Tensor], Sequence[Tensor]]


def gather_state(units: Sequence[FlatUnit], is_sharded: bool) -> dict[str, Any]:
    """Master weights and the optimizers' state, by name.

    Returns:
        ``{"parameters": {name: tensor}, "optimizer": {key: value}}``. A value is a dictionary by
        name, as of Adam's moments, or one for all parameters, as of the count of its steps.
    """
    parameters: dict[str, Tensor] = {}
    optimizer: dict[str, Any] = {}
    for unit in units:
        masters = unit.masters if is_sharded else unit.masters[:1]
        parameters |= unit.by_name(torch.cat([master.values.cpu() for master in masters]))
        states = [master.state() for master in masters]
        for key, value in states[0].items():
            if _is_by_number(value):
                row = torch.cat([state[key].cpu() for state in states])
                optimizer.setdefault(key, {}).update(unit.by_name(row))
            else:
                own = copy.deepcopy(value)
                optimizer[key] = own.cpu() if isinstance(own, Tensor) else own
    return {"parameters": parameters, "optimizer": optimizer}


def scatter_state(
    state: dict[str, Any], units: Sequence[FlatUnit], cut: Cut, make_optimizer: MakeOptimizer
) -> None:
    """Put what :func:`gather_state` returned into the master weights and optimizers of ``units``.

    Raises:
        ValueError: it is the state of a model with other parameters, or of another optimizer, or is
            no such state.
    """
    if set(state) != {"parameters", "optimizer"}:
        raise ValueError(
            "this is no state of Sharded, which has parameters and optimizer, but has "
            f"{sorted(state)[:4]}: give what its state_dict() returned"
        )
    ours = {n: s for unit in units for n, s in zip(unit.names, unit.shapes, strict=True)}
    theirs = {name: parameter.shape for name, parameter in state["parameters"].items()}
    if ours != theirs:
        odd = sorted(n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n))
        raise ValueError(f"this is the state of another model, which differs in {odd}")
    kept, wanted = set(state["optimizer"]), _keys_of_state(units, make_optimizer)
    if kept and kept != wanted:  # before its first step an optimizer has none
        raise ValueError(
            f"this is the state of another optimizer, which keeps {sorted(kept)}, and this one "
            f"{sorted(wanted)}: make the same, or give {{**state, 'optimizer': {{}}}} to start anew"
        )
    for unit in units:
        parts = cut(unit.row_of(state["parameters"]))
        for master, part in zip(unit.masters, parts, strict=True):
            master.values.copy_(part)
        for key, value in state["optimizer"].items():
            values = cut(unit.row_of(value)) if isinstance(value, dict) else [value] * len(parts)
            for master, its_value in zip(unit.masters, values, strict=True):
                master.load(key, its_value)


def _keys_of_state(units: Sequence[FlatUnit], make_optimizer: MakeOptimizer) -> set[str]:
    """What the optimizers keep once they have made a step, tried on no numbers at all."""
    made = [master.optimizer for unit in units for master in unit.masters]
    groups = [
        {**group, "params": [piece[:0] for piece in group["params"]]}
        for optimizer in made
        for group in optimizer.param_groups
    ]
    trial = make_optimizer(groups)
    for group in trial.param_groups:
        for piece in group["params"]:
            piece.grad = piece.clone()
    trial.step()
    return {key for kept in trial.state.values() for key in kept}


def _is_by_number(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
