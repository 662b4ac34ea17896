"""Annotations of the package are checked while tests run, and a wrong one is found (tests/annotations.py)."""

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from jaxtyping import TypeCheckError

from hooklens.precision import widen
from tests.annotations import ONE_IN, check_annotations, count_anew, unchecked

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="annotations are checked from Python 3.11 on")

# Every function is right for whole numbers and for float tensors of one axis.
MODULE = """
from dataclasses import dataclass
from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor

Row = Float[Tensor, "pos"]
calls = 0


def takes(x: int | Row) -> None: ...


def gives(x) -> int | Row:
    return x


def agree(x, y: Float[Tensor, "pos"] = None, *, other: Float[Tensor, "pos"] = None) -> None: ...


def inside(x):
    def within(y: int | Row) -> None: ...
    within(x)


def yields(x: int | Row) -> Iterator[int]:
    yield 1


def takes_all(x: list[int]) -> None: ...


class Point:
    def takes(self, x: int | Row) -> None: ...

    @classmethod
    def of(cls, x: int | Row) -> None: ...

    @staticmethod
    def plain(x: int | Row) -> None: ...

    @property
    def value(self) -> int | Row:
        return self.x


@dataclass
class Field:
    x: int | Row


@dataclass
class Numbers:
    x: list[int]


@dataclass
class MoreNumbers(Numbers):
    def __init__(self, x: list[int]) -> None:
        super().__init__([])
        self.x = x
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    folder = tmp_path_factory.mktemp("annotated")
    (folder / "annotated_for_a_test.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    with check_annotations("annotated_for_a_test"):
        yield importlib.import_module("annotated_for_a_test")
    sys.path.remove(str(folder))
    del sys.modules["annotated_for_a_test"]


def read_value(module: ModuleType, x: object) -> None:
    point = module.Point()
    point.x = x
    _ = point.value


CALLS: dict[str, Callable[[ModuleType, object], object]] = {
    "argument": lambda module, x: module.takes(x),
    "keyword": lambda module, x: module.takes(x=x),
    "returned": lambda module, x: module.gives(x),
    "function within another": lambda module, x: module.inside(x),
    "generator": lambda module, x: list(module.yields(x)),
    "method": lambda module, x: module.Point().takes(x),
    "class method": lambda module, x: module.Point.of(x),
    "static method": lambda module, x: module.Point.plain(x),
    "property": read_value,
    "field": lambda module, x: module.Field(x),
}


@pytest.mark.parametrize("wrong", [0.5, torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64)], ids=repr)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_wrong_kind_is_found_after_any_number_of_right_calls(module, call, wrong) -> None:
    for x in (*range(ONE_IN - 1), *[torch.zeros(3)] * (ONE_IN - 1)):
        call(module, x)

    if call in (read_value, CALLS["returned"]):
        # What is returned for the same kinds of arguments is seen in some of the calls.
        results = [_fails(lambda: call(module, wrong)) for _ in range(ONE_IN)]
        assert any(results)
        return
    for _ in range(4):
        with pytest.raises(TypeCheckError):
            call(module, wrong)
    with unchecked():
        call(module, wrong)


def _fails(call: Callable[[], object]) -> bool:
    try:
        call()
    except TypeCheckError:
        return True
    return False


def test_axes_that_disagree_are_found_after_any_number_of_right_calls(module) -> None:
    for _ in range(200):
        module.agree(None, torch.zeros(3), other=torch.zeros(3))

    with pytest.raises(TypeCheckError):
        module.agree(None, torch.zeros(3), other=torch.zeros(1))


def test_some_later_calls_are_checked(module) -> None:
    module.takes_all([0])

    assert any(_fails(lambda: module.takes_all(["a"])) for _ in range(ONE_IN))
    for kind in (module.Numbers, module.MoreNumbers):
        assert _fails(lambda kind=kind: kind(["a"]))


def test_each_file_begins_anew(module) -> None:
    module.takes_all([0])
    count_anew()

    with pytest.raises(TypeCheckError):
        module.takes_all(["a"])


def test_most_calls_of_a_kind_are_let_through(module) -> None:
    for numbers in [[0]] + [["a"]] * (ONE_IN - 1):
        module.takes_all(numbers)
        module.Numbers(numbers)
        module.MoreNumbers(numbers)


def test_threads_are_checked(module) -> None:
    found = []
    threads = [threading.Thread(target=lambda: found.append(_fails(lambda: module.takes(0.5)))) for _ in range(4)]
    for thread in threads:
        thread.start()
        thread.join()

    assert found == [True] * 4


def test_the_package_is_checked() -> None:
    with pytest.raises(TypeCheckError):
        widen(torch.zeros(2, dtype=torch.int64))
    with unchecked():
        widen(torch.zeros(2, dtype=torch.int64))


def test_what_is_checked_keeps_its_name_and_text(module) -> None:
    assert module.Point.takes.__qualname__ == "Point.takes"
    assert widen.__doc__ is not None
    assert widen.__doc__.startswith("The float32 copy")
