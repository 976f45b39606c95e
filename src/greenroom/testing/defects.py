"""Under test a defect that the operator would only report, and go on, ends what it happened in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from greenroom.operator import failures


@contextmanager
def raised() -> Iterator[None]:
    def report(error: Exception) -> None:
        raise error

    with mock.patch.object(failures, "report", report):
        yield
