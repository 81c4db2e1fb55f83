"""The checks of lesson 15 tell programs that are mended from those that are not, by readings.

Most answers are the broken program with some lines changed, as a learner would change them.
"""

from __future__ import annotations

import sys
import textwrap

import torch
from torch import nn

from course_lib import current_stream
from course_lib.doctor import INSTRUMENTS
from course_lib.exercises import lesson_15
from course_lib.exercises.broken.cases import CASES
from course_lib.exercises.broken.named import readings
from course_lib.exercises.lesson_15 import program_text
from course_lib.exercises.verdict import Verdict
from course_lib.models import next_token_loss
from course_lib.parallel.data_parallel import all_reduce_gradients, split_batch, train_step
from course_lib.parallel.gradient_norm import clip_gradients
from course_lib.parallel.seeds import seed_device, seed_ranks
from course_lib.parallel.sequence_order import positions
from exercise_answers import Answer, Answers

MORE_NAMES = {
    "all_reduce_gradients": all_reduce_gradients,
    "clip_gradients": clip_gradients,
    "current_stream": current_stream,
    "nn": nn,
    "positions": positions,
    "seed_device": seed_device,
    "seed_ranks": seed_ranks,
    "torch": torch,
    "train_step": train_step,
}


def answers(name: str) -> Answers:
    """The exercise; an answer names what is right, but for what its ``names`` say."""
    check = getattr(lesson_15, f"check_{name}")

    def check_named(answer: Answer) -> Verdict:
        named = {"line": CASES[name].lines[0], "instrument": next(iter(readings(name)))}
        return check(answer, **{**named, **getattr(answer, "names", {})})

    return Answers("15", name.replace("_", "-"), check_named)


def mended(made: Answers, words: str, **names: object) -> Answer:
    """The solution, by someone who named something else."""

    def answer(model, gpus):
        return made.solution(model, gpus)

    answer.names, answer.__name__ = names, words.replace(" ", "_")
    return answer


def changed(name: str, words: str, *changes: tuple[str, str]) -> Answer:
    """The broken program with some of its lines changed; ``words`` say how."""
    program = CASES[name].program
    source = program_text(program)
    for old, new in changes:
        source = replaced(
            source, textwrap.dedent(old).strip("\n"), textwrap.dedent(new).strip("\n")
        )
    names = {**vars(sys.modules[program.__module__]), **MORE_NAMES}
    exec(source, names)
    answer = names[program.__name__]
    answer.__name__ = words.replace(" ", "_")
    return answer


def replaced(source: str, old: str, new: str) -> str:
    """``new`` for the one place of ``old``, each of their lines indented as that place is."""
    found = []
    for line in source.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        if textwrap.indent(old, indent) in source and old.splitlines()[0] == line.strip():
            found.append((textwrap.indent(old, indent), textwrap.indent(new, indent)))
    if not found:  # a part of a line
        found = [(old, new)]
    ((before, after),) = set(found)
    assert source.count(before) == 1, (old, source)
    return source.replace(before, after)


UPDATE = ("for optimizer in optimizers:\n    optimizer.step()", "pass")
SINGLE_UPDATE = ("optimizer.step()", "pass")
EXERCISES = []


