"""Accounts are found where docker and podman keep them, and no secret gets out."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from pathlib import Path

import pytest

from greenroom.core.errors import FailedPrecondition
from greenroom.images.credentials import CredentialFiles, Login

SECRET = "top-secret-password"


def auth(user: str, password: str = SECRET) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def write(path: Path, document: object) -> CredentialFiles:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return CredentialFiles([path], helper_timeout_s=5)


def helper(directory: Path, name: str, script: str) -> None:
    path = directory / f"docker-credential-{name}"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of programs that are found."""
    directory = tmp_path / "programs"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")
    return directory


@pytest.mark.parametrize(
    ("host", "repository", "user"),
    [
        ("r.example", "a", "plain"),
        ("r.example:5000", "a", "port"),
        ("url.example", "a", "url"),
        ("docker.io", "library/python", "hub"),
        ("spaced.example", "team/app", "team"),
        ("spaced.example", "team/app/deep", "team"),
        ("spaced.example", "teamwork", "all"),
        ("other.example", "a", None),
        ("example", "a", None),
    ],
)
async def test_entries(tmp_path: Path, host: str, repository: str, user: str | None) -> None:
    entries = {
        "r.example": auth("plain"),
        "r.example:5000": auth("port"),
        "https://url.example/v2/": auth("url"),
        "https://index.docker.io/v1/": auth("hub"),
        "spaced.example": auth("all"),
        "spaced.example/team": auth("team"),
    }
    found = await write(tmp_path / "config.json", {"auths": entries, "HttpHeaders": {"x": "y"}})(host, repository)
    assert found == (Login(username=user, password=SECRET) if user else None)


async def test_kinds_of_entries(tmp_path: Path) -> None:
    entries = {
        "a": {**auth("ada"), "identitytoken": SECRET},
        "b": {"username": "bob", "password": SECRET},
        "c": {"registrytoken": SECRET},
        "d": {},
        "e": auth("eve", "with:colons"),
    }
    files = write(tmp_path / "config.json", {"auths": entries})
    found = await files("a", "x")
    assert found is not None and found.identity_token == SECRET
    assert await files("b", "x") == Login(username="bob", password=SECRET)
    assert await files("c", "x") == Login(registry_token=SECRET)
    assert await files("d", "x") is None
    assert await files("e", "x") == Login(username="eve", password="with:colons")


async def test_order_of_files(tmp_path: Path) -> None:
    home, runtime = tmp_path / "home", tmp_path / "run"
    everywhere = {
        home / ".docker/config.json": "docker",
        home / ".config/containers/auth.json": "containers",
        runtime / "containers/auth.json": "runtime",
        tmp_path / "other/config.json": "other",
        tmp_path / "chosen.json": "chosen",
    }
    for path, user in everywhere.items():
        write(path, {"auths": {"r.example": auth(user)}})

    async def user(**environment: object) -> str | None:
        files = CredentialFiles.from_environment({k: str(v) for k, v in environment.items()})
        found = await files("r.example", "a")
        return found.username if found else None

    assert await user(HOME=home, XDG_RUNTIME_DIR=runtime) == "runtime"
    assert await user(HOME=home) == "containers"
    (home / ".config/containers/auth.json").unlink()
    assert await user(HOME=home) == "docker"
    assert await user(HOME=home, DOCKER_CONFIG=tmp_path / "other") == "other"
    assert await user(HOME=home, REGISTRY_AUTH_FILE=tmp_path / "chosen.json") == "chosen"
    assert await user(HOME=home, REGISTRY_AUTH_FILE=tmp_path / "missing.json") is None
    assert await user(HOME=tmp_path / "nowhere") is None


async def test_helpers(tmp_path: Path, programs: Path) -> None:
    answer = '{"ServerURL":"x","Username":"%s","Secret":"' + SECRET + '"}'
    helper(programs, "store", f"""read server; echo "$server" >> {tmp_path}/asked; printf '{answer}' store""")
    helper(programs, "one", f"""[ "$1" = get ] && printf '{answer}' one""")
    helper(programs, "token", f"""printf '{answer}' '<token>'""")
    helper(programs, "empty", "echo 'credentials not found in native keychain'; exit 1")
    document = {
        "credsStore": "store",
        "credHelpers": {"one.example": "one", "token.example": "token", "empty.example": "empty"},
        "auths": {"https://index.docker.io/v1/": {}, "empty.example": auth("fallback")},
    }
    files = write(tmp_path / "config.json", document)
    assert await files("one.example", "a") == Login(username="one", password=SECRET)
    assert await files("token.example", "a") == Login(identity_token=SECRET)
    assert await files("docker.io", "library/x") == Login(username="store", password=SECRET)
    assert await files("empty.example", "a") == Login(username="fallback", password=SECRET)
    # Docker keeps the Hub's account under this name.
    assert (tmp_path / "asked").read_text().split() == ["https://index.docker.io/v1/"]


