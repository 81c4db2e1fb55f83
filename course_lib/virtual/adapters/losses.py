"""``F.ctc_loss`` reads the lengths on the host, wherever they are, as on CUDA."""

from __future__ import annotations

import torch

aten = torch.ops.aten


def register(library: torch.library.Library) -> None:
    """Register the operator for virtual GPUs."""
    for key in ("AutogradPrivateUse1", "PrivateUse1"):
        library.impl("ctc_loss.Tensor", _ctc_loss, key)


def _ctc_loss(
    log_probs: torch.Tensor,
    targets: torch.Tensor,
    input_lengths: torch.Tensor,
    target_lengths: torch.Tensor,
    blank: int = 0,
    reduction: int = 1,
    zero_infinity: bool = False,
) -> torch.Tensor:
    lengths = [each.reshape(-1).tolist() for each in (input_lengths, target_lengths)]
    return aten.ctc_loss.IntList(log_probs, targets, *lengths, blank, reduction, zero_infinity)
