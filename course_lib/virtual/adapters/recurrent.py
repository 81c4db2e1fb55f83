"""LSTM and GRU: on a GPU a cell is one kernel; here it is what the CPU computes, step by step."""

from __future__ import annotations

import torch
from torch import Tensor

aten = torch.ops.aten


def register(library: torch.library.Library) -> None:
    """Register the cells for virtual GPUs, and what packs sequences of different lengths."""
    for key in ("AutogradPrivateUse1", "PrivateUse1"):
        library.impl("_thnn_fused_lstm_cell", _lstm_cell, key)
        library.impl("_thnn_fused_gru_cell", _gru_cell, key)
        library.impl("_pack_padded_sequence", _pack_padded_sequence, key)


def _lstm_cell(
    from_input: Tensor,
    from_hidden: Tensor,
    cell: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    gates = _biased(from_hidden, hidden_bias) + _biased(from_input, input_bias)
    let_in, keep, new, let_out = gates.chunk(4, 1)
    cell = keep.sigmoid() * cell + let_in.sigmoid() * new.tanh()
    return let_out.sigmoid() * cell.tanh(), cell, gates


def _gru_cell(
    from_input: Tensor,
    from_hidden: Tensor,
    hidden: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    input_gates = _biased(from_input, input_bias).chunk(3, 1)
    hidden_gates = _biased(from_hidden, hidden_bias).chunk(3, 1)
    reset, update = ((hidden_gates[i] + input_gates[i]).sigmoid() for i in (0, 1))
    new = (input_gates[2] + hidden_gates[2] * reset).tanh()
    return (hidden - new) * update + new, new


def _pack_padded_sequence(
    sequences: Tensor, lengths: Tensor, batch_first: bool
) -> tuple[Tensor, Tensor]:
    """The sequences of a batch, step by step; how many go on at each step stays on the host."""
    like = torch.empty(sequences.shape[:2])
    sizes = aten._pack_padded_sequence(like, lengths, batch_first)[1]
    steps = sequences.unbind(1 if batch_first else 0)
    parts = [step[:size] for step, size in zip(steps, sizes.tolist(), strict=False)]
    return torch.cat(parts), sizes


def _biased(gates: Tensor, bias: Tensor | None) -> Tensor:
    return gates if bias is None else gates + bias
