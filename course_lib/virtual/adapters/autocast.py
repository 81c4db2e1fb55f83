"""``torch.autocast("vgpu")``: which operators run in bfloat16 and which in float32.

The two lists are CUDA's, from the "Autocast Op Reference" of PyTorch's documentation. They are
registered between the caller and autograd, so that a cast is differentiated like any operator.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from course_lib.virtual.machine import DEVICE_TYPE

aten = torch.ops.aten

LOWER_PRECISION = (
    "addbmm addmm addmv addr baddbmm bmm chain_matmul conv1d conv2d conv3d conv_tbc "
    "conv_transpose1d conv_transpose2d.input conv_transpose3d.input convolution linear matmul mm "
    "mv prelu scaled_dot_product_attention"
).split()
FLOAT32 = (
    "acos asin binary_cross_entropy_with_logits cosh cosine_embedding_loss cosine_similarity "
    "cross_entropy_loss cumprod cumsum dist erfinv exp expm1 group_norm hinge_embedding_loss "
    "kl_div l1_loss layer_norm log log10 log1p log2 log_softmax.int margin_ranking_loss mse_loss "
    "multi_margin_loss multilabel_margin_loss nll_loss nll_loss2d norm.Scalar "
    "poisson_nll_loss pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar prod prod.dim_int reciprocal "
    "renorm rsqrt sinh smooth_l1_loss soft_margin_loss softmax.int softplus sum sum.dim_IntList "
    "tan triplet_margin_loss"
).split()


def register() -> list[torch.library.Library]:
    """Register the casts; returns the libraries, which must be kept."""
    others = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    others.fallback(torch.library.fallthrough_kernel)
    library = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    for name in LOWER_PRECISION:
        library.impl(name, partial(_run, _overload(name), None))
    for name in FLOAT32:
        library.impl(name, partial(_run, _overload(name), torch.float32))
    return [others, library]


def _overload(name: str) -> torch._ops.OpOverload:
    base, _, overload = name.partition(".")
    return getattr(getattr(aten, base), overload or "default")


def _run(func: torch._ops.OpOverload, dtype: torch.dtype | None, *args: Any, **kwargs: Any) -> Any:
    """Cast the floating-point tensors among the arguments, then call ``func`` below autocast.

    Args:
        dtype: cast to this; ``None`` is the dtype that the ``torch.autocast`` block was given.
    """
    dtype = dtype or torch.get_autocast_dtype(DEVICE_TYPE)
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        args = tuple([_cast(value, dtype) for value in args])
        kwargs = {name: _cast(value, dtype) for name, value in kwargs.items()}
        return func(*args, **kwargs)


_AUTOCAST = torch._C.DispatchKeySet(torch._C._dispatch_key_parse("AutocastPrivateUse1"))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        is_wide = value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if is_wide and value.device.type == DEVICE_TYPE else value
    if isinstance(value, list | tuple):
        return type(value)(_cast(item, dtype) for item in value)
    return value
