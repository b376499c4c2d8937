"""What all tests share: where modules come from, how many graphs are tried, and how golden files are renewed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).parent
ROOT = TESTS.parent

# `python -m pytest` puts the root on the path, where a bare `import ir` would load a second copy of the package.
sys.path[:] = [str(TESTS), *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, TESTS))]

settings.register_profile("ci", derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write what the pipelines give into tests/golden/*.ir")
    parser.addoption("--graphs", type=int, default=500, help="how many random graphs go through whole pipelines")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture
def graph_count(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--graphs"))
