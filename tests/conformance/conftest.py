"""Which operators run: all if this folder was asked for, otherwise one in twelve."""

import pytest

EVERY = 12


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if any("conformance" in argument for argument in config.args):
        return
    operators = [item for item in items if item.path.name == "test_operators.py"]
    left_out = {item for number, item in enumerate(operators) if number % EVERY}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]
