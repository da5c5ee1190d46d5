"""A registry that holds measures of users beside those of the package, while the tests of a file run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.measures import table
from vit_probe.measures.base import registry
from vit_probe.measures.base.discovery import measure_files


@pytest.fixture(scope="module")
def own_registry() -> Iterator[None]:
    """A registry of the measures of the package alone; what a file registers is forgotten afterwards."""
    before = registry.registered()
    for name in before.keys() - measure_files().keys():
        del registry._SPECS[name]
    yield
    registry._SPECS.clear()
    registry._SPECS.update(before)


@pytest.fixture(scope="module")
def measures_of_users(own_registry: None) -> None:
    table.define_measures()