def exercise(name: str, reading: str, without_update: str, *changes: tuple[str, str]) -> Answers:
    """An exercise, with the wrong answers that each of them has."""
    made = answers(name)
    EXERCISES.append(made)
    made.wrong(reading, "after step")(changed(name, "the program as it was"))
    made.wrong(without_update)(changed(name, "no update", *(changes or [UPDATE])))

    other = "optimizer.zero_grad()" if name != "thawed" else "loss.backward()"
    if name in ("one_row", "moved"):
        other = "loss.backward()"
    silent = next(each for each in INSTRUMENTS if each not in readings(name))
    is_mended = "the program is mended"
    made.wrong(is_mended, "LINE is not the one at fault")(mended(made, "another line", line=other))
    made.wrong(is_mended, "LINE is no line of the program")(
        mended(made, "a line of another program", line="all_reduce(everything)")
    )
    made.wrong(is_mended, "LINE is open")(mended(made, "no line", line=None))
    made.wrong(is_mended, f"{silent} is silent on this program")(
        mended(made, "an instrument that is silent", instrument=silent)
    )
    made.wrong(is_mended, "INSTRUMENT is one of replica against replica")(
        mended(made, "an instrument that there is not", instrument="the loss")
    )
    for line in CASES[name].lines[1:]:
        made.right(mended(made, f"with the line {line}", line=line))
    for instrument in list(readings(name))[1:]:
        made.right(mended(made, f"shown by {instrument}", instrument=instrument))

    @made.wrong("return the replicas and the step")
    def returning_nothing(model, gpus):
        CASES[name].program(model, gpus)

    @made.wrong("return the replicas and the step")
    def returning_the_models_alone(model, gpus):
        return CASES[name].program(model, gpus)[0]

    return made


# ---------------------------------------------------------------------------- A. the sum

SHORT = exercise("short_passages", "against one device: 3 of 3 parameters", "against one device")
SHARE = "share = len(y_part) / len(y)"
SHORT.wrong("against one device", "off by")(
    changed("short_passages", "counting padding too", (SHARE, "share = y_part.numel() / y.numel()"))
)
SHORT.right(
    changed("short_passages", "a sum over all tokens", (
        "loss = next_token_loss(replica(x_part), y_part) * share",
        "scores = replica(x_part).flatten(0, 1)\n"
        "loss = F.cross_entropy(scores, y_part.flatten(), reduction='sum') / (y != -100).sum()",
    ))
)  # fmt: skip


@SHORT.right
def the_courses_own_step(model, gpus):
    replicas, _ = CASES["short_passages"].program(model, gpus)
    optimizers = [torch.optim.SGD(replica.parameters(), lr=1.0) for replica in replicas]

    def step(x, y):
        xs, ys = split_batch(x, gpus), split_batch(y, gpus)
        train_step(replicas, optimizers, xs, ys, next_token_loss)

    return replicas, step


PIECES = exercise("four_pieces", "bytes: 43,264 bytes", "against one device")
LOOP = """
    for copies in parameter_copies(replicas):
        gradients = [parameter.grad for parameter in copies]
        all_reduce(gradients)
        for gradient in gradients:
            gradient /= len(gpus)
"""
PIECES.wrong("against one device")(
    changed("four_pieces", "a sum for a mean", (LOOP, """
        for copies in parameter_copies(replicas):
            all_reduce([parameter.grad for parameter in copies])
    """))
)  # fmt: skip
PIECES.wrong("in one piece")(
    changed("four_pieces", "no pieces at all", ("    count = 4", "    count = 1"))
)
PIECES.right(
    changed("four_pieces", "after the last piece alone", (LOOP, """
        done = locals().get("done", 0) + 1
        if done == count:
            for copies in parameter_copies(replicas):
                gradients = [parameter.grad for parameter in copies]
                all_reduce(gradients)
                for gradient in gradients:
                    gradient /= len(gpus)
    """))
)  # fmt: skip
PIECES.right(
    changed(
        "four_pieces",
        "the share in the loss and a plain sum",
        ("loss = F.cross_entropy(replica(x_part), y_part) / count",
         "loss = F.cross_entropy(replica(x_part), y_part) / count / len(gpus)"),
        ("total += loss.item() / len(gpus)", "total += loss.item()"),
        (LOOP, "pass"),
        (UPDATE[0], f"all_reduce_gradients(replicas)\n{UPDATE[0]}"),
    )
)  # fmt: skip

