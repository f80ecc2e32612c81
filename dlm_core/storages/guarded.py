"""Adapters of other people in use: whatever they raise is told in the port's words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from dlm_core.errors import DlmError, StorageUnavailableError
from dlm_core.storages.port import Readable, ReadStream
from dlm_core.storages.streams import StreamOver


class Guarded:
    """An adapter of other people: what it raises that is no error of ours is an outage of its
    storage, which fails what is done with that, and ends no work on others."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    @property
    def concurrency(self) -> int:
        found: int = self.inner.concurrency
        return found

    @concurrency.setter
    def concurrency(self, value: int) -> None:
        self.inner.concurrency = value

    def __getattr__(self, attribute: str) -> Any:
        found = getattr(self.inner, attribute)
        return partial(self._call, found) if callable(found) else found

    def _call(self, call: Callable[..., Any], *arguments: Any) -> Any:
        through: list[BaseException] = []
        result = self._told(call, through, *(_handed(one, through) for one in arguments))
        if hasattr(result, "stamp"):  # such as files have iterate, too
            return _Stream(result, self)
        return self._each(result) if isinstance(result, Iterator) else result

    def _told(self, call: Callable[..., Any], through: list[BaseException], *arguments: Any) -> Any:
        """``call``; what came ``through`` it from what it was handed goes on as it is."""
        try:
            return call(*arguments)
        except DlmError:
            raise
        except Exception as error:
            if any(error is one for one in through):
                raise
            told = f"its adapter failed: {type(error).__name__}: {' '.join(str(error).split())}"
            raise StorageUnavailableError(storage=self.inner.name, message=told) from error

    def _each(self, found: Iterator[Any]) -> Iterator[Any]:
        end = object()
        while (one := self._told(next, [], found, end)) is not end:
            yield one


class _Stream(StreamOver):
    """A stream of such an adapter."""

    def __init__(self, stream: ReadStream, owner: Guarded) -> None:
        super().__init__(stream)
        self.read = partial(owner._call, stream.read)
        self.stamp = partial(owner._call, stream.stamp)  # type: ignore[method-assign]
        self.close = partial(owner._call, stream.close)  # type: ignore[method-assign]


class _Source:
    """Bytes that are handed to such an adapter."""

    def __init__(self, source: Readable, through: list[BaseException]) -> None:
        self.read = partial(_noting, source.read, through)


def unguarded(storage: Any) -> Any:
    """The adapter itself."""
    return storage.inner if isinstance(storage, Guarded) else storage


def _handed(argument: Any, through: list[BaseException]) -> Any:
    """What a call is given, so that an error of it is known from one of the adapter's."""
    if isinstance(argument, Guarded):
        return argument.inner
    if hasattr(argument, "read") and not hasattr(argument, "stat"):
        return _Source(argument, through)
    return partial(_noting, argument, through) if callable(argument) else argument


def _noting(call: Callable[..., Any], through: list[BaseException], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except BaseException as error:
        through.append(error)
        raise
