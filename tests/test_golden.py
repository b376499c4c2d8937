"""Golden files: what a pipeline makes of a graph, as text. Renew them with `pytest tests/test_golden.py --update-golden`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from planting import RULES

from paring.ir import Const, parse, show
from paring.ir.ops import pack
from paring.passes.contract import check
from paring.passes.manager import Result, run_pipeline
from paring.passes.pipelines import PASSES, parse_pipeline
from paring.testing import check_round_trip, random_inputs

pytestmark = pytest.mark.fast

FOLDER = Path(__file__).parent / "golden"
FILES = sorted(FOLDER.glob("*.ir"))
CUT = "# ----\n"
NOT = ".not"
# Constants that are too large to be shown: 3x3 kernels of two channels.
LARGE = {
    Const(array).digest: array
    for array in (
        pack.PackConvWeight("OIHW1i2o2i").ref(
            np.stack([np.stack([np.arange(1, 10), np.zeros(9)]), np.stack([np.zeros(9), np.arange(9) // 4 - 1])])
            .reshape(2, 2, 3, 3)
            .astype(np.int8)
        ),
    )
}


@dataclass(frozen=True)
class Golden:
    """`PASS.CASE.ir`: the pipeline and a remark as comments, the graph, a cut, the graph that is expected."""

    path: Path

    @property
    def parts(self) -> tuple[str, str, str]:
        text = self.path.read_text()
        before, cut, after = text.partition(CUT)
        assert cut, f"{self.path.name} has no line {CUT!r}"
        head = before[: before.index("graph(")]
        return head, before[len(head) :], after

    @property
    def pipeline(self) -> str:
        first = self.parts[0].splitlines()[0]
        assert first.startswith("# pipeline: ")
        return first.removeprefix("# pipeline: ")

    def run(self) -> Result:
        return run_pipeline(parse(self.parts[1], LARGE), parse_pipeline(self.pipeline))


@pytest.mark.parametrize("path", FILES, ids=[p.stem for p in FILES])
def test_golden(path: Path, update_golden: bool) -> None:
    golden = Golden(path)
    head, given, expected = golden.parts
    graph = parse(given, LARGE)
    result = golden.run()
    if update_golden:
        expected = show(result.graph)
        path.write_text(f"{head}{show(graph)}{CUT}{expected}")
    else:
        assert show(graph) == given, "the graph is not in its printed form: run with --update-golden"
    assert len(head.splitlines()) >= 2, "say what the file shows"
    assert show(result.graph) == expected
    check_round_trip(graph)
    check_round_trip(result.graph)
    for exact in (True, False):
        for seed in range(3):
            arrays = random_inputs(graph, np.random.default_rng(seed), exact)
            check(result.ledger.contract, graph, result.graph, arrays, exact=exact, who=path.stem)


CASES = [(text.partition("{")[0], rule.name) for text, rules in RULES.items() for rule in rules]


@pytest.mark.parametrize(("name", "rule"), sorted(set(CASES)))
def test_a_rule_fires_where_it_must_and_nowhere_else(name: str, rule: str) -> None:
    """`PASS.RULE.ir` shows it firing, `PASS.RULE.not.ir` near misses."""
    fires, misses = (Golden(FOLDER / f"{name}.{rule}{suffix}.ir") for suffix in ("", NOT))
    for golden in (fires, misses):
        assert golden.path.exists(), f"write {golden.path}"
        assert golden.pipeline.partition("{")[0] == name
    assert any(rule in entry.rewrites for entry in fires.run().ledger.entries)
    assert not any(rule in entry.rewrites for entry in misses.run().ledger.entries)


def test_every_pass_has_a_golden_file() -> None:
    assert {name.partition(".")[0] for name in (p.name for p in FILES)} >= set(PASSES)