CLIPPED = exercise("clipped", "against one device: 4 of 4", "against one device")
CLIP = "clip_together(gradients, gradients, max_norm=0.1)"
CLIPPED.wrong("replica against replica")(
    changed("clipped", "one replica clipped", (
        CLIP, "counted = [p.grad for p in replicas[0].parameters()]\n"
        "clip_together(counted, counted, max_norm=0.1)",
    ))
)  # fmt: skip
CLIPPED.wrong("against one device")(changed("clipped", "no clipping at all", (CLIP, "pass")))
CLIPPED.right(changed("clipped", "the courses own clip", (CLIP, "clip_gradients(replicas, 0.1)")))
CLIPPED.right(
    changed("clipped", "each replica by itself", (
        CLIP, "for replica in replicas:\n"
        "    nn.utils.clip_grad_norm_(replica.parameters(), 0.1, foreach=False)",
    ))
)  # fmt: skip

# ------------------------------------------------------------------------ B. who learns

ROW = exercise("one_row", "2 of 4 parameters are not one device's", "against one device")
MADE = "optimizers = [SGD(replica.parameters(), lr=0.1) for replica in replicas]"
ROW_STEP = "def step(x, y):"
NEW = "layer.weight, layer.bias = nn.Parameter(weight.view_as(layer.weight)), nn.Parameter(bias)"
ROW.wrong("1 of 4 parameters are not one device's", "0.bias")(
    changed("one_row", "the weight alone", (
        ROW_STEP, "for replica, optimizer in zip(replicas, optimizers):\n"
        "    optimizer.add_param_group({'params': [replica[0].weight]})\n\n" + ROW_STEP,
    ))
)  # fmt: skip
ROW.right(
    changed("one_row", "the same parameters with other numbers", (
        NEW, "layer.weight.data, layer.bias.data = weight.view_as(layer.weight), bias"
    ))
)  # fmt: skip
ROW.wrong("the row should stay")(
    changed("one_row", "no row", (
        "layer = replica[0]  # its weight and bias become parts of one row", "continue"
    ))
)  # fmt: skip


@ROW.wrong("models with the parameters")
def numbers_for_replicas(model, gpus):
    return [1, 2, 3], print


ROW.right(changed("one_row", "new optimizers", (ROW_STEP, f"{MADE}\n\n{ROW_STEP}")))

ROW.right(
    changed("one_row", "both added to the old optimizers", (
        ROW_STEP, "for replica, optimizer in zip(replicas, optimizers):\n"
        "    optimizer.add_param_group({'params': list(replica[0].parameters())})\n\n" + ROW_STEP,
    ))
)  # fmt: skip

THAWED = exercise("thawed", "after step 3", "against one device")
REDUCED = "reduced = [copies for copies in parameter_copies(replicas) if copies[0].requires_grad]"
REDUCE = """
    for copies in reduced:
        all_reduce([parameter.grad for parameter in copies])
"""
THAWED.wrong("after step 3", "against one device")(
    changed("thawed", "never thawed", ("replica[0].requires_grad_(True)", "pass"))
)
THAWED.wrong("after step 1")(
    changed("thawed", "never frozen", ("replica[0].requires_grad_(False)", "pass"))
)
THAWED.right(changed("thawed", "the courses own sum", (REDUCE, "all_reduce_gradients(replicas)")))
THAWED.right(
    changed("thawed", "the list made in each step", (
        "for replica in replicas:\n    replica.zero_grad()",
        f"for replica in replicas:\n    replica.zero_grad()\n{REDUCED}",
    ))
)  # fmt: skip

THAWED.right(
    changed("thawed", "the list made anew when the layer thaws", (
        "if steps == 3:", "if steps == 3:\n    reduced[:] = parameter_copies(replicas)"
    ))
)  # fmt: skip

