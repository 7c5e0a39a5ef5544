"""An attribute that is worked out when it is first asked for. Before Python 3.12 functools' has a lock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar, overload

__all__ = ["once"]

_Value = TypeVar("_Value")


class once(Generic[_Value]):
    """``functools.cached_property`` without its lock, which a fork in mid-read would leave locked for good.

    Threads that ask at the same moment may each work it out.
    """

    def __init__(self, work_out: Callable[[Any], _Value]) -> None:
        self._work_out = work_out
        self.__doc__ = work_out.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type) -> _Value: ...
    def __get__(self, instance: object | None, owner: type) -> Self | _Value:
        if instance is None:
            return self
        value = self._work_out(instance)
        # found there from now on: this class has no __set__
        instance.__dict__[self._name] = value
        return value
