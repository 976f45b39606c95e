"""Names that people give: DNS labels, because an actor's name is part of its host name."""

from __future__ import annotations

import re

from greenroom.core.errors import InvalidArgument

#: RFC 1123 label: at most 63 octets, lower-case letters, digits and inner hyphens.
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
#: `<port>--<actor>` in a host name selects a port, so an actor may not be called like that.
_PORT_PREFIX = re.compile(r"[0-9]+--")

DEFAULT_NAMESPACE = "default"


def check_label(kind: str, name: str) -> str:
    """Returns ``name`` if it is a DNS label.

    Raises:
        InvalidArgument: names the kind and the rule.
    """
    if not _LABEL.fullmatch(name):
        raise InvalidArgument(
            f"{kind} name {name!r} is not a DNS label: use 1 to 63 lower-case letters, digits and hyphens, "
            "starting and ending with a letter or digit",
            reason="INVALID_NAME",
        )
    return name


def check_actor_name(name: str) -> str:
    """As `check_label`, and not of the form ``<digits>--...``, which in a host name selects a port."""
    check_label("actor", name)
    if _PORT_PREFIX.match(name):
        raise InvalidArgument(
            f"actor name {name!r} may not start with digits and two hyphens: in a host name that selects a port",
            reason="INVALID_NAME",
        )
    return name


def split_ref(ref: str, default_namespace: str = DEFAULT_NAMESPACE) -> tuple[str, str]:
    """Splits ``name`` or ``namespace/name``; both parts are checked.

    Raises:
        InvalidArgument: a part is not a DNS label, or there are more than two.
    """
    namespace, slash, name = ref.partition("/")
    if not slash:
        namespace, name = default_namespace, ref
    return check_label("namespace", namespace), check_label("resource", name)
