"""What each stage of a pipeline holds, right and with the mistakes that are made in it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from course_lib.planner import MODELS, Layout, Model

PIPELINES = [  # a model, and how it is cut
    (MODELS["llama3-70b"], Layout(64, 8192, 4, 1, tensor=8, sequence_parallel=True, pipeline=4)),
    (  # with little kept, the logits are the most
        MODELS["llama3-8b"],
        Layout(24, 4096, 2, 1, tensor=2, pipeline=8, microbatch=3, recompute="full"),
    ),
    (MODELS["llama3-8b"], Layout(8, 8192, 1, 1, tensor=4, sequence_parallel=True)),
    (
        Model("Korthikanti's 1T", 128, 25600, 160, 4 * 25600, 51200),
        Layout(512, 2048, 1, 1, tensor=8, pipeline=64, attention="unfused"),
    ),
]


@dataclass
class Parts:
    """What a stage's bytes are made of.

    Attributes:
        layers: of the stage.
        embedding, head, norm: parameters of these on the stage.
        tensor: by how many GPUs they are divided.
        weight, gradient, optimizer: bytes a parameter.
        flight: microbatches whose activations it keeps.
        logits: bytes of them.
    """

    layers: int
    embedding: int
    head: int
    norm: int
    tensor: int
    weight: float
    gradient: float
    optimizer: float
    flight: int
    logits: float

    def bytes(self, model: Model, kept: float) -> float:
        """All of them, where a layer keeps ``kept`` bytes of a microbatch."""
        parameters = self.layers * model.layer_parameters + self.embedding + self.head + self.norm
        each = self.weight + self.gradient + self.optimizer
        return parameters / self.tensor * each + self.layers * kept * self.flight + self.logits


def parts(model: Model, layout: Layout, stage: int) -> Parts:
    """The parts of a stage's bytes, with ZeRO-1, under 1F1B."""
    first, last = stage == 0, stage == layout.pipeline - 1
    table = model.vocabulary * model.hidden
    tokens = layout.microbatch * layout.sequence_length
    return Parts(
        layers=model.layers // layout.pipeline,
        embedding=table * first,
        head=table * last,
        norm=model.hidden * last,
        tensor=layout.tensor,
        weight=2.0,
        gradient=4.0,
        optimizer=12.0 / layout.data,
        flight=min(layout.microbatches, layout.pipeline - stage),
        logits=12.0 * tokens * model.vocabulary / layout.tensor * last,
    )


def held(model: Model, layout: Layout, kept: float, stage: int) -> float:
    """Bytes on a GPU of a stage."""
    return parts(model, layout, stage).bytes(model, kept)


def mistake_of(model: Model, layout: Layout, kept: float, stage: int, ours: float) -> str:
    """The one mistake that gives ``ours`` bytes, in a sentence, if there is one."""
    p, m, right = layout.pipeline, layout.microbatches, parts(model, layout, stage)
    counts = "Under 1F1B stage r keeps p - r microbatches, and never more than there are."
    changes: list[tuple[str, dict[str, float]]] = [
        ("A stage keeps several microbatches at once: p - r of them at stage r.", {"flight": 1}),
        (counts, {"flight": p}),
        (counts, {"flight": p - stage}),
        (counts, {"flight": stage + 1}),
        (counts, {"flight": min(m, p - stage - 1)}),
        ("All microbatches at once is GPipe; under 1F1B stage r keeps p - r.", {"flight": m}),
        ("ZeRO-1 divides the optimizer's 12 bytes by the replicas.", {"optimizer": 12.0}),
        (
            "ZeRO-1 divides the optimizer's 12 bytes, and no others.",
            {"weight": 2.0 / layout.data, "gradient": 4.0 / layout.data},
        ),
        ("Gradients are float32 here: 4 bytes.", {"gradient": 2.0}),
        ("Tensor parallelism divides the parameters too.", {"tensor": 1}),
        ("The embedding is on the first stage.", {"embedding": 0}),
        ("The head, and the norm before it, are on the last stage.", {"head": 0, "norm": 0}),
        ("The head is on the last stage.", {"head": 0}),
        ("The norm before the head is on the last stage.", {"norm": 0}),
        ("The last stage has logits: 12 bytes a token and entry of the vocabulary.", {"logits": 0}),
        ("Tensor parallelism divides the logits.", {"logits": right.logits * layout.tensor}),
        ("Each stage has its part of the layers.", {"layers": model.layers}),
    ]
    for words, change in changes:
        wrong = Parts(**{**vars(right), **change}).bytes(model, kept)
        is_change = not math.isclose(wrong, right.bytes(model, kept), rel_tol=1e-9)
        if is_change and math.isclose(wrong, ours, rel_tol=1e-9):
            return f" {words}"
    state = right.bytes(model, 0.0) - right.logits
    activations = right.layers * kept * right.flight
    return (
        f" Right are {state / 1e9:.2f} GB of state, {activations / 1e9:.2f} of activations and "
        f"{right.logits / 1e9:.2f} of logits."
    )
