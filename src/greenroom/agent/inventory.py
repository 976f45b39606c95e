"""What a worker has, as it tells the control plane, and how what is to go does (`greenroom.core.gc`)."""

from __future__ import annotations

import asyncio
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping

import msgspec
import structlog
from msgspec.structs import replace

from greenroom.agent.alone import AloneWatch
from greenroom.agent.enrolment import Enrolment
from greenroom.agent.fence import Fence
from greenroom.agent.fetched import Fetched
from greenroom.agent.held import Held
from greenroom.agent.logs import LogFiles
from greenroom.agent.residents import Residents, Wake
from greenroom.agent.sweeper import Sweeper
from greenroom.agent.warm import WarmPool
from greenroom.core import agentapi as api
from greenroom.core.gc import worker as rules
from greenroom.core.gc.records import Entry, Kind, Local, Papers, fetched_handle, log_handle, snapshot_of, uid_of_log

log = structlog.get_logger(__name__)


class Inventory:
    """``wakes``: those under way, by actor (uid)."""

    def __init__(
        self,
        worker: str,
        enrolment: Enrolment,
        residents: Residents,
        wakes: Mapping[str, Wake],
        *,
        fence: Fence,
        held: Held,
        fetched: Fetched,
        logs: LogFiles,
        alone: AloneWatch,
        warm: WarmPool | None,
    ) -> None:
        self._worker = worker
        self._enrolment = enrolment
        self._residents = residents
        self._wakes = wakes
        self._fence = fence
        self._held = held
        self._fetched = fetched
        self._logs = logs
        self._alone = alone
        self._warm = warm
        self._sweeper = Sweeper(self._sandboxes, self._destroy)
        residents.on_remains = lambda sid: self._sweeper.order([_remains(sid)])

    async def close(self) -> None:
        await self._sweeper.close()

    async def sync(self, call: api.Sync) -> api.Synced:
        try:
            self._enrolment.close(call.epoch, call.closed_seq, call.incarnation)
        except OSError as error:  # then nothing more is closed; what is to go goes all the same, and makes room
            log.error("can't write down what is closed", closed_seq=call.closed_seq, error=str(error))
        if self._warm:
            self._warm.rest(call.drain)
        disk = digest_of(await self._on_disk())
        # From here on nothing is awaited: all of it is of one moment.
        entries = [*self._sandboxes()]
        self._order({e.handle: e for e in entries}, call.destroy)
        entries = [self._with_fate(e) for e in entries]
        _ = self._alone.alone  # whether it has just become so is in the epoch
        papers, residents = self._enrolment.papers, self._residents.listed()
        return answer(call, papers, self._worker, entries, residents, self._alone.epoch, disk)

    def made_after(self, seq: int) -> str:
        """A sandbox here with a higher number; "" for none."""
        return next((entry.handle for entry in self._sandboxes() if entry.create_seq > seq), "")

    async def list_disk(self, call: api.ListDisk) -> api.Disk:
        return page_of((self._with_fate(entry) for entry in await self._on_disk()), call.after)

    async def _on_disk(self) -> list[Entry]:
        """Of the logs none when they can't be listed: then nothing is said of them."""
        try:
            logs = await asyncio.to_thread(self._logs.uids)
        except OSError as error:
            log.error("can't list logs", error=str(error))
            logs = []
        copies = [*self._held.ids(), *map(fetched_handle, self._fetched.kept())]
        held = [of_snapshot(handle, Local.LIVE) for handle in copies]
        return held + [of_log(uid, Local.LIVE) for uid in logs]

    def _with_fate(self, entry: Entry) -> Entry:
        return replace(entry, state=Local.DYING) if entry.handle in self._sweeper else entry

    def _order(self, sandboxes: Mapping[str, Entry], handles: Iterable[str]) -> None:
        """Some of what is here is to go; what is not is gone already."""
        handles = {*handles}
        for wake in self._wakes.values():
            if wake.identity.handle in handles:
                wake.unwanted = True
                wake.end()
        doomed = [sandboxes[handle] for handle in handles & sandboxes.keys()]
        copies = {*self._held.ids(), *map(fetched_handle, self._fetched.kept())}
        doomed += [of_snapshot(handle, Local.LIVE) for handle in handles & copies]
        doomed += [of_log(uid, Local.LIVE) for h in handles if (uid := uid_of_log(h)) != h and self._logs.has(uid)]
        self._sweeper.order(doomed)

    def _sandboxes(self) -> Iterator[Entry]:
        """Also those that are just being made."""
        for wake in self._wakes.values():
            yield of_sandbox(wake.identity, Local.INIT)
        made = {wake.identity.handle for wake in self._wakes.values()}
        for resident in self._residents:
            if resident.identity.handle not in made:
                yield of_sandbox(resident.identity, Local.LIVE)
        for sid in self._residents.remains:
            yield _remains(sid)

    async def _destroy(self, entry: Entry) -> None:
        """For the sweeper. What has its handle's turn, and is looked at again there, can't become something else
        meanwhile."""
        if entry.kind is Kind.SNAPSHOT and snapshot_of(entry.handle) != entry.handle:
            self._fetched.forget(snapshot_of(entry.handle))
        elif entry.kind is Kind.SNAPSHOT:
            await self._held.release(entry.handle)
        elif entry.kind is Kind.LOG:
            uid = uid_of_log(entry.handle)
            await self._fence.aside(uid, functools.partial(self._forget_log, uid))
        elif entry.handle in self._residents.remains:
            await self._residents.clear_remains(entry.handle)
        else:
            uid = next((e.parent for e in self._sandboxes() if e.handle == entry.handle), "")
            if uid:
                await self._fence.aside(uid_of_log(uid), functools.partial(self._end_sandbox, uid_of_log(uid), entry))

    async def _end_sandbox(self, uid: str, entry: Entry) -> None:
        resident = self._residents.find(uid)
        if resident is not None and resident.identity.handle == entry.handle:
            await self._residents.end(uid)

    async def _forget_log(self, uid: str) -> None:
        if self._residents.find(uid) is None and uid not in self._wakes:
            await self._logs.forget(uid)


