"""When an input shape's memory on the GPU is given back: now, or with the last that holds it, and once."""

import contextlib
import gc

import pytest

from vit_convert.engine.backend import cuda
from vit_convert.engine.runtime.prepared import Prepared


@pytest.fixture
def prepared(monkeypatch):
    monkeypatch.setattr(cuda, "use_context", lambda: None)

    def make():
        held, freed = contextlib.ExitStack(), []
        held.callback(lambda: freed.append(1))
        return Prepared(0, (4, 8), None, {}, None, "", held), freed

    return make


def test_now_and_once(prepared):
    found, freed = prepared()
    assert not freed
    found.close()
    assert freed == [1]
    found.close()
    del found
    gc.collect()
    assert freed == [1]


def test_with_the_last_that_holds_it(prepared):
    found, freed = prepared()
    also = [found]
    del found
    gc.collect()
    assert not freed
    also.clear()
    gc.collect()
    assert freed == [1]


def test_two_of_one_shape_are_two(prepared):
    first, second = prepared()[0], prepared()[0]
    assert first != second and len({first, second}) == 2
