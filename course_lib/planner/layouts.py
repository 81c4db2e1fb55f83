"""Layouts: how a model and a batch are cut over a cluster."""

from __future__ import annotations

from dataclasses import dataclass

from course_lib.planner.clusters import FP8, Cluster
from course_lib.planner.models import Model

SCHEDULES = ("GPipe", "1F1B", "interleaved", "ZB-1p", "ZB-2p")
RECOMPUTE = ("none", "selective", "alternate", "full")
PRECISIONS = ("bf16", "fp8")
KERNELS = ("eager", "fused", "compiled")
LIBRARIES = ("2021", "2023")
ATTENTION = ("unfused", "flash1", "flash2", "flash3")


@dataclass(frozen=True)
class Layout:
    """How a model and a batch are cut.

    Ranks are numbered with tensor parallelism innermost, then context, then data, and pipeline
    stages outermost, as Megatron-LM does.

    Attributes:
        batch: sequences a step, over all GPUs.
        sequence_length: tokens in each.
        data: replicas that the batch is split over.
        sharded: what of a replica's state is split over the replicas: 0 nothing, 1 optimizer
            states, 2 gradients as well, 3 parameters as well (ZeRO, arXiv:1910.02054).
        shard_group: replicas that share one copy of the state, 0 for all; fewer is HSDP.
        tensor: GPUs that split each layer (arXiv:1909.08053).
        sequence_parallel: norms and residuals are split over those GPUs too (arXiv:2205.05198).
        pipeline: stages.
        schedule: one of :data:`SCHEDULES`.
        virtual_stages: parts of the model on each GPU, in ``"interleaved"`` (arXiv:2104.04473).
        context: GPUs that split each sequence.
        expert: GPUs that split the experts; they lie within the data-parallel GPUs.
        microbatch: sequences that a GPU takes at a time.
        recompute: activations made again in the backward pass: ``"none"``, ``"selective"`` (the
            scores of unfused attention and what is cheap), ``"alternate"`` (all but every second
            product) or ``"full"`` (all but each layer's input).
        precision: of the products: ``"bf16"`` (or fp16) or ``"fp8"``; sums and states are float32.
        float32_gradients: gradients are kept and reduced in float32, not in 16 bits.
        attention: ``"unfused"`` writes the scores to memory; flash attention does not (its versions
            differ on GPUs later than an A100).
        kernels: of all that is no product: PyTorch's ``"eager"``, ``"fused"`` by hand as in
            Megatron-LM, or ``"compiled"``.
        scattered_sends: a tensor-parallel group sends each activation to the next stage once, a
            part from each GPU (arXiv:2104.04473, section 4.1), and not once from each GPU.
        overlap: gradients and shards travel while the GPU computes.
        overlap_tensor: so do a layer's activations between tensor-parallel GPUs.
        libraries: of which year: ``"2023"``, or ``"2021"``, whose products were slower on A100s and
            whose pipelines kept more.
    """

    batch: int
    sequence_length: int
    data: int = 1
    sharded: int = 0
    shard_group: int = 0
    tensor: int = 1
    sequence_parallel: bool = False
    pipeline: int = 1
    schedule: str = "1F1B"
    virtual_stages: int = 1
    context: int = 1
    expert: int = 1
    microbatch: int = 1
    recompute: str = "none"
    precision: str = "bf16"
    float32_gradients: bool = True
    attention: str = "flash3"
    kernels: str = "fused"
    scattered_sends: bool = True
    overlap: bool = True
    overlap_tensor: bool = False
    libraries: str = "2023"

    def __post_init__(self) -> None:
        counts = ("batch", "sequence_length", "data", "tensor", "pipeline", "virtual_stages")
        for name in (*counts, "context", "expert", "microbatch"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} of a layout is a whole number above 0, not {number!r}")
        if self.shard_group < 0:
            raise ValueError(f"shard_group of a layout is 0 (all) or more, not {self.shard_group}")
        choices = {
            "schedule": SCHEDULES,
            "recompute": RECOMPUTE,
            "precision": PRECISIONS,
            "kernels": KERNELS,
            "attention": ATTENTION,
            "libraries": LIBRARIES,
            "sharded": (0, 1, 2, 3),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                listed = ", ".join(map(str, allowed))
                raise ValueError(f"{name} is one of {listed}, not {getattr(self, name)!r}")

    @property
    def gpus(self) -> int:
        """How many GPUs it takes."""
        return self.data * self.tensor * self.pipeline * self.context

    @property
    def microbatches(self) -> int:
        """Microbatches that each replica works through in a step."""
        return self.batch // (self.data * self.microbatch)

    @property
    def tokens(self) -> int:
        """Tokens of one microbatch on one GPU."""
        return self.microbatch * self.sequence_length // self.context

    @property
    def shards(self) -> int:
        """GPUs that share one copy of the sharded state."""
        replicas = self.shard_group or self.data
        return replicas * self.context if self.sharded else 1

    @property
    def expert_shards(self) -> int:
        """The same for the state of experts, of which fewer GPUs have the same ones."""
        return max(1, self.shards // self.expert)

    @property
    def rounds(self) -> int:
        """How often in a step gradients of ZeRO-2 and 3 are scattered, and weights of 3 gathered.

        What is sharded is not kept whole from one microbatch to the next. But a stage of a pipeline
        keeps it whole while it takes as many microbatches in a row as there are stages.
        """
        return -(-self.microbatches // self.pipeline)

    @property
    def keeps_outputs(self) -> bool:
        """Whether a stage keeps what it has sent on until the backward pass.

        Megatron-LM has given it back since 2022 (arXiv:2205.05198, appendix B); what came before,
        and PyTorch's own pipelines, keep it.
        """
        return self.libraries == "2021" or self.kernels != "fused"

    def stage_layers(self, layers: int) -> int:
        """Layers of the fullest stage."""
        return -(-layers // (self.pipeline * self.virtual_stages)) * self.virtual_stages

    def missing_layers(self, layers: int) -> int:
        """Layers that would make all stages equal: some stages have one fewer.

        The last one goes without first, for it has the head; then the first one, which has the
        embedding (as in Llama 3, arXiv:2407.21783, section 3.3.2).
        """
        if self.pipeline == 1:
            return 0
        return -layers % (self.pipeline * self.virtual_stages)


def check(model: Model, cluster: Cluster, layout: Layout) -> None:
    """Refuse a layout that does not suit the model or the cluster.

    Raises:
        ValueError: says which sizes do not go together, and what would.
    """
    if layout.gpus != cluster.gpus:
        raise ValueError(
            f"data {layout.data} x tensor {layout.tensor} x pipeline {layout.pipeline} x context "
            f"{layout.context} makes {layout.gpus} GPUs, and the cluster has {cluster.gpus}: their "
            "product must be the number of GPUs"
        )
    step = layout.data * layout.microbatch
    if layout.batch % step:
        raise ValueError(
            f"batch {layout.batch} does not divide by data x microbatch {step}: take a multiple of "
            f"{step}, or a product of the two of {divisors(layout.batch)}"
        )
    for what, size, by, parts in _divisions(model, layout):
        if size % parts:
            raise ValueError(
                f"{what} {size} does not divide by {by} {parts}: take one of {divisors(size)}"
            )
    stages = layout.pipeline * layout.virtual_stages
    if stages > model.layers + 2:
        raise ValueError(f"{model.layers} layers are too few for {stages} stages")
    if layout.virtual_stages > 1 and layout.schedule != "interleaved":
        raise ValueError('more than one virtual stage takes schedule="interleaved"')
    if layout.virtual_stages > 1 and layout.pipeline == 1:
        raise ValueError("virtual stages take pipeline of 2 or more")
    if layout.schedule == "interleaved" and layout.pipeline > 1:
        if layout.virtual_stages == 1:
            raise ValueError('schedule="interleaved" takes virtual_stages of 2 or more')
        if layout.microbatches % layout.pipeline:
            raise ValueError(
                f"interleaved takes microbatches in groups of {layout.pipeline}, one a stage: "
                f"{layout.microbatches} is no multiple"
            )
    if layout.sequence_parallel and layout.tensor == 1:
        raise ValueError("sequence_parallel takes tensor of 2 or more")
    if layout.shard_group and not layout.sharded:
        raise ValueError("shard_group takes sharded of 1 to 3: what else is split over it?")
    if layout.shard_group and layout.data % layout.shard_group:
        raise ValueError(
            f"data {layout.data} does not divide by shard_group {layout.shard_group}: take one of "
            f"{divisors(layout.data)}"
        )
    if layout.precision == "fp8" and FP8 not in cluster.gpu.flops:
        raise ValueError(f'{cluster.gpu.name} has no fp8: take precision="bf16", or an H100')


def _divisions(model: Model, layout: Layout) -> list[tuple[str, int, str, int]]:
    divisions = [
        ("the number of heads", model.heads, "tensor", layout.tensor),
        ("the feed-forward width", model.ffn, "tensor", layout.tensor),
        ("sequence_length", layout.sequence_length, "context", layout.context),
        ("the number of experts", model.experts, "expert", layout.expert),
        ("data", layout.data, "expert", layout.expert),
    ]
    if layout.sequence_parallel:
        tokens = layout.sequence_length // layout.context
        divisions.append(("the sequence on a GPU,", tokens, "tensor", layout.tensor))
    return divisions


def divisors(number: int) -> str:
    """Those of a number, in words; some, if they are many."""
    found = [str(part) for part in range(1, number + 1) if number % part == 0]
    return ", ".join(found if len(found) <= 12 else [*found[:11], f"... {found[-1]}"])
