"""How a network is called, as plain data: records, constants of any value, and data that contradicts itself."""

from __future__ import annotations

import copy
import json
import math
import pickle
from typing import Any

import numpy as np
import pytest

from paring.frontends.structure import Record, Signature, Tree
from paring.ir import TensorType
from paring.ir.errors import ArtifactError, InputError

pytestmark = pytest.mark.fast

FLOATS = TensorType("float32", (2,))
X = np.ones(2, "float32")


def signature(*inputs: Tree, tensors: int, outputs: Tree | None = None) -> Signature:
    labels = tuple(f"x{i}" for i in range(tensors))
    call = Tree("tuple", children=(Tree("tuple", children=inputs), Tree("dict", name="dict")))
    return Signature(labels, (FLOATS,) * tensors, call, outputs or Tree("tensor", 0))


def through_json(given: Signature) -> Signature:
    return Signature.from_json(json.loads(json.dumps(given.to_json(), allow_nan=False)))


def record() -> Record:
    return Record("Output", {"values": 1, "keys": 2, "items": 3, "class_name": 4, "x": [5]})


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_a_record_can_be_copied_and_pickled(again: Any) -> None:
    found = again(record())
    assert type(found) is Record
    assert dict(found) == dict(record())
    with pytest.raises(AttributeError, match="Plain has no entry 'y'"):
        _ = again(Record("Plain", {"x": 1})).y


def test_a_bare_record_has_no_entries() -> None:
    bare = Record.__new__(Record)
    assert not hasattr(bare, "x")
    assert bare == {}


def test_entries_win_over_the_methods_of_a_dict() -> None:
    found = record()
    assert (found.values, found.keys, found.items, found.class_name, found.x) == (1, 2, 3, 4, [5])
    assert (found["values"], found[0], found[4]) == (1, 1, [5])
    assert list(found) == ["values", "keys", "items", "class_name", "x"]
    assert {**found} == dict(found)
    assert list(Record("Plain", {"x": 1}).values()) == [1]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 2.5, -0.0, "inf", "nan", None, True, 3])
def test_constants_of_any_value_go_through_json(value: Any) -> None:
    given = signature(Tree("tensor", 0), Tree("constant", value=value), tensors=1)
    loaded = through_json(given)
    assert repr(loaded) == repr(given)
    assert np.array_equal(loaded.flatten_inputs((X, value))[0], X)
    with pytest.raises(InputError, match=r"input 1 is 7\.5"):
        loaded.flatten_inputs((X, 7.5))


@pytest.mark.parametrize("odd", ["infinity", "1.5", 1.5, None, ["inf"], {}])
def test_other_words_for_a_float_are_refused(odd: Any) -> None:
    data = signature(Tree("tensor", 0), Tree("constant", value=math.inf), tensors=1).to_json()
    data["inputs"]["children"][0]["children"][1] = {"kind": "constant", "float": odd, "value": []}
    with pytest.raises(ArtifactError):
        Signature.from_json(data)


@pytest.mark.parametrize("places", [(0,), (1,), (0, 0), (0, 2), (0, 1, 1), ()])
def test_each_tensor_has_exactly_one_place_among_the_inputs(places: tuple[int, ...]) -> None:
    given = signature(*(Tree("tensor", place) for place in places), tensors=2)
    with pytest.raises(ArtifactError, match="contradicts itself"):
        through_json(given)
    through_json(signature(Tree("tensor", 1), Tree("list", children=(Tree("tensor", 0),)), tensors=2))


def test_a_key_that_is_a_bool_is_refused() -> None:
    outputs = Tree("dict", name="dict", keys=(True,), children=(Tree("tensor", 0),))
    with pytest.raises(ArtifactError, match="damaged"):
        through_json(signature(Tree("tensor", 0), tensors=1, outputs=outputs))
