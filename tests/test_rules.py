"""Every rule and every pass keeps its contract where it fires, fires often enough, and its wrong variants are found out."""

from __future__ import annotations

import dataclasses

import pytest
from planting import PASS_PLANTERS, PLANTERS, RULES
from wrong_passes import WRONG_PASSES
from wrong_variants import WRONG

from paring.ir.errors import ParingError
from paring.passes.base import Pass
from paring.passes.pattern import Rule
from paring.passes.pipelines import PASSES, parse_pipeline
from paring.testing import Plant, check_pass

pytestmark = pytest.mark.fast

TRIALS = 60


def each_rule() -> list[tuple[str, Rule, Plant]]:
    """Each rule with the planter of its pattern; rules of one name have their planters in the same order."""
    found = []
    for rules in RULES.values():
        seen: dict[str, int] = {}
        for rule in rules:
            number = seen[rule.name] = seen.get(rule.name, -1) + 1
            planters = PLANTERS.get(rule.name, ())
            if number < len(planters):
                found.append((f"{rule.name}-{number}", rule, planters[number]))
    return found


EACH = each_rule()
MUTANTS = [
    (f"{name}-{wrong.__name__}-{i}", dataclasses.replace(rule, rewrite=wrong), plant)
    for name, rule, plant in EACH
    for i, wrong in enumerate(WRONG.get(rule.name, ()))
]
WRONG_RUNS = [(f"{name}-{i}", name, wrong) for name, variants in WRONG_PASSES.items() for i, wrong in enumerate(variants)]


def test_every_rule_has_planters_and_wrong_variants() -> None:
    names = [rule.name for rules in RULES.values() for rule in rules]
    assert not sorted(n for n in set(names) if len(PLANTERS.get(n, ())) != names.count(n)), "one planter for each pattern"
    assert not sorted(set(names) - set(WRONG)), "rules without wrong variants"
    assert not sorted((set(PLANTERS) | set(WRONG)) - set(names)), "leftovers of rules that are gone"


def test_every_pass_is_covered() -> None:
    covered = {text.partition("{")[0] for text in (*RULES, *PASS_PLANTERS)}
    assert covered == set(PASSES)
    for text in RULES:
        (transformation,) = parse_pipeline(text)
        assert [r.rewrite.__name__ for r in transformation.rules()] == [r.rewrite.__name__ for r in RULES[text]]
    for text in PASS_PLANTERS:
        assert not parse_pipeline(text)[0].rules()
    assert set(WRONG_PASSES) == set(PASS_PLANTERS)


def test_every_rule_states_its_formula() -> None:
    lacking = [rule.name for rules in RULES.values() for rule in rules if "->" not in rule.formula]
    assert not lacking


@pytest.mark.parametrize(("rule", "plant"), [e[1:] for e in EACH], ids=[e[0] for e in EACH])
def test_a_rule_keeps_its_contract(rule: Rule, plant: Plant, trials: int) -> None:
    report = check_pass(rule, plant=plant, trials=trials, size=4)
    assert report.fired >= 50


@pytest.mark.parametrize(("rule", "plant"), [m[1:] for m in MUTANTS], ids=[m[0] for m in MUTANTS])
def test_a_wrong_rule_is_found_out(rule: Rule, plant: Plant) -> None:
    with pytest.raises(ParingError) as caught:
        check_pass(rule, plant=plant, trials=TRIALS, size=4, shrinking=False)
    assert "vacuous" not in str(caught.value)


@pytest.mark.parametrize("text", PASS_PLANTERS)
def test_a_pass_keeps_its_contract(text: str, trials: int) -> None:
    (transformation,) = parse_pipeline(text)
    report = check_pass(transformation, plant=PASS_PLANTERS[text], trials=trials, size=6)
    assert report.fired >= 50


@pytest.mark.parametrize(("text", "wrong"), [w[1:] for w in WRONG_RUNS], ids=[w[0] for w in WRONG_RUNS])
def test_a_wrong_pass_is_found_out(text: str, wrong: Pass) -> None:
    with pytest.raises(ParingError) as caught:
        check_pass(wrong, plant=PASS_PLANTERS[text], trials=80, size=6, shrinking=False)
    assert "vacuous" not in str(caught.value)


def test_passes_made_of_rules_keep_their_contracts() -> None:
    for text, rules in RULES.items():
        (transformation,) = parse_pipeline(text)
        plants = [plant for rule in rules for plant in PLANTERS[rule.name]]
        check_pass(transformation, plant=plants, trials=60, size=4)


def test_a_vacuous_test_is_an_error() -> None:
    (rule,) = [rule for rule in RULES["canonicalize"] if rule.name == "layout-to-reshape"]
    with pytest.raises(ParingError, match="vacuous") as caught:
        check_pass(rule, trials=5)
    assert "it fired 0 times in 10 graphs, 50 are wanted" in str(caught.value)


def test_a_failure_is_shrunk_to_a_few_nodes() -> None:
    name, rule, plant = MUTANTS[next(i for i, m in enumerate(MUTANTS) if m[0].startswith("merge-transposes"))]
    with pytest.raises(ParingError) as caught:
        check_pass(rule, plant=plant, trials=TRIALS, size=12)
    text = str(caught.value)
    assert text.count(" = ") <= 5, name
    assert text.count("transpose(") == 2
