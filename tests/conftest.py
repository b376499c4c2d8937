"""What all tests share: where modules come from, how many graphs are tried, and how golden files are renewed."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).parent
ROOT = TESTS.parent
GRAPHS_IN_A_PART = 64
FAST = "pytest.mark.fast"

# `python -m pytest` puts the root on the path, where a bare `import ir` would load a second copy of the package.
sys.path[:] = [str(TESTS), *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, TESTS))]

# Started in the background, a shell's children ignore Ctrl-C, and so would theirs: what is caught here is reset there.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("ci", derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write what the pipelines give into tests/golden/*.ir")
    parser.addoption("--graphs", type=int, default=500, help="how many random graphs go through whole pipelines")
    parser.addoption("--first", type=int, default=0, help="the graph to go on with, where a long run was interrupted")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The fast tier does not import the files of the others, and with them torch and TVM."""
    fast = config.getoption("markexpr").startswith("fast")
    return True if fast and collection_path.name.startswith("test_") and FAST not in collection_path.read_text() else None


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture
def graphs(request: pytest.FixtureRequest) -> int:
    """How many random graphs go through whole pipelines: tests that are not split into parts take a share of these."""
    return int(request.config.getoption("--graphs"))


@pytest.fixture
def trials(request: pytest.FixtureRequest) -> int:
    """How many graphs each rule is tried on."""
    return max(60, int(request.config.getoption("--graphs")) // 100)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Random graphs are tried in parts, so that workers share them and no test runs into its time limit."""
    if "seeds" in metafunc.fixturenames:
        first, count = (int(metafunc.config.getoption(option)) for option in ("--first", "--graphs"))
        parts = [range(start, min(start + GRAPHS_IN_A_PART, count)) for start in range(first, count, GRAPHS_IN_A_PART)]
        metafunc.parametrize("seeds", parts, ids=[str(part.start) for part in parts])