def _remains(sid: str) -> Entry:
    """A sandbox that has ended by itself and could not be removed: it goes by the name that its backend knows."""
    return Entry(handle=sid, create_seq=0, state=Local.DYING)


def of_sandbox(identity: api.Identity, state: Local) -> Entry:
    """What its actor writes to its log goes after it."""
    return Entry(
        handle=identity.handle,
        create_seq=identity.create_seq,
        state=state,
        parent=log_handle(identity.uid),
        owner=f"{identity.namespace}/{identity.name}",
        generation=identity.generation,
    )


def of_log(actor_uid: str, state: Local) -> Entry:
    return Entry(handle=log_handle(actor_uid), create_seq=0, state=state, kind=Kind.LOG)


def of_snapshot(snapshot_id: str, state: Local) -> Entry:
    return Entry(handle=snapshot_id, create_seq=0, state=state, kind=Kind.SNAPSHOT)


def digest_of(entries: Iterable[Entry]) -> str:
    return hashlib.sha256("\n".join(sorted(entry.handle for entry in entries)).encode()).hexdigest()


def page_of(entries: Iterable[Entry], after: str) -> api.Disk:
    later = sorted((entry for entry in entries if entry.handle > after), key=lambda entry: entry.handle)
    return api.Disk(entries=tuple(later[: api.MAX_DISK_PAGE]), more=len(later) > api.MAX_DISK_PAGE)


def answer(
    call: api.Sync,
    papers: Papers,
    worker: str,
    entries: Iterable[Entry],
    residents: tuple[api.Resident, ...],
    alone_epoch: int,
    disk: str,
) -> api.Synced:
    """``papers``: after `Sync.closed_seq` was adopted; ``entries`` (of all sandboxes), ``residents``: listed in one
    moment after that."""
    report = rules.report(papers, worker, sorted(entries, key=lambda entry: entry.handle))
    digest = hashlib.sha256(msgspec.json.encode([report.inventory, residents])).hexdigest()
    if digest == call.known:
        report = replace(report, inventory=())
        return api.Synced(report=report, digest=digest, same=True, disk=disk, alone_epoch=alone_epoch)
    return api.Synced(report=report, digest=digest, disk=disk, alone_epoch=alone_epoch, residents=residents)
