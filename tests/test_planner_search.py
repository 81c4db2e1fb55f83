"""What the search finds, what the command prints, and what both refuse."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from course_lib.planner import MODELS, Layout, cluster, gpt, plan, search
from course_lib.planner.__main__ import main
from course_lib.planner.constants import fitted, held_out
from course_lib.planner.fit import predicted_seconds
from course_lib.planner.published import runs
from course_lib.planner.rows import Run

SMALL = gpt("a GPT of 1.3 B", 24, 2048, 16)


def lost(sweep: list[Run], constants) -> float:
    """How much slower than the best measured run the one is that the planner takes first."""
    first = min(sweep, key=lambda run: predicted_seconds(run, constants))
    return first.seconds / min(run.seconds for run in sweep) - 1


def sweeps(table: str) -> list[list[Run]]:
    """Runs of the same model on the same GPUs; the average of those in the same layout."""
    found: dict[tuple, dict[Layout, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs(table):
        sizes = (run.model.layers, run.model.hidden, run.model.heads)
        found[(*sizes, run.cluster.gpus, run.layout.batch)][run.layout].append(run)
    averages = [
        [
            replace(same[0], seconds=float(np.mean([run.seconds for run in same])))
            for same in layouts.values()
        ]
        for layouts in found.values()
    ]
    return [sweep for sweep in averages if len(sweep) > 2]


@pytest.mark.parametrize("half", ["odd rows, from even rows", "even rows, from odd rows"])
def test_the_first_choice_is_within_5_percent_of_the_best_of_vtrains_sweeps(half: str) -> None:
    constants = held_out()[f"vTrain: {half}"]
    for sweep in sweeps("vtrain_multi"):
        assert lost(sweep, constants) <= 0.05


def test_the_first_choice_is_the_best_schedule_of_zero_bubbles_sweeps() -> None:
    for sweep in sweeps("zero_bubble"):
        assert lost(sweep, fitted()) == 0


@pytest.mark.parametrize("half", ["odd rows, from even rows", "even rows, from odd rows"])
def test_the_first_choice_is_within_5_percent_of_the_best_of_blooms_sweeps(half: str) -> None:
    constants = held_out()[f"BLOOM: {half}"]
    assert len(sweeps("bloom")) > 3
    for sweep in sweeps("bloom"):
        assert lost(sweep, constants) <= 0.05


def test_what_is_found_fits_and_is_sorted() -> None:
    found = search(SMALL, cluster("A100", 16), batch=64, sequence_length=2048)
    assert found.best
    assert all(each.fits for each in found.best)
    seconds = [each.seconds for each in found.best]
    assert seconds == sorted(seconds)
    assert found.tried == len(found.best) + sum(found.fell_out.values())


def test_nothing_that_the_search_left_out_is_faster() -> None:
    where = cluster("A100", 8)
    best = search(SMALL, where, batch=32, sequence_length=2048).best[0]
    for data, tensor in ((8, 1), (4, 2), (2, 4), (1, 8)):
        layout = Layout(32, 2048, data=data, tensor=tensor, sequence_parallel=tensor > 1)
        other = plan(SMALL, where, layout)
        assert best.seconds <= other.seconds or not other.fits


def test_virtual_stages_of_a_layer_each_are_tried_where_layers_do_not_divide() -> None:
    """126 layers over 16 stages: the fullest has 8, and 8 virtual stages are the fastest."""
    found = search(
        MODELS["llama3-405b"], cluster("H100", 16384), 2048, 8192, tensor=8, pipeline=16, keep=1
    )
    assert found.best[0].layout.virtual_stages == 8


def test_a_smaller_memory_leaves_fewer_layouts_and_no_faster_one() -> None:
    where = cluster("A100", 16)
    roomy = search(SMALL, where, 64, 2048)
    tight = search(SMALL, where, 64, 2048, memory_limit=20e9)
    reason = "too large for the memory"
    assert tight.fell_out[reason] > roomy.fell_out[reason]
    assert tight.best[0].seconds >= roomy.best[0].seconds
    assert all(each.memory.total <= 20e9 for each in tight.best)


def test_what_is_fixed_stays() -> None:
    found = search(SMALL, cluster("A100", 16), 64, 2048, tensor=2, recompute="full")
    assert {each.layout.tensor for each in found.best} == {2}
    assert {each.layout.recompute for each in found.best} == {"full"}


def test_a_model_that_cannot_fit_is_refused_with_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"does not fit on 8 x A100: .* GB a GPU.*more GPUs"):
        search(MODELS["gpt3-175b"], cluster("A100", 8), batch=8, sequence_length=2048)


REFUSALS = [
    ({"data": 3}, "makes 3 GPUs, and the cluster has 8"),
    ({"data": 8, "batch": 12}, "divide by data x microbatch 8: take a multiple of 8"),
    ({"tensor": 8, "data": 1, "heads": 12}, "heads 12 does not divide by tensor 8: take one of"),
    ({"pipeline": 8, "virtual_stages": 2}, 'takes schedule="interleaved"'),
    ({"pipeline": 8, "schedule": "interleaved"}, "virtual_stages of 2 or more"),
    (
        {"pipeline": 8, "schedule": "interleaved", "virtual_stages": 2, "batch": 12},
        "groups of 8, one a stage: 12 is no multiple",
    ),
    ({"data": 8, "sequence_parallel": True}, "takes tensor of 2 or more"),
    ({"data": 8, "sharded": 3, "shard_group": 3}, "by shard_group 3: take one of 1, 2, 4, 8"),
    ({"data": 8, "shard_group": 4}, "shard_group takes sharded of 1 to 3"),
    ({"data": 8, "schedule": "interleaved", "virtual_stages": 2}, "take pipeline of 2 or more"),
    ({"data": 8, "precision": "fp8"}, 'A100 has no fp8: take precision="bf16"'),
    ({"data": 8, "expert": 3}, "experts 1 does not divide by expert 3"),
    ({"pipeline": 8, "layers": 2}, "2 layers are too few for 8 stages"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSALS)
def test_sizes_that_do_not_go_together_are_refused(changes: dict, said: str) -> None:
    heads, layers = changes.pop("heads", 16), changes.pop("layers", 24)
    model = replace(SMALL, heads=heads, kv_heads=heads, head_size=128, layers=layers)
    layout = Layout(**{"batch": 16, "sequence_length": 2048, **changes})
    with pytest.raises(ValueError, match=said):
        plan(model, cluster("A100", 8), layout)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch": 0}, "batch of a layout is a whole number above 0, not 0"),
        ({"tensor": 1.5}, "tensor of a layout is a whole number"),
        ({"recompute": "some"}, "recompute is one of none, selective, alternate, full"),
        ({"sharded": 4}, "sharded is one of 0, 1, 2, 3"),
        ({"shard_group": -2}, "shard_group of a layout is 0"),
    ],
)
def test_a_layout_that_makes_no_sense_is_refused(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Layout(**{"batch": 8, "sequence_length": 2048, **changes})


def test_a_model_or_gpu_that_nobody_knows_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="no GPU is called 'A1000': take one of V100, A100"):
        cluster("A1000", 8)
    with pytest.raises(ValueError, match="does not divide by 3 heads"):
        gpt("", 2, 64, 3)
    with pytest.raises(ValueError, match="gpus of a cluster"):
        cluster("A100", 0)


def test_the_command_prints_a_plan(capsys: pytest.CaptureFixture) -> None:
    words = "--model llama3-405b --gpus 16384 --gpu H100 --batch 2048 --tensor 8 --pipeline 16"
    words += " --virtual 8 --sharded 1 --recompute full --tokens 15.6e12"
    assert main(words.split()) == 0
    printed = capsys.readouterr().out
    for part in ("predicted", "MFU", "tensor over NVLink", "bubble", "optimizer", "GPU-hours"):
        assert part in printed


def test_the_command_searches(capsys: pytest.CaptureFixture) -> None:
    words = "--model llama2-7b --gpus 16 --gpu A100 --batch 64 --sequence 4096 --tensor 2"
    assert main([*words.split(), "--search"]) == 0
    printed = capsys.readouterr().out
    assert "the fastest:" in printed
    assert "too large for the memory" in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model gpt2 --gpus eight", "invalid int value: 'eight'; --help lists"),
        ("--model gpt2 --gpus 8 --kernels own", "choose from"),
        ("--model gpt2", "required: --gpus"),
    ],
)
def test_the_command_refuses_unknown_words_in_one_line(
    words: str, said: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("gpus", [8, 12])
def test_a_batch_that_nobody_named_divides(gpus: int, capsys: pytest.CaptureFixture) -> None:
    assert main(f"--model gpt2 --gpus {gpus} --microbatch 5".split()) == 0
    assert "predicted" in capsys.readouterr().out


def test_the_search_spreads_experts() -> None:
    mixture = replace(SMALL, experts=8, active=2)
    found = search(mixture, cluster("A100", 8), 32, 2048, pipeline=1, tensor=1, context=1)
    assert found.best[0].layout.expert > 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model nobody --gpus 8", "no model is called 'nobody': take one of gpt2"),
        ("--model nobody.json --gpus 8", "cannot read nobody.json: No such file"),
        ("--model gpt2 --gpus 8 --gpu H1000", "no GPU is called 'H1000'"),
        ("--model gpt2 --gpus 12 --tensor 5", "into replicas of tensor 5: take a product that"),
        ("--model gpt2 --gpus 12 --data 5 --batch 10", "makes 5 GPUs"),
        ("--model gpt2 --gpus 8 --batch 0", "batch of a layout is a whole number above 0"),
        ("--model gpt2 --gpus 8 --network -1", "--network is a number above 0, not -1.0"),
        ("--model gpt2 --gpus 8 --tokens nan", "--tokens is a number above 0, not nan"),
        ("--model gpt2 --gpus 8 --sequence 2048", "more than gpt2 has learned positions: at most"),
        ("--model llama3-8b --gpus 8 --search --tensor 3", "no layout with tensor 3 that divides"),
        ("--model gpt3-175b --gpus 8 --batch 8 --search", "take more GPUs"),
        ("--model gpt2 --gpus 8 --sequence 0", "above 0"),
    ],
)
def test_the_command_refuses_in_one_line(
    words: str, said: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(words.split()) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_a_plan_that_does_not_fit_says_what_would_help(capsys: pytest.CaptureFixture) -> None:
    words = "--model llama2-70b --gpus 64 --gpu A100 --batch 64 --sequence 4096"
    assert main(words.split()) == 0
    assert "does not fit: most of it is model state: sharded=1" in capsys.readouterr().out
