"""The collection of the snapshot store's objects: what the models (`test_gc_search` has them with the others) are
worth, the named races, and the rules one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace as changed

from greenroom.core.gc import blobs as rules
from greenroom.core.records import FileDigest, Retention, Snapshot, SnapshotState
from greenroom.testing.collection.blobs import Store, _snapshot
from greenroom.testing.collection.search import Search, Violation

Patch = pytest.MonkeyPatch
LIMIT = 200_000
PRESENT, LOCAL, CORRUPT, CONDEMNED = (
    SnapshotState.PRESENT,
    SnapshotState.LOCAL,
    SnapshotState.CORRUPT,
    SnapshotState.CONDEMNED,
)


# --- what each rule is for --------------------------------------------------------------------------------


def the_same_content_has_the_same_key(patch: Patch) -> None:
    patch.setattr(rules, "blob_key", lambda uid, file: f"{rules.directory(uid)}/{file.sha256}.{'0' * 32}.{0:08x}")


def attempts_share_keys(patch: Patch) -> None:
    patch.setattr(rules, "upload_name", lambda snapshot_id, attempt: f"{snapshot_id}.{0:08x}")


def commit_without_a_look(patch: Patch) -> None:
    patch.setattr(rules, "not_there", lambda made, needed: [])


def condemned_is_reused(patch: Patch) -> None:
    not_there = rules.not_there
    back = {CONDEMNED: PRESENT}

    def reuse(made: Snapshot, needed: Iterable[Snapshot]) -> list[FileDigest]:
        return not_there(made, [changed(s, state=back.get(s.state, s.state)) for s in needed])

    patch.setattr(rules, "not_there", reuse)
    what_is_needed_is_over(patch)


def what_is_needed_is_over(patch: Patch) -> None:
    expired = rules.expired
    patch.setattr(rules, "expired", lambda rows, needed, retention, now: expired(rows, (), retention, now))


def what_others_refer_to_goes(patch: Patch) -> None:
    patch.setattr(rules, "doomed", lambda condemned, others: list(rules.keys_of(condemned)))


def operations_are_not_asked(patch: Patch) -> None:
    strays = rules.strays
    patch.setattr(rules, "strays", lambda keys, rows, uploading: strays(keys, rows, ()))


def no_scrub(patch: Patch) -> None:
    patch.setattr(rules, "strays", lambda keys, rows, uploading: [])


def nothing(patch: Patch) -> None:
    """The rule is one of the model's."""


class Mutation(NamedTuple):
    taken_away: Callable[[Patch], None]
    promise: str
    steps: int
    model: Store


