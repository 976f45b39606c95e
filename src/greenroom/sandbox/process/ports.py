"""Ports of the loopback interface for actors that share the host's network."""

from __future__ import annotations

import socket
import zlib

from greenroom.core.errors import ResourceExhausted

HOST = "127.0.0.1"
#: Below the range that Linux takes ports for outgoing connections from (32768 on).
FIRST, LAST = 20000, 32767


class Ports:
    """Gives each actor a port of its own, in turn.

    A port that one actor had is never given to another while the agent lives, so an old endpoint can't lead to somebody
    else; the same actor gets its own again. Agents of one machine begin at different places, by what they are called
    (``agent``: with the server that they belong to, since each has a ``default-0``).
    """

    def __init__(self, agent: str, first: int = FIRST, last: int = LAST) -> None:
        self._range = range(first, last + 1)
        self._next = zlib.crc32(agent.encode()) % len(self._range)
        self._owner: dict[int, str] = {}
        self._last_of: dict[str, int] = {}
        self._in_use: set[int] = set()

    def take(self, actor_uid: str) -> int:
        """A port that nobody listens on now.

        Raises:
            ResourceExhausted: all were given out (reason ``PORTS_EXHAUSTED``).
        """
        port = self._last_of.get(actor_uid)
        if port is None or port in self._in_use or not _is_free(port):
            port = self._new()
        self.keep(port, actor_uid)
        return port

    def _new(self) -> int:
        for _ in self._range:
            port = self._range[self._next]
            self._next = (self._next + 1) % len(self._range)
            if port not in self._owner and _is_free(port):
                return port
        raise ResourceExhausted(
            f"this worker has given out all its {len(self._range)} ports: restart its agent, its actors stay",
            reason="PORTS_EXHAUSTED",
        )

    def keep(self, port: int, actor_uid: str) -> None:
        """Marks a port as this actor's, in use."""
        self._owner[port] = actor_uid
        self._last_of[actor_uid] = port
        self._in_use.add(port)

    def give_back(self, port: int) -> None:
        """Nothing listens there any more; the port stays its actor's."""
        self._in_use.discard(port)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger are no hindrance
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
