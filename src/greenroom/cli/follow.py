"""Waits for operations, and shows meanwhile how far they are."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection
from typing import Any

import grpc

from greenroom.api import convert, errors
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api.client import Client
from greenroom.cli import kinds
from greenroom.cli.progress import Display, Several, on_terminal
from greenroom.core.errors import GreenroomError
from greenroom.core.records import Operation, OperationKind, OperationState

#: What takes no longer is not worth showing: it would only flicker.
PATIENCE_S = 1.0
#: How often it is asked how far they are: a person sees it move, and a server does not notice.
POLL_S = 0.5
POLL_TIMEOUT_S = 5.0


def follow(client: Client, operation_id: str, timeout_s: float | None, shown: Display) -> Operation | None:
    """Shows an operation until it has ended, if ``timeout_s`` is None however long that takes; returns it as it was
    last seen (still RUNNING: it was dropped), None when nothing was seen at all.

    Raises:
        DeadlineExceeded: it did not end in time (reason ``REQUEST_TIMEOUT``).
        NotFound: there is none.
    """
    operation: Operation | None = None
    request = pb.GetOperationRequest(id=operation_id)
    with shown, client.operations.WatchOperation(request, timeout=timeout_s) as stream:
        for message in stream:
            operation = convert.from_message(Operation, message)
            shown.update(operation)
    return operation


def running(client: Client, namespace: str) -> dict[str, Operation]:
    """The operations on actors that are under way, by ``namespace/name``; {} when the server does not say.
    ``namespace`` "" means all."""
    try:
        found = kinds.OPERATIONS.fetch_all(client, namespace, POLL_TIMEOUT_S, state=str(OperationState.RUNNING))
        return {str(op.key): op for op in found if op.kind is not OperationKind.PREPARE}
    except GreenroomError:
        return {}


class Patience:
    """Waits for calls that change actors. On a terminal it shows, from `PATIENCE_S` on, what holds up those that are
    not answered yet."""

    def __init__(self, client: Client, namespace: str) -> None:
        self._client, self._namespace = client, namespace
        self._since = time.monotonic()

    def result(self, future: Any, waiting: Collection[tuple[str, Any]]) -> Any:
        """What the call answers. ``waiting``: names and futures that are to be shown, this one among them; when there
        are none nothing is shown.

        Raises:
            GreenroomError: what the call was refused with.
        """
        if waiting and on_terminal():
            self._wait(future, waiting)
        try:
            return future.result()
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error, self._client.address) from None

    def _wait(self, future: Any, waiting: Collection[tuple[str, Any]]) -> None:
        done = threading.Event()
        future.add_done_callback(lambda _: done.set())
        if done.wait(max(0.0, self._since + PATIENCE_S - time.monotonic())):
            return
        with Several() as shown:
            while not done.is_set():
                operations = running(self._client, self._namespace)
                left = [name for name, one in waiting if not one.done()]
                shown.update({f"actor/{name}": operations.get(f"{self._namespace}/{name}") for name in left})
                done.wait(POLL_S)