MOVED = exercise("moved", "after step 3", "against one device")
SAVED = 'saved = {"model": replicas[0].state_dict()}'
AGAIN = "optimizers[:] = [SGD(r.parameters(), lr=0.1, momentum=0.9) for r in replicas]"
MOVED.wrong("after step 3", "replica against replica")(
    changed(
        "moved",
        "read by the first alone",
        (SAVED, 'saved = {"model": replicas[0].state_dict(), "o": optimizers[0].state_dict()}'),
        (AGAIN, f'{AGAIN}\noptimizers[0].load_state_dict(saved["o"])'),
    )
)
MOVED.wrong("after step 3", "against one device")(
    changed("moved", "more momentum to catch up", (AGAIN, AGAIN.replace("0.9", "0.99")))
)
MOVED.wrong("the restart should stay")(
    changed("moved", "no restart", ("if steps == 3:", "if steps == 0:"))
)
MOVED.wrong("the restart should stay")(
    changed(
        "moved",
        "saved and never read",
        ("replicas[:] = replicate(model, gpus)", "pass"),
        ('for replica in replicas:\n    replica.load_state_dict(saved["model"])', "pass"),
        (AGAIN, "pass"),
    )
)
MOVED.right(
    changed(
        "moved",
        "each its own state",
        (SAVED, 'saved = {"model": replicas[0].state_dict()}\n'
         "kept = [optimizer.state_dict() for optimizer in optimizers]"),
        (AGAIN, f"{AGAIN}\nfor optimizer, each in zip(optimizers, kept):\n"
         "    optimizer.load_state_dict(each)"),
    )
)  # fmt: skip
MOVED.right(
    changed(
        "moved",
        "the momentum by hand",
        (SAVED, 'saved = {"model": replicas[0].state_dict(), "m": [\n'
         '    optimizers[0].state[p]["momentum_buffer"] for p in replicas[0].parameters()]}'),
        (AGAIN, f"{AGAIN}\nfor r, o in zip(replicas, optimizers):\n"
         '    for p, m in zip(r.parameters(), saved["m"]):\n'
         '        o.state[p]["momentum_buffer"] = m.to(p.device, copy=True)'),
    )
)  # fmt: skip

# ---------------------------------------------------------------------------- C. chance

SEED, COPIES = "seed_device(1, gpu)", "replicas = replicate(model, gpus)"
DROPOUT = exercise(
    "with_dropout",
    "masks: ranks 0 and 1",
    "no parameter has moved",
    UPDATE,
    (SEED, "seed_device(gpu.index, gpu)"),
)
DROPOUT.wrong("drops nothing any more")(
    changed(
        "with_dropout",
        "no dropout",
        (COPIES, f"{COPIES}\nfor replica in replicas:\n    replica[2].p = 0"),
    )
)
DROPOUT.wrong("masks")(
    changed("with_dropout", "another seed for all", (SEED, "seed_device(7, gpu)"))
)
DROPOUT.right(
    changed("with_dropout", "a seed for each", (
        "for gpu in gpus:\n    seed_device(1, gpu)",
        "for rank, gpu in enumerate(gpus):\n    seed_device(10 + rank, gpu)",
    ))
)  # fmt: skip
DROPOUT.right(changed("with_dropout", "its own function", (
    "for gpu in gpus:\n    seed_device(1, gpu)", "seed_ranks(5, gpus)"
)))  # fmt: skip

SHUFFLED = "shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))"
EPOCHS = exercise(
    "epochs",
    "after step 2",
    "no parameter has moved",
    UPDATE,
    (SHUFFLED, SHUFFLED.replace("0", "epoch")),
)
EPOCHS.wrong("examples: rank 0")(
    changed("epochs", "no shuffling", (SHUFFLED, "shuffled = torch.arange(len(x))"))
)
EPOCHS.wrong("after step 3", "as in step 1")(
    changed("epochs", "two orders in turn", (SHUFFLED, SHUFFLED.replace("(0)", "(epoch % 2)")))
)
EPOCHS.wrong("not every example")(
    changed("epochs", "with replacement", (SHUFFLED, "shuffled = torch.randint(len(x), (len(x),))"))
)
EPOCHS.right(
    changed("epochs", "the programs own dice", (SHUFFLED, "shuffled = torch.randperm(len(x))"))
)
EPOCHS.right(
    changed(
        "epochs",
        "one generator for all epochs",
        (COPIES, f"{COPIES}\ngenerator = torch.Generator().manual_seed(0)"),
        (SHUFFLED, "shuffled = torch.randperm(len(x), generator=generator)"),
    )
)

