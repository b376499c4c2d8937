"""A tuple class of a model's, as it comes out of a loaded network."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from paring.frontends.records import TupleRecord
from paring.frontends.structure import Signature, Tree
from paring.ir import TensorType

pytestmark = pytest.mark.fast


def record() -> TupleRecord:
    return TupleRecord("Top", ("values", "count", "rest"), (1, 2, [3]))


def test_it_is_a_tuple_with_names() -> None:
    found = record()
    values, count, rest = found
    assert (values, count, rest) == found == (1, 2, [3])
    assert isinstance(found, tuple)
    assert (found.values, found.count, found.rest, found[1], len(found)) == (1, 2, [3], 2, 3)
    assert repr(found) == "Top(values=1, count=2, rest=[3])"
    assert found._asdict() == {"values": 1, "count": 2, "rest": [3]}
    assert not hasattr(found, "nothing")


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_it_can_be_copied_and_pickled(again: Callable[[Any], Any]) -> None:
    found = again(record())
    assert type(found) is TupleRecord
    assert found == record()
    assert found.rest is found[2]
    assert repr(found) == repr(record())


def test_one_given_back_as_an_input_is_taken() -> None:
    place = Tree("sequence", name="Top", keys=("a", "b"), children=(Tree("tensor", 0), Tree("constant", value=2)))
    call = Tree("tuple", children=(Tree("tuple", children=(place,)), Tree("dict", name="dict")))
    signature = Signature.from_json(Signature(("x",), (TensorType("float32", (3,)),), call, place).to_json())
    x = np.ones(3, "float32")
    result = signature.unflatten_outputs([x], like_torch=False)
    assert result.a is x
    assert signature.flatten_inputs((result,))[0] is x
