"""From a request's host and headers to the actor that is meant. Pure."""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

from greenroom.core.errors import InvalidArgument, NotFound
from greenroom.core.names import check_actor_name, check_label, split_ref
from greenroom.core.records import Key

_HOST_PORT = re.compile(r"([^:\[\]]*)(?::[0-9]*)?")
_PORT_PREFIX = re.compile(r"([0-9]+)--(.+)")
MAX_PORT = 65535
_PRIVATE = frozenset({"localhost", "local", "internal", "test", "svc"})


class Route(NamedTuple):
    """``port`` 0 means the port that the actor's endpoint names."""

    key: Key
    port: int = 0


def by_header(actor: str, port: str = "") -> Route:
    """``Greenroom-Actor: [namespace/]name`` and, if given, ``Greenroom-Port``.

    Raises:
        NotFound: reason ``NO_ROUTE``.
    """
    try:
        namespace, name = split_ref(actor)
        check_actor_name(name)
    except InvalidArgument as e:
        raise _no_route(f"header Greenroom-Actor: {actor!r} names no actor ({e.message})") from e
    return Route(Key(namespace, name), _port(port) if port else 0)


def by_host(host: str, domain: str) -> Route:
    """``[<port>--]<actor>.<namespace>.<domain>[:<any>]``, in any case, with or without a final dot.

    Raises:
        NotFound: reason ``NO_ROUTE``; says how a host name has to look.
    """
    match = _HOST_PORT.fullmatch(host)
    name = match[1].lower().removesuffix(".") if match else ""
    labels = name.removesuffix(f".{domain}").split(".")
    if not name.endswith(f".{domain}") or len(labels) != 2:
        raise _no_route(f"host {host!r} names no actor")
    actor, namespace = labels
    port = 0
    if prefix := _PORT_PREFIX.fullmatch(actor):
        port, actor = _port(prefix[1]), prefix[2]
    try:
        key = Key(check_label("namespace", namespace), check_actor_name(actor))
    except InvalidArgument as e:
        raise _no_route(f"host {host!r} names no actor ({e.message})") from e
    return Route(key, port)


def owner_of(host: str, domain: str) -> Key | None:
    """The actor whose name a host is; None: no actor's."""
    try:
        return by_host(host, domain).key
    except NotFound:
        return None


def is_nobodys(host: str, domain: str) -> bool:
    """Whether nobody on the internet can have a host name lead to where he likes: it is an address, has no dot, is
    below ``domain``, or below a name that is never given away. Source: RFC 6761, RFC 6762, and ICANN for
    ``internal``."""
    match = _HOST_PORT.fullmatch(host)
    name = match[1].lower().removesuffix(".") if match else host.partition("]")[0].lstrip("[")
    labels = name.split(".")
    if (len(labels) == 1 and ":" not in name) or f".{name}".endswith(f".{domain}") or labels[-1] in _PRIVATE:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _port(text: str) -> int:
    port = int(text) if text.isascii() and text.isdigit() and len(text) <= 5 else 0
    if not 0 < port <= MAX_PORT:
        raise _no_route(f"port {text!r} is not a number from 1 to {MAX_PORT}")
    return port


def _no_route(what: str) -> NotFound:
    return NotFound(
        f"{what}; call http://ACTOR.NAMESPACE.DOMAIN/ or http://PORT--ACTOR.NAMESPACE.DOMAIN/, "
        "or send the header 'Greenroom-Actor: NAMESPACE/ACTOR'",
        reason="NO_ROUTE",
    )
