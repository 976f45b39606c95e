"""The collection of the snapshot store's objects: every state of small models (`test_gc_search` has them with the
others), what they are worth, and single cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
from msgspec.structs import replace

from greenroom.core.errors import LeaseLost
from greenroom.core.gc import blobs as rules
from greenroom.core.gc.blobs import Blob, BlobLease, BlobState, Kept, Manifest
from greenroom.testing.collection.blobs import State, Store
from greenroom.testing.collection.search import Search, Violation

Patch = pytest.MonkeyPatch
LIMIT = 200_000
X = "a" * 64


class Waiting(Store):
    """Who finds a condemned blob waits until it is gone, as is needed where keys have no generations."""

    def _begins(self, s: State) -> Iterator[tuple[str, State]]:
        if not rules.condemned(s.blobs):
            yield from super()._begins(s)


def no_generations(patch: Patch) -> None:
    patch.setattr(rules, "object_key", lambda digest, upload: f"blobs/{digest}")


def no_leases(patch: Patch) -> None:
    mark = rules.mark
    patch.setattr(rules, "mark", lambda blobs, manifests, leases, now: mark(blobs, manifests, (), now))


def commit_without_a_look(patch: Patch) -> None:
    def commit(lease: Any, lease_id: str, manifest: Manifest, blobs: Any, now: float) -> Manifest:
        if lease is None or not rules.is_running(lease, now):
            raise LeaseLost("its lease has run out")
        return manifest

    patch.setattr(rules, "commit", commit)


def neither(patch: Patch) -> None:
    no_leases(patch)
    commit_without_a_look(patch)


def condemned_is_reused(patch: Patch) -> None:
    begin = rules.begin

    def reuse(blobs: Any, *args: Any) -> rules.Upload:
        back = {BlobState.CONDEMNED: BlobState.PRESENT}
        return begin([replace(blob, state=back.get(blob.state, blob.state)) for blob in blobs], *args)

    patch.setattr(rules, "begin", reuse)


def condemned_comes_back(patch: Patch) -> None:
    patch.setattr(rules, "stored", lambda blob: replace(blob, state=BlobState.PRESENT))


def no_scrub(patch: Patch) -> None:
    patch.setattr(rules, "strays", lambda *args, **kwargs: [])


class Mutation(NamedTuple):
    taken_away: Callable[[Patch], None]
    promise: str
    steps: int
    model: Store = Store()


MUTATIONS = [
    Mutation(no_generations, "B2", 7, Waiting(uploads=2, reads=0, settles=False)),
    Mutation(no_leases, "N", 4, Store(uploads=1)),
    Mutation(neither, "B1", 7, Store(settles=False)),
    Mutation(condemned_is_reused, "N", 4),
    Mutation(condemned_comes_back, "B3", 5),
    Mutation(no_scrub, "L", 5),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.taken_away.__name__)
def test_each_rule_is_needed(mutation: Mutation, monkeypatch: Patch) -> None:
    mutation.taken_away(monkeypatch)
    with pytest.raises(Violation) as found:
        Search(mutation.model, LIMIT).run()
    broken = found.value.promise.partition(":")[0], len(found.value.steps)
    assert broken == (mutation.promise, mutation.steps), str(found.value)


def test_a_lease_alone_is_enough_for_safety(monkeypatch: Patch) -> None:
    commit_without_a_look(monkeypatch)
    Search(Store(), LIMIT).run()


def test_the_look_at_the_commit_alone_is_enough_for_safety(monkeypatch: Patch) -> None:
    """But then an upload may have to begin again for ever."""
    no_leases(monkeypatch)

    @dataclass(frozen=True)
    class Patient(Store):
        def _goes_on(self, s: State, writer: Any) -> Iterator[tuple[str, State]]:
            try:
                yield from super()._goes_on(s, writer)
            except Violation as found:
                assert found.promise.startswith("N")

    Search(Patient(reads=0), LIMIT).run()


# --- the named cases --------------------------------------------------------------------------------------


def uploaded(lease: str, *, expires_at: float = 100.0) -> tuple[Blob, BlobLease]:
    upload = rules.begin([], {X: 5}, lease, expires_at)
    return rules.stored(upload.new[0]), upload.lease


def test_t35_the_same_content_is_uploaded_while_the_old_object_is_deleted() -> None:
    old, _ = uploaded("one")
    [condemned] = rules.mark([old], [], [], now=0.0)
    upload = rules.begin([condemned], {X: 5}, "two", 100.0)
    [new] = upload.new
    assert new.key != condemned.key, "the DELETE that is under way can't touch it"
    assert rules.stored(condemned) == condemned
    manifest = Manifest(id="m", blobs=frozenset(upload.keys.values()))
    rows = [condemned, rules.stored(new)]
    assert rules.commit(upload.lease, "two", manifest, rows, now=0.0) == manifest
    assert rules.condemned(rows) == [condemned]


def test_t36_a_commit_while_it_is_marked() -> None:
    """Whichever transaction comes first decides; neither order loses anything."""
    blob, lease = uploaded("one", expires_at=10.0)
    manifest = Manifest(id="m", blobs=frozenset({blob.key}))
    assert not rules.mark([blob], [], [lease], now=9.9), "the lease keeps it"
    assert not rules.mark([blob], [rules.commit(lease, "one", manifest, [blob], now=9.9)], [], now=20.0)
    [condemned] = rules.mark([blob], [], [lease], now=10.0)
    with pytest.raises(LeaseLost, match="longer than its lease"):
        rules.commit(lease, "one", manifest, [condemned], now=10.0)
    with pytest.raises(LeaseLost, match="upload them again"):
        rules.commit(replace(lease, expires_at=99.0), "one", manifest, [condemned], now=10.0)
    with pytest.raises(LeaseLost):
        rules.commit(None, "one", manifest, [blob], now=0.0)


def test_what_is_reused_is_covered() -> None:
    blob, _ = uploaded("one")
    upload = rules.begin([blob], {X: 5}, "two", 100.0)
    assert not upload.new and upload.lease.covers == {blob.key}
    assert not rules.mark([blob], [], [upload.lease], now=0.0)


def test_what_is_still_uploaded_is_not_reused() -> None:
    """Its upload may die, and then nobody would put it."""
    [uploading] = rules.begin([], {X: 5}, "one", 100.0).new
    upload = rules.begin([uploading], {X: 5}, "two", 100.0)
    assert [blob.upload for blob in upload.new] == ["two"]


def test_a_reader_keeps_what_it_reads() -> None:
    blob, _ = uploaded("one")
    lease = rules.read(Manifest(id="m", blobs=frozenset({blob.key})), "reader", 10.0)
    assert not rules.mark([blob], [], [lease], now=5.0)
    assert rules.mark([blob], [], [lease], now=10.0)


def test_a_lease_that_has_run_out_is_not_renewed() -> None:
    _, lease = uploaded("one", expires_at=10.0)
    assert rules.renew(lease, 9.0, 1e9).expires_at == 9.0 + rules.MAX_LEASE_S
    with pytest.raises(LeaseLost):
        rules.renew(lease, 10.0, 60.0)


def test_the_scrub_takes_what_is_old_and_was_found_twice() -> None:
    old, young = rules.SCRUB_AGE_S + 1, rules.SCRUB_AGE_S - 1
    listed = {"blobs/owned": old, "blobs/stray": old, "blobs/young": young, "blobs/once": old}
    before = rules.without_row(["blobs/owned", "blobs/stray", "blobs/young"], {"blobs/owned"})
    assert before == {"blobs/stray", "blobs/young"}
    assert rules.strays(listed, before, {"blobs/owned"}, restored=False) == ["blobs/stray"]
    assert rules.strays(listed, before, set(), restored=True) == [], "rows may be missing"
    # A list that is late shows what is gone, and not yet what is new: neither does harm.
    assert rules.strays({"blobs/stray": old}, before, {"blobs/owned"}, restored=False) == ["blobs/stray"]


def test_retention() -> None:
    snapshots = [Kept(id=str(n), created_at=float(n)) for n in range(6)]
    snapshots[0] = replace(snapshots[0], tags=("before-the-upgrade",))
    snapshots[1] = replace(snapshots[1], needed=True)
    assert rules.expired(snapshots, keep_last=1, keep_for_s=0.0, now=6.0) == ["2", "3", "4"]
    assert rules.expired(snapshots, keep_last=0, keep_for_s=3.0, now=6.0) == ["2", "3"]
    assert rules.expired(snapshots, keep_last=6, keep_for_s=0.0, now=6.0) == []
