"""Snapshots that many wake from are downloaded once, as long as there is room for them."""

from __future__ import annotations

from pathlib import Path

import pytest
from agent_kit import until

from greenroom.agent.fetched import Fetched


class Store:
    def __init__(self) -> None:
        self.fetched: list[str] = []

    async def read(self, fetched: Fetched, name: str, keep_bytes: int) -> None:
        async def fetch(root: Path) -> Path:
            if not (root / name).is_dir():
                self.fetched.append(name)
                (root / name).mkdir()
            return root / name

        async with fetched.reading(name, fetch, keep_bytes) as directory:
            assert directory.is_dir()


def there(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


async def test_what_others_come_for_is_kept_up_to_a_bound(tmp_path: Path) -> None:
    fetched, store = Fetched(tmp_path / "cache", max_kept_bytes=10), Store()
    await fetched.clear()
    for name in ("a", "b", "a", "c", "a", "b"):
        await store.read(fetched, name, 4)
    assert store.fetched == ["a", "b", "c", "b"], "b was the longest unused when c came"
    await until(lambda: there(tmp_path / "cache") == {"a", "b"})


async def test_neither_what_nobody_comes_for_nor_what_is_too_large(tmp_path: Path) -> None:
    fetched, store = Fetched(tmp_path / "cache", max_kept_bytes=10), Store()
    await fetched.clear()
    await store.read(fetched, "once", 0)
    await store.read(fetched, "large", 11)
    await until(lambda: not there(tmp_path / "cache"))


async def test_what_somebody_fails_over_is_not_kept(tmp_path: Path) -> None:
    fetched = Fetched(tmp_path / "cache")
    await fetched.clear()

    async def fetch(root: Path) -> Path:
        (root / "a").mkdir()
        return root / "a"

    with pytest.raises(ValueError):
        async with fetched.reading("a", fetch, 1):
            raise ValueError
    await until(lambda: not there(tmp_path / "cache"))