ONE, TWO, THREE = (Store(suspends=n, tries=1, calm=True, settles=False) for n in (1, 2, 3))
FORGETS = replace(THREE, contents=(("x",), ("y",)), remembers=True)
MUTATIONS = {
    "generations": Mutation(the_same_content_has_the_same_key, "B2", 10, Store(suspends=2, tries=1)),
    "generations of attempts": Mutation(attempts_share_keys, "B2", 9, Store(suspends=1, tries=2)),
    "the look at the commit": Mutation(commit_without_a_look, "B2", 22, FORGETS),
    "the lease": Mutation(what_is_needed_is_over, "N", 12, TWO),
    "condemned is not reused": Mutation(condemned_is_reused, "B2", 14, TWO),
    "what others refer to": Mutation(what_others_refer_to_goes, "B2", 15, THREE),
    "intent first": Mutation(operations_are_not_asked, "B2", 9, replace(ONE, scrubs=1)),
    "operations before rows": Mutation(nothing, "B2", 9, replace(ONE, scrubs=1, rows_first=True)),
    "no cleaning after the manifest": Mutation(nothing, "B2", 9, Store(1, 2, cleans_late=True, settles=False)),
    "the scrub": Mutation(no_scrub, "L", 2, Store(suspends=1, tries=1)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_rule_is_needed(name: str, monkeypatch: Patch) -> None:
    mutation = MUTATIONS[name]
    mutation.taken_away(monkeypatch)
    with pytest.raises(Violation) as found:
        Search(mutation.model, LIMIT).run()
    broken = found.value.promise.partition(":")[0], len(found.value.steps)
    assert broken == (mutation.promise, mutation.steps), str(found.value)


def test_the_lease_alone_is_enough_for_safety(monkeypatch: Patch) -> None:
    """As long as workers reuse only what they are told."""
    commit_without_a_look(monkeypatch)
    Search(Store(suspends=2, tries=1, scrubs=1, settles=False), LIMIT).run()


def test_the_look_alone_is_enough_for_safety(monkeypatch: Patch) -> None:
    """But then a suspend may have to begin again for ever."""
    what_is_needed_is_over(monkeypatch)
    Search(Store(suspends=2, tries=1, remembers=True, settles=False), LIMIT).run()


# --- the named races, and the rules one by one -------------------------------------------------------------

X, Y = "a" * 64, "b" * 64
ONE_ID, TWO_ID, THREE_ID = (f"{n:032x}" for n in (1, 2, 3))


def file(sha256: str = X, of: str = ONE_ID, attempt: int = 0) -> FileDigest:
    return FileDigest(name="f", size_bytes=5, sha256=sha256, upload=rules.upload_name(of, attempt))


def snapshot(of: str = ONE_ID, *files: FileDigest, state: SnapshotState = PRESENT) -> Snapshot:
    return changed(_snapshot(of, files), state=state)


def test_t35_the_same_content_is_uploaded_while_the_old_object_is_deleted() -> None:
    old = snapshot(ONE_ID, file(of=ONE_ID), state=CONDEMNED)
    assert rules.reusable(old.files, 5, X) and rules.not_there(snapshot(TWO_ID, *old.files), [old]), "it is not kept"
    new = snapshot(TWO_ID, file(of=TWO_ID))
    assert not rules.not_there(new, [old])
    assert not set(rules.doomed(old, [old, new])) & set(rules.keys_of(new)), "a late DELETE can't touch it"


def test_t36_a_commit_while_it_is_marked() -> None:
    """Whichever transaction comes first decides; neither order loses anything."""
    base = snapshot(ONE_ID, file())
    made = snapshot(TWO_ID, *base.files)
    assert not rules.not_there(made, [base])
    condemned = changed(base, state=CONDEMNED)
    assert rules.doomed(condemned, [condemned, made]) == [rules.manifest_key(base.actor_uid, base.id)]
    assert rules.not_there(made, [condemned]) == [*base.files]
    assert rules.doomed(condemned, [condemned]) == [*rules.keys_of(condemned)]


def test_reused_are_only_equal_files_that_have_a_place() -> None:
    assert rules.reusable([file()], 5, X) == file()
    for base, size, sha256 in (([], 5, X), ([file()], 6, X), ([file()], 5, Y), ([changed(file(), upload="")], 5, X)):
        assert rules.reusable(base, size, sha256) is None


@pytest.mark.parametrize("state", [LOCAL, CORRUPT, CONDEMNED])
def test_nothing_is_reused_from_what_is_not_whole_in_the_store(state: SnapshotState) -> None:
    made = snapshot(TWO_ID, file())
    assert rules.not_there(made, [snapshot(ONE_ID, file(), state=state)]) == [file()]


def test_nothing_is_reused_from_another_actor() -> None:
    other = changed(snapshot(ONE_ID, file()), actor_uid="other")
    assert rules.not_there(snapshot(TWO_ID, file()), [other]) == [file()]


def test_what_is_corrupt_or_local_keeps_its_objects() -> None:
    gone = snapshot(ONE_ID, file(), file(Y), state=CONDEMNED)
    for state in (LOCAL, CORRUPT, PRESENT):
        left = rules.doomed(gone, [gone, snapshot(TWO_ID, file(), state=state)])
        assert left == [rules.manifest_key("ac", ONE_ID), rules.blob_key("ac", file(Y))]


def test_strays() -> None:
    row = snapshot(ONE_ID, file())
    killed = f"{rules.directory('ac')}/.0123"
    second_attempt, unknown = rules.blob_key("ac", file(attempt=1)), rules.blob_key("ac", file(of=TWO_ID))
    keys = [*rules.keys_of(row), killed, second_attempt, unknown, "snapshots/else", "snapshots/ac/ac/else"]
    assert rules.strays(keys, [row], ()) == [killed, second_attempt, unknown]
    assert rules.strays(keys, [row], {TWO_ID}) == [killed, second_attempt]
    assert rules.strays(keys, [changed(row, state=CONDEMNED)], {TWO_ID}) == [killed, second_attempt], "it has a row"
    staged = f"{rules.directory('ac')}/{rules.staged_name(TWO_ID, '0123')}"
    assert rules.strays([staged], [row], ()) == [staged] and not rules.strays([staged], [row], {TWO_ID})
    held = snapshot(TWO_ID, file(of=TWO_ID), state=LOCAL)
    assert not rules.strays([staged], [row, held], ()), "it may be on its way, with no operation"
    assert not rules.is_old(rules.SCRUB_AGE_S) and rules.is_old(rules.SCRUB_AGE_S + 1)
    assert not rules.is_old(24 * 3600.0), "one clock that is a day ahead"


def test_retention() -> None:
    snapshots = [snapshot(f"{n:032x}") for n in range(6)]
    snapshots[0] = changed(snapshots[0], tags=("before-the-upgrade",))
    snapshots[2] = changed(snapshots[2], state=CORRUPT)
    needed = {snapshots[1].id, snapshots[5].id}

    def over(now: float = 6.0, **retention: float) -> list[int]:
        kept = Retention(**retention)  # type: ignore[arg-type]
        return sorted(int(s.id, 16) for s in rules.expired(snapshots, needed, kept, now))

    assert over() == [3, 4] and over(keep_last=3) == [3] and over(keep_last=4) == []
    assert over(now=0.0) == [3, 4], "whatever the clock says"
    assert over(keep_for_s=2.5) == [3] and over(keep_for_s=10.0) == [] and over(keep_last=3, keep_for_s=1.0) == [3]


uploads = st.builds(rules.upload_name, st.sampled_from((ONE_ID, TWO_ID, THREE_ID)), st.integers(0, 1))
files = st.lists(
    st.builds(FileDigest, name=st.just("f"), size_bytes=st.just(5), sha256=st.sampled_from((X, Y)), upload=uploads),
    max_size=3,
)
rows = st.lists(
    st.builds(
        lambda of, files, state: snapshot(of, *files, state=state),
        st.sampled_from((ONE_ID, TWO_ID, THREE_ID)),
        files,
        st.sampled_from(SnapshotState),
    ),
    unique_by=lambda s: s.id,
    max_size=3,
)


@given(rows)
def test_what_goes_nobody_refers_to(rows: list[Snapshot]) -> None:
    for condemned in (s for s in rows if s.state is CONDEMNED):
        gone = set(rules.doomed(condemned, rows))
        assert gone <= set(rules.keys_of(condemned))
        assert all(not gone & set(rules.keys_of(s)) for s in rows if s.state is not CONDEMNED)
        # Once nobody refers to it, nobody can again: a commit needs it in a row that is not condemned.
        for f in condemned.files:
            if rules.blob_key("ac", f) in gone:
                made = snapshot("f" * 32, f)
                assert rules.not_there(made, rows) == [f]


@given(rows, st.sets(st.sampled_from((ONE_ID, TWO_ID, THREE_ID))), files)
def test_a_stray_is_nobodys(rows: list[Snapshot], uploading: set[str], files: list[FileDigest]) -> None:
    keys = {rules.blob_key("ac", f) for f in files} | {k for s in rows for k in rules.keys_of(s)}
    found = set(rules.strays(sorted(keys), rows, uploading))
    for key in keys:
        place = rules.place_of(key)
        assert place is not None and place.actor_uid == "ac"
        held = {s.id for s in rows if s.state is LOCAL}
        owned = any(key in rules.keys_of(s) for s in rows) or place.snapshot_id in uploading | held
        assert (key in found) is not owned


@given(st.text(alphabet="ab/.0\n", max_size=12), st.text(alphabet="ab/.0-", max_size=12))
def test_only_keys_of_ours_have_a_place(uid: str, name: str) -> None:
    place = rules.place_of(f"{rules.directory(uid)}/{name}")
    assert place is None or (place.actor_uid == uid and rules.is_uid(uid) and "/" not in name)
