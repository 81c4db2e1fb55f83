"""What fewer programs ask of PyTorch's engines: on virtual ranks it is right, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.rpc
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import ScheduleGPipe, SplitPoint
from torch.distributed.pipelining import pipeline as trace_pipeline
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._context_parallel import _attention as engine
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _MixedPrecision

import course_lib
from course_lib import ranks

N = 4


def on_ranks(vgpus: list[torch.device], function: Any, *args: Any) -> list[Any]:
    def with_a_group() -> Any:
        dist.init_process_group()
        return function(*args)

    return ranks.run(with_a_group, vgpus)


def mine(whole: Tensor, dim: int = 0) -> Tensor:
    return whole.chunk(N, dim)[dist.get_rank()].to("vgpu")


# ---------------------------------------------------------------------- SyncBatchNorm

NORMS = [
    (nn.BatchNorm1d, (12, 3)),
    (nn.BatchNorm2d, (8, 3, 5, 4)),
    (nn.BatchNorm3d, (4, 3, 2, 2, 2)),
]


@pytest.mark.parametrize(("kind", "shape"), NORMS, ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("affine", [True, False])
def test_sync_batch_norm_equals_batch_norm_of_the_whole_batch(vgpus, kind, shape, affine):
    x, weights = torch.randn(shape) * 2 + 1, torch.randn(shape)
    norm = kind(3, affine=affine)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(norm))

    def train(norm: nn.Module, x: Tensor, weights: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        for _ in range(2):  # the running statistics move twice
            y = norm(x)
            (y * weights).mean().backward()
        gradients = [p.grad for p in norm.parameters() if p.grad is not None]
        return [y.detach(), x.grad, *gradients, *norm.buffers()]

    def on_a_rank() -> list[Tensor]:
        model: Any = copy.deepcopy(synced).to("vgpu")
        if affine:
            model = DistributedDataParallel(model)
        return [each.cpu() for each in train(model, mine(x), mine(weights))]

    y, x_grad, *others = train(norm, x, weights)
    returned = on_ranks(vgpus, on_a_rank)
    assert torch.allclose(torch.cat([each[0] for each in returned]), y, atol=1e-6)
    assert torch.allclose(torch.cat([each[1] for each in returned]) / N, x_grad, atol=1e-6)
    for each in returned:
        for got, expected in zip(each[2:], others, strict=True):
            assert torch.allclose(got, expected, atol=1e-6, rtol=1e-6)


def test_sync_batch_norm_of_ranks_with_different_numbers_of_examples(vgpus):
    x = torch.randn(10, 3)
    sizes = [1, 2, 3, 4]

    def on_a_rank() -> Tensor:
        part = x.split(sizes)[dist.get_rank()].to("vgpu")
        return nn.SyncBatchNorm(3).to("vgpu")(part).detach().cpu()

    expected = nn.BatchNorm1d(3)(x).detach()
    assert torch.allclose(torch.cat(on_ranks(vgpus, on_a_rank)), expected, atol=1e-6)


def test_sync_batch_norm_sends_two_numbers_a_channel_and_a_count(vgpus):
    def on_a_rank() -> None:
        norm = nn.SyncBatchNorm(5).to("vgpu")
        norm(torch.randn(2, 5, device="vgpu", requires_grad=True)).sum().backward()

    with course_lib.trace(strict=True) as trace:
        on_ranks(vgpus, on_a_rank)
    gathered, summed = (N - 1) * (2 * 5 + 1) * 4, 2 * (N - 1) * 2 * 5 * 4 / N
    assert trace.bytes_sent(vgpus[0]) == pytest.approx(gathered + summed, abs=16)


# ---------------------------------------------------------------------- context parallelism

HEADS, T, WIDTH = 4, 16, 8


def q_k_v() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, HEADS, T, WIDTH, generator=generator) for _ in range(3)]


def attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> list[Tensor]:
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    out.square().mean().backward()
    return [out.detach(), q.grad, k.grad, v.grad]


@pytest.mark.parametrize("rotation", ["allgather", "alltoall"])
@pytest.mark.parametrize(("is_causal", "balanced"), [(True, True), (True, False), (False, False)])
def test_context_parallelism_equals_one_gpu(vgpus, rotation, is_causal, balanced):
    expected = attend(*[each.requires_grad_() for each in q_k_v()], is_causal)

    def on_a_rank() -> list[Tensor]:
        engine.set_rotate_method(rotation)
        engine._cp_options.enable_load_balance = balanced
        mesh = init_device_mesh("vgpu", (N,))
        parts = [each.to("vgpu") for each in q_k_v()]
        with context_parallel(
            mesh, buffers=parts, buffer_seq_dims=[2] * 3, no_restore_buffers=set(parts)
        ):
            assert parts[0].shape == (2, HEADS, T // N, WIDTH)
            results = attend(*[part.requires_grad_() for part in parts], is_causal)
            whole = engine.context_parallel_unshard(mesh, results, [2] * 4)
        return [each.cpu() for each in whole]

    with course_lib.trace(strict=True):
        returned = on_ranks(vgpus, on_a_rank)
    for out, *gradients in returned:
        assert torch.allclose(out, expected[0], atol=1e-6)
        for got, whole in zip(gradients, expected[1:], strict=True):
            assert torch.allclose(got / N, whole, atol=1e-6)


def test_context_parallelism_of_one_rank_is_none_of_another(vgpus):
    """And nothing of it is left when all have ended."""
    attention, options = functional.scaled_dot_product_attention, dict(vars(engine._cp_options))

    def on_a_rank() -> bool:
        mesh = init_device_mesh("vgpu", (2, 2), mesh_dim_names=("context", "data"))
        part = torch.ones(1, 1, 4, 2, device="vgpu")
        if dist.get_rank() % 2:
            engine.set_rotate_method("alltoall")
            with context_parallel(mesh["context"], buffers=[part], buffer_seq_dims=[2]):
                dist.barrier()
                return functional.scaled_dot_product_attention is attention
        dist.barrier()
        return functional.scaled_dot_product_attention is attention

    assert on_ranks(vgpus, on_a_rank) == [True, False, True, False]
    assert functional.scaled_dot_product_attention is attention
    assert dict(vars(engine._cp_options)) == options


def test_attention_of_heads_that_dtensor_splits_equals_one_gpu(vgpus):
    expected = attend(*[each.requires_grad_() for each in q_k_v()], True)

    def on_a_rank() -> list[Tensor]:
        mesh = init_device_mesh("vgpu", (N,))
        q, k, v = [
            distribute_tensor(each.to("vgpu"), mesh, [Shard(1)]).requires_grad_()
            for each in q_k_v()
        ]
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out.square().mean().backward()
        return [each.full_tensor().cpu() for each in (out.detach(), q.grad, k.grad, v.grad)]

    for results in on_ranks(vgpus, on_a_rank):
        for got, whole in zip(results, expected, strict=True):
            assert torch.allclose(got, whole, atol=1e-6)


# ---------------------------------------------------------------------- DDP's hooks


def gradients_with(hook: Any, make_state: Any, steps: int = 3) -> list[Tensor]:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(64, 32).to("vgpu"))
    model.register_comm_hook(make_state(), hook)
    x = mine(torch.randn(8, 64))
    for _ in range(steps):
        model.zero_grad()
        model(x).square().mean().backward()
    return [parameter.grad.cpu() for parameter in model.parameters()]


def low_rank() -> Any:
    return powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2)


@pytest.mark.parametrize(
    ("hook", "make_state", "off"),
    [
        (default_hooks.fp16_compress_hook, lambda: None, 1e-2),
        (default_hooks.bf16_compress_hook, lambda: None, 1e-2),
        (default_hooks.fp16_compress_wrapper(default_hooks.allreduce_hook), lambda: None, 1e-2),
        (powerSGD_hook.powerSGD_hook, low_rank, 1.0),
    ],
    ids=["fp16", "bf16", "wrapper", "PowerSGD"],
)
def test_a_compressing_hook_gives_all_ranks_the_same_and_loses_little(vgpus, hook, make_state, off):
    exact = on_ranks(vgpus, gradients_with, default_hooks.allreduce_hook, lambda: None)[0]
    first, *others = on_ranks(vgpus, gradients_with, hook, make_state)
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))
    lost = (first[0] - exact[0]).norm() / exact[0].norm()
    assert 0 < lost < off


def test_power_sgd_sends_two_thin_matrices(vgpus):
    """From its third step on; the bias is sent as it is."""

    def sent(steps: int) -> int:
        with course_lib.trace() as trace:
            on_ranks(vgpus, gradients_with, powerSGD_hook.powerSGD_hook, low_rank, steps)
        return trace.bytes_between_devices

    whole, thin = 64 * 32 + 32, (64 + 32) * 2 + 32
    step, step_of_low_rank = sent(2) - sent(1), sent(4) - sent(3)
    assert step_of_low_rank == 2 * (N - 1) * thin * 4
    assert step - step_of_low_rank >= 2 * (N - 1) * (whole - thin) * 4


# ---------------------------------------------------------------------- pipelines that are traced


def test_a_pipeline_that_pytorch_cuts_equals_one_gpu(vgpus):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(N)])
    x, y = torch.randn(8, 8), torch.randn(8, 8)
    functional.mse_loss(model(x), y).backward()

    def on_a_rank() -> list[Tensor]:
        cuts = {str(layer): SplitPoint.BEGINNING for layer in range(1, N)}
        whole = copy.deepcopy(model)
        whole.zero_grad()
        rank = dist.get_rank()
        stage = trace_pipeline(whole, mb_args=(x[:2],), split_spec=cuts).build_stage(
            rank, torch.device("vgpu", rank)
        )
        given = [x.to("vgpu")] if rank == 0 else []
        target = {"target": y.to("vgpu")} if rank == N - 1 else {}
        ScheduleGPipe(stage, 4, loss_fn=functional.mse_loss).step(*given, **target)
        return [parameter.grad.cpu() for parameter in stage.submod.parameters()]

    got = [gradient for each in on_ranks(vgpus, on_a_rank) for gradient in each]
    for gradient, parameter in zip(got, model.parameters(), strict=True):
        assert torch.allclose(gradient, parameter.grad, atol=1e-6)


# ---------------------------------------------------------------------- what is refused


def mixed() -> None:
    half = _MixedPrecision(torch.bfloat16, torch.float32, torch.float32)
    model = DistributedDataParallel(nn.Linear(2, 2).to("vgpu"), mixed_precision=half)
    model(torch.ones(2, 2, device="vgpu")).sum().backward()


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (mixed, r"mixed_precision=...\) does not train on virtual GPUs: take torch.autocast"),
        (lambda: dist.split_group(None, [[0, 1], [2, 3]]), "split_group: call new_group"),
        (lambda: dist.TCPStore("localhost", 1), r"TCPStore: call init_process_group\(\) without"),
        (lambda: torch.distributed.checkpoint.async_save({}), "async_save: call torch.distributed"),
        (lambda: torch.distributed.rpc.init_rpc("me"), "init_rpc: send tensors with"),
        (lambda: torch.multiprocessing.spawn(print), "spawn: a rank is there for each GPU"),
    ],
    ids=["mixed_precision", "split_group", "TCPStore", "async_save", "rpc", "spawn"],
)
def test_what_virtual_ranks_do_not_do_is_refused_in_one_line(
    vgpus, ask: Callable[[], Any], says: str
):
    with pytest.raises(NotImplementedError, match=says) as caught:
        on_ranks(vgpus, ask)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch.cuda.set_device works here")
@pytest.mark.parametrize(
    "ask", [lambda: torch.cuda.set_device(0), lambda: init_device_mesh("cuda", (4,))]
)
def test_who_takes_virtual_gpus_for_those_of_cuda_is_told_their_name(vgpus, ask):
    with pytest.raises(NotImplementedError, match="current from the start, and called 'vgpu'"):
        on_ranks(vgpus, ask)
