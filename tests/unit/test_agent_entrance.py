"""Who is let in at the entrance, without a network. With one: tests/integration/test_gateway_afar.py."""

from __future__ import annotations

from typing import Any

from greenroom.agent.entrance import MAX_CONNECTIONS, MAX_TO_ONE, EntranceServer, Refused
from greenroom.agent.residents import Lodger
from greenroom.core.agentapi import Identity, ResidentState
from greenroom.core.records import Endpoint


def lodger(uid: str) -> Lodger:
    identity = Identity(namespace="default", name=uid, uid=uid, generation=1)
    return Lodger(identity, "s", ResidentState.RUNNING, Endpoint(port=8080), "")


class House:
    def __init__(self, *uids: str) -> None:
        self.lodgers = {uid: lodger(uid) for uid in uids}
        self.server = EntranceServer(self.lodgers.get, lambda uid: 1)

    def enter(self, uid: str) -> bool:
        """One more connection, which stays open; whether it was let in."""
        visitor: Any = object()
        self.server.open.add(visitor)
        try:
            found, _ = self.server.admit(f"GREENROOM/1 {self.server._ticket} {uid} 1 0".encode())
        except Refused:
            self.server.open.discard(visitor)
            return False
        found.doors.add(lambda: self.server.open.discard(visitor))
        return True


def test_one_actor_has_no_more_than_its_bound() -> None:
    house = House("a")
    while house.enter("a"):
        pass
    assert len(house.lodgers["a"].doors) == MAX_TO_ONE


def test_no_actors_together_close_the_entrance_to_another() -> None:
    greedy = [f"greedy-{n}" for n in range(6)]
    house = House(*greedy, "modest")
    while any([house.enter(uid) for uid in greedy]):
        pass
    assert len(house.server.open) < MAX_CONNECTIONS
    assert sum(house.enter("modest") for _ in range(MAX_TO_ONE)) > 200