AGAIN_STAGE = exercise(
    "recomputed", "buffers: 2.running_mean here", "against one device", SINGLE_UPDATE
)
H = "h = checkpoint(first_stage, x, use_reentrant=False)  # not kept: computed again"
AGAIN_STAGE.wrong("computed a second time")(
    changed("recomputed", "kept after all", (H, "h = first_stage(x)"))
)
AGAIN_STAGE.wrong("buffers")(
    changed("recomputed", "half the momentum", (H, f"norm.momentum = 0.01\n{H}"))
)
AGAIN_STAGE.right(
    changed("recomputed", "a smaller momentum", (H, f"norm.momentum = 1 - 0.9**0.5\n{H}"))
)
AGAIN_STAGE.right(
    changed("recomputed", "buffers put back", (
        "loss.backward()",
        "kept = [b.clone() for b in norm.buffers()]\n"
        "loss.backward()\n"
        "for b, old in zip(norm.buffers(), kept):\n"
        "    b.copy_(old)",
    ))
)  # fmt: skip

# ------------------------------------------------------------------------- D. the borders

MICRO = exercise("microbatches", "gradient norm", "against one device", SINGLE_UPDATE)
BACK = "loss.backward()"
MICRO.wrong("gradient norm", "2x")(
    changed("microbatches", "divided by the stages", (BACK, "(loss / len(gpus)).backward()"))
)
MICRO.wrong("four microbatches")(
    changed("microbatches", "in one piece", ("    count = 4", "    count = 1"))
)
MICRO.wrong("four microbatches")(
    changed(
        "microbatches",
        "in two pieces",
        ("    count = 4", "    count = 2"),
        (BACK, "(loss / count).backward()"),
    )
)
MICRO.right(changed("microbatches", "one backward", (
    "for loss in losses:\n    loss.backward()", "(sum(losses) / count).backward()"
)))  # fmt: skip
MICRO.right(
    changed(
        "microbatches", "in backward", (BACK, "loss.backward(torch.tensor(1 / count).to(gpus[1]))")
    )
)
MICRO.right(
    changed("microbatches", "gradients divided", (
        "optimizer.step()", "for p in model.parameters():\n    p.grad /= count\noptimizer.step()"
    ))
)  # fmt: skip

LAYERS = exercise("split_layers", "the first of them bias", "against one device", SINGLE_UPDATE)
PART = "part = F.linear(h, down.weight, model.bias.to(gpu))"
LAYERS.wrong("against one device", "bias")(
    changed("split_layers", "no bias", (PART, "part = F.linear(h, down.weight)"))
)


@LAYERS.wrong("each should have half")
def a_layer_each(model, gpus):
    for up, down in zip(model.ups, model.downs, strict=True):
        up.to(gpus[0]), down.to(gpus[1])
    model.bias.data = model.bias.data.to(gpus[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x, y):
        optimizer.zero_grad()
        hs = [up(x.to(gpus[0])).relu() for up in model.ups]
        parts = [down(h.to(gpus[1])) for down, h in zip(model.downs, hs, strict=True)]
        loss = nn.functional.cross_entropy(sum(parts) + model.bias, y.to(gpus[1]))
        loss.backward()
        optimizer.step()
        return loss.item()

    return [model], step


LAYERS.right(
    changed("split_layers", "a part of the bias each", (
        PART, "part = F.linear(h, down.weight, model.bias.to(gpu) / len(gpus))"
    ))
)  # fmt: skip
LAYERS.right(
    changed("split_layers", "the first alone adds it", (
        PART, "part = down(h) + model.bias.to(gpu) if gpu == gpus[0] else down(h)"
    ))
)  # fmt: skip

LONG = exercise("long_passages", "against one device: 8 of 8", "against one device")
RING = "ring_attention(qs, ks, vs, causal=True)"
LONG.wrong("against one device")(
    changed("long_passages", "no mask at all", (RING, "ring_attention(qs, ks, vs, causal=False)"))
)


@LONG.wrong("half of the tokens")
def data_parallelism(model, gpus):
    replicas, _ = CASES["long_passages"].program(model, gpus)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.5) for each in replicas]

    def step(x, y):
        xs, ys = split_batch(x, gpus), split_batch(y, gpus)
        return train_step(replicas, optimizers, xs, ys, next_token_loss)

    return replicas, step


