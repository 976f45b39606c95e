"""What a spec may hold: ranges and forms that the types of the records don't say. Pure.

The server refuses by these rules and the command line shows the same before anything is sent. They need no I/O, so
whether an image or a backend exists is found out later.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from greenroom.core.errors import GreenroomError, InvalidArgument
from greenroom.core.names import check_label
from greenroom.core.records import IMAGE_PORTS, PoolSpec, TemplateSpec
from greenroom.core.words import MAX_ARGUMENT_BYTES, MAX_ARGUMENTS, is_too_long
from greenroom.images import reference
from greenroom.images.config import signal_number

MAX_REPLICAS = 64
MAX_SLOTS = 10_000
#: Ports of one actor; each may be routed to, and nobody has more than a few.
MAX_PORTS = 16
#: The least that the smallest process with a sandbox around it was seen to start in.
MIN_MEMORY_BYTES = 4 << 20
#: Far above any machine; catches a size given in the wrong unit.
MAX_MEMORY_BYTES = 16 << 40
MAX_CPUS = 1024.0
MAX_PIDS = 1 << 22  # the kernel's own limit
#: Snapshots of one actor: what it needs, and what one can still look through.
MIN_KEPT, MAX_KEPT = 2, 1000
MAX_DURATION_S = 10 * 365 * 86400.0
MAX_LABELS = 64
MAX_REQUEST_ID_CHARS = 128

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
#: As Kubernetes': an optional DNS prefix, then at most 63 word characters.
_LABEL_KEY = re.compile(r"([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
LABEL_RULE = "use letters, digits, '-', '_' and '.', at most 63 characters, starting and ending with a letter or digit"


class Violation(NamedTuple):
    """``path``: field names of the record, keys and indices, below ``spec``."""

    path: tuple[str | int, ...]
    message: str

    def __str__(self) -> str:
        return f"{join(('spec', *self.path))}: {self.message}"


def join(path: tuple[str | int, ...]) -> str:
    """``("spec", "ports", 0)`` -> ``spec.ports[0]``"""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


def template_spec(spec: TemplateSpec) -> list[Violation]:
    return list(_template(spec))


def pool_spec(spec: PoolSpec) -> list[Violation]:
    return list(_pool(spec))


def refuse(kind: str, name: str, violations: list[Violation]) -> None:
    """Raises:
    InvalidArgument: there is one; the message shows the first, ``metadata`` has the field.
    """
    if violations:
        more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
        raise InvalidArgument(
            f"{kind} {name}: {violations[0]}{more}",
            reason="INVALID_SPEC",
            metadata={"field": join(("spec", *violations[0].path))},
        )


def _template(spec: TemplateSpec) -> Iterator[Violation]:
    if not spec.image or spec.image != spec.image.strip() or "\n" in spec.image:
        yield Violation(("image",), "must be an image reference, for example docker.io/library/python:3.11-slim")
    else:
        try:
            reference.parse(spec.image)
        except InvalidArgument as error:
            yield Violation(("image",), error.message)
    yield from _arguments("command", spec.command)
    yield from _arguments("args", spec.args)
    yield from _environment(spec.env)
    yield from _directory("workdir", spec.workdir)
    if spec.stop_signal and signal_number(spec.stop_signal) is None:
        yield Violation(("stop_signal",), f"is no signal: {spec.stop_signal!r}; SIGTERM, TERM or 15 would be")
    yield from _ports(spec)
    yield from _between(("resources", "memory_bytes"), spec.resources.memory_bytes, MIN_MEMORY_BYTES, MAX_MEMORY_BYTES)
    yield from _between(("resources", "cpus"), spec.resources.cpus, 0.001, MAX_CPUS)
    yield from _between(("resources", "pids"), spec.resources.pids, 1, MAX_PIDS)
    yield from _name(("pool",), "pool", spec.pool)
    yield from _selector(spec.worker_selector)
    yield from _between(("idle_timeout_s",), spec.idle_timeout_s, 0, MAX_DURATION_S)
    yield from _between(("retention", "keep_last"), spec.retention.keep_last, MIN_KEPT, MAX_KEPT)
    yield from _between(("retention", "keep_for_s"), spec.retention.keep_for_s, 0, MAX_DURATION_S)


def _ports(spec: TemplateSpec) -> Iterator[Violation]:
    if len(spec.ports) > MAX_PORTS:
        yield Violation(("ports",), f"at most {MAX_PORTS} ports")
    for index, port in enumerate(() if spec.ports == IMAGE_PORTS else spec.ports):
        yield from _between(("ports", index), port, 1, 65535)
        if port in spec.ports[:index]:
            yield Violation(("ports", index), f"port {port} is there twice")
    probe = spec.readyz
    yield from _between(("readyz", "port"), probe.port, 0, 65535)
    yield from _between(("readyz", "timeout_s"), probe.timeout_s, 0.1, MAX_DURATION_S)
    if not probe.path.startswith("/") or any(c.isspace() for c in probe.path):
        yield Violation(("readyz", "path"), f"must start with / and hold no space, not {probe.path!r}")


def _pool(spec: PoolSpec) -> Iterator[Violation]:
    yield from _between(("replicas",), spec.replicas, 0, MAX_REPLICAS)
    yield from _between(("slots",), spec.slots, 1, MAX_SLOTS)
    yield from _name(("backend",), "backend", spec.backend)


def _between(path: tuple[str | int, ...], value: float, least: float, most: float) -> Iterator[Violation]:
    if not least <= value <= most:  # also catches NaN
        shown = _mebibytes if str(path[-1]).endswith("_bytes") else "{:g}".format
        yield Violation(path, f"must be between {shown(least)} and {shown(most)}, not {shown(value)}")


def _mebibytes(value: float) -> str:
    return f"{value / (1 << 20):g}Mi"


def _arguments(field: str, given: tuple[str, ...]) -> Iterator[Violation]:
    if len(given) > MAX_ARGUMENTS:
        yield Violation((field,), f"at most {MAX_ARGUMENTS} arguments")
    for index, argument in enumerate(given[:MAX_ARGUMENTS]):
        yield from _argument((field, index), argument)


def _environment(given: Mapping[str, str]) -> Iterator[Violation]:
    for name, value in given.items():
        if not _ENV_NAME.fullmatch(name):
            yield Violation(("env", name), "is not a name of an environment variable")
        yield from _argument(("env", name), value)


def _directory(field: str, given: str) -> Iterator[Violation]:
    if given and not given.startswith("/"):
        yield Violation((field,), f"must be an absolute path, not {given!r}")
    yield from _argument((field,), given)


def _argument(path: tuple[str | int, ...], value: str) -> Iterator[Violation]:
    if "\0" in value:
        yield Violation(path, "may not hold a NUL character")
    if is_too_long(value):
        yield Violation(path, f"at most {MAX_ARGUMENT_BYTES} bytes")


def _selector(wanted: Mapping[str, str]) -> Iterator[Violation]:
    if len(wanted) > MAX_LABELS:
        yield Violation(("worker_selector",), f"at most {MAX_LABELS} labels")
    for key, value in wanted.items():
        if not _is_label(key, value):
            yield Violation(("worker_selector", key), f"label {key}={value} is not valid: {LABEL_RULE}")


def _name(path: tuple[str | int, ...], kind: str, name: str) -> Iterator[Violation]:
    try:
        check_label(kind, name)
    except GreenroomError as error:
        yield Violation(path, error.message)


def labels(given: Mapping[str, str], what: str = "label") -> dict[str, str]:
    """Raises `InvalidArgument` (reason ``INVALID_LABEL``) unless they are labels as Kubernetes has them. ``what``: how
    the message calls one of them."""
    if len(given) > MAX_LABELS:
        raise InvalidArgument(f"{len(given)} {what}s are too many: at most {MAX_LABELS}", reason="INVALID_LABEL")
    for key, value in given.items():
        if not _is_label(key, value):
            raise InvalidArgument(f"{what} {key}={value} is not valid: {LABEL_RULE}", reason="INVALID_LABEL")
    return dict(given)


def _is_label(key: str, value: str) -> bool:
    return _LABEL_KEY.fullmatch(key) is not None and _LABEL_VALUE.fullmatch(value) is not None


def tag(given: str) -> str:
    """Raises `InvalidArgument` unless it can be a snapshot's tag."""
    if not given or not _LABEL_VALUE.fullmatch(given):
        raise InvalidArgument(f"tag {given!r} is not valid: {LABEL_RULE}", reason="INVALID_TAG")
    return given


def request_id(given: str) -> str:
    if len(given) > MAX_REQUEST_ID_CHARS:
        raise InvalidArgument(f"request_id is longer than {MAX_REQUEST_ID_CHARS} characters", reason="INVALID_ID")
    return given


def command(argv: tuple[str, ...], env: Mapping[str, str], cwd: str, timeout_s: float) -> None:
    """Raises `InvalidArgument` (``metadata`` has the field) unless it is a command that Linux would take."""
    if not argv or not argv[0]:
        raise InvalidArgument("there is no command to run: argv is empty", reason="EMPTY_COMMAND")
    for path, message in _command(argv, env, cwd, timeout_s):
        raise InvalidArgument(f"{join(path)}: {message}", metadata={"field": join(path)})


def _command(argv: tuple[str, ...], env: Mapping[str, str], cwd: str, timeout_s: float) -> Iterator[Violation]:
    yield from _arguments("argv", argv)
    yield from _environment(env)
    yield from _directory("cwd", cwd)
    yield from _between(("timeout",), timeout_s, 0, MAX_DURATION_S)