@pytest.mark.parametrize(
    "script",
    [
        f"echo '{SECRET}'; exit 1",
        f"echo '{SECRET}'",
        f'printf \'{{"Username": 5, "Secret": "{SECRET}"}}\'',
        "yes secret",
        "exit 3",
        f"echo '{SECRET}' >&2; exit 1",
    ],
)
async def test_helpers_that_fail(tmp_path: Path, programs: Path, script: str) -> None:
    helper(programs, "bad", script)
    with pytest.raises(FailedPrecondition, match="docker-credential-bad") as raised:
        await write(tmp_path / "config.json", {"credsStore": "bad"})("r.example", "a")
    assert raised.value.reason == "REGISTRY_AUTH"
    _no_secret(raised.value)


async def test_a_hanging_helper_is_ended_with_what_it_started(tmp_path: Path, programs: Path) -> None:
    helper(programs, "stuck", f"sleep 1000 & echo $! > {tmp_path}/child; wait")
    path = tmp_path / "config.json"
    write(path, {"credsStore": "stuck"})
    async with asyncio.timeout(60):
        with pytest.raises(FailedPrecondition, match="does not end within"):
            await CredentialFiles([path], helper_timeout_s=5.0)("r.example", "a")
    await _ended(int((tmp_path / "child").read_text()))


async def test_a_helper_may_leave_a_daemon(tmp_path: Path, programs: Path) -> None:
    """A key ring's daemon in a session of its own, which keeps what it inherited: the answer is there all the same, or
    it is said within the time."""
    answer = '{"Username":"ada","Secret":"' + SECRET + '"}'
    helper(programs, "ring", f"setsid sleep 3 >/dev/null & printf '{answer}'")
    assert await write(tmp_path / "config.json", {"credsStore": "ring"})("r", "a") == Login(
        username="ada", password=SECRET
    )
    helper(programs, "ring", f"setsid sleep 3 & printf '{answer}'")
    files = CredentialFiles([tmp_path / "config.json"], helper_timeout_s=0.3)
    with pytest.raises(FailedPrecondition, match="does not end within"):
        await files("r", "a")


async def test_a_cancelled_caller_leaves_no_helper(tmp_path: Path, programs: Path) -> None:
    helper(programs, "stuck", f"echo $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/child; exec sleep 1000")
    asking = asyncio.create_task(write(tmp_path / "config.json", {"credsStore": "stuck"})("r.example", "a"))
    async with asyncio.timeout(60):
        while not (tmp_path / "child").exists():
            await asyncio.sleep(0.01)
    asking.cancel()
    await asyncio.wait([asking])
    await _ended(int((tmp_path / "child").read_text()))


async def _ended(process: int) -> None:
    """It is gone, or waits to be reaped by whoever inherited it."""
    async with asyncio.timeout(60):
        while True:
            try:
                if ") Z " in Path(f"/proc/{process}/stat").read_text():
                    return
            except FileNotFoundError:
                return
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("document", "named"),
    [
        (f'{{"auths": {{"r.example": "{SECRET}"}}}}', "config.json"),
        (f"{SECRET}", "config.json"),
        (json.dumps({"auths": {"r.example": {"auth": SECRET + "!"}}}), "r.example"),
        (json.dumps({"credsStore": "../../bin/sh"}), "no name of a program"),
        (json.dumps({"credsStore": "not-installed"}), "can't be started"),
    ],
)
async def test_damaged_files(tmp_path: Path, document: str, named: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(document)
    with pytest.raises(FailedPrecondition, match=named) as raised:
        await CredentialFiles([path])("r.example", "a")
    _no_secret(raised.value)


def test_no_secret_in_a_representation() -> None:
    login = Login(username="ada", password=SECRET, identity_token=SECRET, registry_token=SECRET)
    assert SECRET not in f"{login!r} {login} {[login]}"


def _no_secret(error: BaseException | None) -> None:
    while error is not None:
        assert SECRET not in f"{error!r} {error}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