LONG.right(
    changed("long_passages", "dealt in zigzag", (
        "places = torch.arange(x.shape[1]).chunk(len(gpus))  # whose tokens are where",
        "places = [positions(x.shape[1], len(gpus), rank) for rank in range(len(gpus))]",
    ))
)  # fmt: skip
LONG.right(
    changed("long_passages", "said in passing", (RING, "ring_attention(qs, ks, vs, True, False)"))
)

# ----------------------------------------------------------------------- E. right numbers

SIDES = exercise("side_streams", "waits", "against one device")
BESIDE = """
    for copies in parameter_copies(replicas):
        gradients = [parameter.grad for parameter in copies]
        with sides.beside(gradients):
            all_reduce(gradients)
"""
SIDES.wrong("on a side stream any more")(
    changed("side_streams", "no side streams", ("with sides.beside(gradients):", "if True:"))
)
SIDES.wrong("waits")(
    changed(
        "side_streams", "joined too early", (BESIDE, "sides.join()\n" + textwrap.dedent(BESIDE))
    )
)


@SIDES.wrong("against one device")
def spoiling_the_targets(model, gpus):
    """As if one device beside it would then learn the same."""
    replicas, step = CASES["side_streams"].program(model, gpus)
    return replicas, lambda x, y: step(x, y.zero_())


SIDES.right(
    changed(
        "side_streams", "joined for each", (BESIDE, textwrap.dedent(BESIDE) + "    sides.join()")
    )
)
SIDES.right(
    changed("side_streams", "with events", (
        BESIDE, textwrap.dedent(BESIDE) + "for gpu, done in zip(gpus, sides.record_events()):\n"
        "    done.wait(current_stream(gpu))",
    ))
)  # fmt: skip

SIDES.right(
    changed("side_streams", "the host waits", (
        BESIDE, textwrap.dedent(BESIDE) + "for gpu in gpus:\n    torch.vgpu.synchronize(gpu)"
    ))
)  # fmt: skip

LENGTH = exercise("by_length", "timeline: device 2 multiplies", "against one device")
OWN = "own = by_length.chunk(len(gpus))[rank]"
LENGTH.wrong("should be cut")(
    changed("by_length", "padded like the longest", (
        "longest = int(lengths[own].max())  # no more columns than its longest passage needs",
        "longest = y.shape[1]",
    ))
)  # fmt: skip
LENGTH.wrong("timeline: device 0")(
    changed(
        "by_length",
        "longest first",
        ("lengths.argsort(stable=True)", "lengths.argsort(stable=True).flip(0)"),
    )
)
LENGTH.right(
    changed("by_length", "not sorted", (
        "lengths.argsort(stable=True)", "torch.arange(len(lengths))"
    ))
)  # fmt: skip
LENGTH.right(
    changed("by_length", "unsorted", (OWN, "own = torch.arange(len(x)).chunk(len(gpus))[rank]"))
)
LENGTH.right(
    changed("by_length", "there and back again", (
        OWN, "own = by_length.view(-1, len(gpus))\n"
        "own = torch.cat([row.flip(0) if i % 2 else row for i, row in enumerate(own)])\n"
        "own = own[rank :: len(gpus)]",
    ))
)  # fmt: skip
