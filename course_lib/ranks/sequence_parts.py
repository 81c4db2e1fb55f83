"""PyTorch's context parallelism, ``torch.distributed.tensor.experimental.context_parallel``.

Inside of its block ``scaled_dot_product_attention`` is another function, which knows the group: it
is put in the place of the first one for the whole process, with options beside it, so each rank has
its own. The rules by which DTensor splits attention are shared, and stay until the last rank has
left its block.

Rests on ``torch.distributed.tensor.experimental._context_parallel``: ``_attention._cp_options``,
``_dispatch_mode``, ``_replaced_functions`` and ``existing_custom_ops``, and ``_sharding_rules``'s
``register_cp_sharding_rules`` and ``unregister_cp_sharding_rules``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental._context_parallel import _attention, _sharding_rules
from torch.nn import functional

from course_lib.ranks.rank_state import PARTS, Part, attribute

_options = _attention._cp_options

PARTS["DTensor's operators"] = attribute(lambda: DTensor._op_dispatcher, "_custom_op_handlers")
PARTS["those outside of context parallelism"] = attribute(lambda: _attention, "existing_custom_ops")
PARTS["attention"] = attribute(lambda: functional, "scaled_dot_product_attention")
PARTS["functions of context parallelism"] = attribute(lambda: _attention, "_replaced_functions")
PARTS["mode of context parallelism"] = attribute(lambda: _attention, "_dispatch_mode")
# Others may have imported the object itself, so what is in it changes hands.
PARTS["options of context parallelism"] = Part(
    lambda: dict(vars(_options)), lambda values: vars(_options).update(values)
)


def state_of_a_rank() -> dict[str, Any]:
    """The parts above that a process changes, before it has done so."""
    operators = dict(DTensor._op_dispatcher._custom_op_handlers)
    return {
        "DTensor's operators": operators,
        "those outside of context parallelism": operators,
        "functions of context parallelism": {},
    }


@contextmanager
def shared_rules() -> Iterator[None]:
    """Keep the rules, in the block, as long as one rank needs them."""
    users = 0
    register = _sharding_rules.register_cp_sharding_rules
    unregister = _sharding_rules.unregister_cp_sharding_rules

    def enter() -> None:
        nonlocal users
        users += 1
        register()  # which does nothing if they are there

    def leave(clear_the_cache: bool = False) -> None:
        nonlocal users
        users -= 1
        if users == 0:
            unregister(clear_the_cache)

    with mock.patch.multiple(
        _sharding_rules, register_cp_sharding_rules=enter, unregister_cp_sharding_rules=leave
    ):
        yield
