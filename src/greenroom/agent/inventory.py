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
from greenroom.agent.fence import Fence, from_os
from greenroom.agent.held import Held
from greenroom.agent.logs import LogFiles
from greenroom.agent.residents import Residents, Wake
from greenroom.agent.sweeper import Sweeper
from greenroom.agent.warm import WarmPool
from greenroom.core import agentapi as api
from greenroom.core.gc import worker as rules
from greenroom.core.gc.records import Entry, Kind, Local, Papers, log_handle, uid_of_log

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
        self._logs = logs
        self._alone = alone
        self._warm = warm
        self._sweeper = Sweeper(self._sandboxes, self._destroy)
        residents.on_remains = lambda sid: self._sweeper.order([_remains(sid)])

    async def close(self) -> None:
        await self._sweeper.close()

    async def sync(self, call: api.Sync) -> api.Synced:
        try:
            self._enrolment.close(call.epoch, call.closed_seq)
        except OSError as error:
            raise from_os(error) from error
        if self._warm:
            self._warm.rest(call.drain)
        try:
            logs = await asyncio.to_thread(self._logs.uids)
        except OSError as error:  # then this says nothing of what is missing
            log.error("can't list what is here", error=str(error))
            logs = None
        # From here on nothing is awaited: all of it is of one moment.
        here = [*self._sandboxes()]
        others = [of_snapshot(snapshot_id, Local.LIVE) for snapshot_id in self._held.ids()]
        others += [of_log(uid, Local.LIVE) for uid in logs or ()]
        entries = [replace(e, state=Local.DYING) if e.handle in self._sweeper else e for e in (*here, *others)]
        self._order({e.handle: e for e in entries}, call.destroy)
        _ = self._alone.alone  # whether it has just become so is in the epoch
        listed = None if logs is None else entries
        residents = self._residents.listed()
        return answer(call, self._enrolment.papers, self._worker, listed, residents, self._alone.epoch)

    def _order(self, here: Mapping[str, Entry], handles: Iterable[str]) -> None:
        """Some of what is here is to go."""
        doomed = [here[handle] for handle in handles if handle in here]
        for wake in self._wakes.values():
            if wake.identity.handle in handles:
                wake.unwanted = True
                wake.end()
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
        if entry.kind is Kind.SNAPSHOT:
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


def answer(
    call: api.Sync,
    papers: Papers,
    worker: str,
    entries: Iterable[Entry] | None,
    residents: tuple[api.Resident, ...],
    alone_epoch: int,
) -> api.Synced:
    """``papers``: after `Sync.closed_seq` was adopted; ``entries``, ``residents``: listed in one moment after that;
    ``entries`` is None when they could not all be listed."""
    listed = None if entries is None else sorted(entries, key=lambda entry: entry.handle)
    report = rules.report(papers, worker, listed)
    if listed is None:
        return api.Synced(report=report, digest="", alone_epoch=alone_epoch, residents=residents)
    digest = hashlib.sha256(msgspec.json.encode([report.inventory, residents])).hexdigest()
    if digest == call.known:
        report = replace(report, inventory=())
        return api.Synced(report=report, digest=digest, same=True, alone_epoch=alone_epoch)
    return api.Synced(report=report, digest=digest, alone_epoch=alone_epoch, residents=residents)
