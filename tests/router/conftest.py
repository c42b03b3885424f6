"""Fixtures of the router's tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from engine_double import EngineDouble
from router_under_test import MakeEngine, RouterUnderTest
from tests_shared import Bus


@pytest.fixture
def make_engine(bus: Bus) -> Iterator[MakeEngine]:
    made: list[EngineDouble] = []

    def make(name: str, role: str, **options: Any) -> EngineDouble:
        made.append(EngineDouble(bus, name, role, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.stop()


@pytest.fixture
def router(bus: Bus) -> Iterator[RouterUnderTest]:
    router = RouterUnderTest(bus)
    yield router
    router.stop()
