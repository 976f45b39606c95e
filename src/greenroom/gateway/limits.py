"""Every bound of the gateway, with its reason. Nothing here is ever "unlimited"; a deployment changes what it must."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

#: A deadline that does not come.
NEVER: Final = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sizes in bytes, times in seconds, counts above zero."""

    #: One request or response head. Node and nginx allow 16 to 32 KiB; cookies and tokens need some.
    head_bytes: int = 32 << 10
    #: What is read of a client ahead of what its actor takes: pipelined requests, and the body of a held request.
    read_ahead_bytes: int = 64 << 10
    #: Bodies of all held requests together, so that held uploads can't fill the memory of the process.
    held_body_bytes: int = 64 << 20
    #: When a peer has not taken this much, its other side is no longer read.
    write_buffer_bytes: int = 64 << 10
    #: Requests that wait for one actor: above what its first second could serve, waiting is of no use.
    held_per_actor: int = 512
    #: Requests that wait for any actor: a second's worth of wake-ups of a whole cluster.
    held_total: int = 8192
    #: A request is held at most this long for its actor, a cold start with an image download included.
    hold_s: float = 300.0
    #: Client connections of the process; more are told so and closed.
    clients: int = 16384
    #: Connections to one actor, idle and busy; a small server in a sandbox takes no more.
    connections_per_actor: int = 1024
    #: Idle connections kept per actor and port: enough for a browser or two.
    idle_connections_per_actor: int = 32
    #: Idle connections to an actor are closed after this long: below the keep-alive time of uvicorn, Node and Go
    #: servers (5 s and more), so that they rarely close one while a request is on its way.
    upstream_idle_s: float = 4.0
    #: A request that can't be repeated takes an idle connection only if it was in use this recently, else a new one.
    fresh_enough_s: float = 1.0
    #: TCP handshake with an actor on this machine or rack: more means that it is not there.
    connect_s: float = 5.0
    #: From the whole request sent to the response's head received. Agents think long.
    answer_s: float = 900.0
    #: No progress for this long in a request's body, or in what a client should take: the peer is gone.
    stall_s: float = 120.0
    #: From a head's first byte to its last.
    head_s: float = 30.0
    #: A client connection without a request.
    keep_alive_s: float = 75.0
    #: Interim responses (1xx) before one response; more is a flood.
    interim_responses: int = 8
    #: One request is sent through another wake-up at most this often (its actor is put to sleep again each time).
    rewakes: int = 3
    #: What is still read, and dropped, of a client that was refused, so that it sees the answer instead of a reset.
    linger_bytes: int = 1 << 20
    linger_s: float = 2.0
