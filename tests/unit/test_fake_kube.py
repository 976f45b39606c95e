"""The fake API server's rules, as the real one has them. See also `integration/test_fake_kube_kubectl`."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from greenroom.testing.fake_kube import patches, schema, selectors
from greenroom.testing.fake_kube.api import Api, Request, Response
from greenroom.testing.fake_kube.cluster import Cluster
from greenroom.testing.fake_kube.errors import KubeError
from greenroom.testing.fake_kube.views import View

PODS = "/api/v1/namespaces/default/pods"


def pod(name: str = "one", **metadata: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, **metadata}, "spec": {"containers": []}}


class Client:
    def __init__(self, api: Api) -> None:
        self.api = api

    async def call(self, method: str, path: str, body: Any = None, code: int = 200, **query: str) -> Any:
        kind = {"content-type": "application/merge-patch+json"}
        raw = b"" if body is None else msgspec.json.encode(body)
        answer = await self.api.handle(Request(method, path, query, kind, raw))
        found = msgspec.json.decode(answer.body)
        assert answer.status == code, found
        return found

    async def watch(self, path: str = PODS, **query: str) -> Watching:
        answer = await self.api.handle(Request("GET", path, {"watch": "1", **query}))
        return Watching(answer)


class Watching:
    def __init__(self, answer: Response) -> None:
        self.status = answer.status
        self._stream = answer.stream

    async def next(self) -> tuple[str, dict[str, Any]]:
        assert self._stream is not None
        async with asyncio.timeout(60):
            event = msgspec.json.decode(await anext(self._stream))
        return event["type"], event["object"]

    async def ends(self) -> None:
        assert self._stream is not None
        with pytest.raises(StopAsyncIteration):
            await anext(self._stream)


@pytest.fixture
def client() -> Client:
    return Client(Api())


async def test_a_change_is_for_the_version_that_it_names(client: Client) -> None:
    made = await client.call("POST", PODS, pod(), 201)
    changed = {**made, "metadata": {**made["metadata"], "labels": {"a": "b"}}}
    await client.call("PUT", f"{PODS}/one", changed)
    refused = await client.call("PUT", f"{PODS}/one", changed, 409)
    assert refused["reason"] == "Conflict" and "the object has been modified" in refused["message"]
    await client.call("PATCH", f"{PODS}/one", {"metadata": {"labels": {"c": "d"}}})  # for whichever there is
    stale = {"metadata": {"resourceVersion": made["metadata"]["resourceVersion"], "labels": {"e": "f"}}}
    await client.call("PATCH", f"{PODS}/one", stale, 409)


async def test_a_change_that_changes_nothing_makes_no_version(client: Client) -> None:
    made = await client.call("POST", PODS, pod(labels={"a": "b"}), 201)
    same = await client.call("PATCH", f"{PODS}/one", {"metadata": {"labels": {"a": "b"}}})
    assert same["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]


async def test_status_is_written_through_its_own_door_alone(client: Client) -> None:
    made = await client.call("POST", PODS, {**pod(), "status": {"phase": "Running"}}, 201)
    assert made["status"] == {"phase": "Pending"}
    after = await client.call("PUT", f"{PODS}/one", {**made, "status": {"phase": "Running"}})
    assert after["status"] == {"phase": "Pending"}
    after = await client.call("PUT", f"{PODS}/one/status", {**after, "spec": {}, "status": {"phase": "Running"}})
    assert after["status"] == {"phase": "Running"} and after["spec"] == made["spec"]


async def test_a_deletion_is_for_the_uid_that_it_names(client: Client) -> None:
    await client.call("POST", PODS, pod(), 201)
    wrong = {"preconditions": {"uid": "another"}}
    refused = await client.call("DELETE", f"{PODS}/one", wrong, 409)
    assert "Precondition failed: UID in precondition: another" in refused["message"]
    await client.call("GET", f"{PODS}/one")


async def test_finalizers_hold_and_grace_waits_for_the_node(client: Client) -> None:
    cluster = Cluster(client.api.objects)
    made = await client.call("POST", PODS, pod(finalizers=["x/y"]), 201)
    cluster.step()
    gone = await client.call("DELETE", f"{PODS}/one")
    assert gone["metadata"]["deletionGracePeriodSeconds"] == 30 and "deletionTimestamp" in gone["metadata"]
    cluster.step()
    held = await client.call("GET", f"{PODS}/one")
    assert held["metadata"]["deletionGracePeriodSeconds"] == 0
    await client.call("PATCH", f"{PODS}/one", {"metadata": {"finalizers": ["x/y", "more"]}}, 422)
    await client.call("POST", PODS, pod(), 409)  # the name is taken until then
    await client.call("PATCH", f"{PODS}/one", {"metadata": {"finalizers": None}})
    await client.call("GET", f"{PODS}/one", None, 404)
    assert (await client.call("POST", PODS, pod(), 201))["metadata"]["uid"] != made["metadata"]["uid"]


async def test_what_has_no_owner_any_more_is_collected(client: Client) -> None:
    cluster = Cluster(client.api.objects)
    path = "/api/v1/namespaces/default/configmaps"
    owner = await client.call("POST", path, {"metadata": {"name": "owner"}}, 201)
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": owner["metadata"]["uid"]}
    await client.call("POST", PODS, pod(ownerReferences=[reference]), 201)
    cluster.collect()
    await client.call("GET", f"{PODS}/one")
    await client.call("DELETE", f"{path}/owner")
    await client.call("POST", path, {"metadata": {"name": "owner"}}, 201)  # a namesake is no owner
    cluster.collect()
    await client.call("GET", f"{PODS}/one", None, 404)


async def test_a_list_says_where_a_watch_begins(client: Client) -> None:
    await client.call("POST", PODS, pod("a"), 201)
    listed = await client.call("GET", PODS)
    await client.call("POST", PODS, pod("b"), 201)
    watch = await client.watch(resourceVersion=listed["metadata"]["resourceVersion"])
    assert (await watch.next())[1]["metadata"]["name"] == "b"
    await client.call("DELETE", f"{PODS}/a")
    kind, obj = await watch.next()
    assert kind == "DELETED" and int(obj["metadata"]["resourceVersion"]) == client.api.objects.rv


async def test_what_stops_being_selected_looks_deleted(client: Client) -> None:
    watch = await client.watch(labelSelector="a=b")
    await client.call("POST", PODS, pod(), 201)
    await client.call("PATCH", f"{PODS}/one", {"metadata": {"labels": {"a": "b"}}})
    assert (await watch.next())[0] == "ADDED"
    await client.call("PATCH", f"{PODS}/one", {"metadata": {"labels": {"a": "c"}}})
    assert (await watch.next())[0] == "DELETED"


async def test_history_that_is_not_kept_is_410_and_bookmarks_keep_a_quiet_watch_alive(client: Client) -> None:
    listed = await client.call("GET", PODS)
    client.api.bookmark_every_s = 0.01
    watch = await client.watch(resourceVersion=listed["metadata"]["resourceVersion"], allowWatchBookmarks="true")
    await client.call("POST", "/api/v1/namespaces/default/configmaps", {"metadata": {"name": "x"}}, 201)
    kind, obj = await watch.next()
    assert kind == "BOOKMARK" and obj["metadata"]["resourceVersion"] == str(client.api.objects.rv)
    client.api.view.compact()
    assert (await client.watch(resourceVersion=listed["metadata"]["resourceVersion"])).status == 410
    assert (await client.watch(resourceVersion=obj["metadata"]["resourceVersion"])).status == 200


async def test_a_replica_may_be_behind_but_the_newest_is_the_newest() -> None:
    api = Api()
    behind = View(api.objects, live=False)
    api.view_of = lambda _: behind
    client = Client(api)
    made = await client.call("POST", PODS, pod(), 201)
    assert (await client.call("GET", PODS, resourceVersion="0"))["items"] == []
    assert len((await client.call("GET", PODS))["items"]) == 1
    await client.call("GET", f"{PODS}/one")
    late = await client.call("GET", PODS, None, 504, resourceVersion=made["metadata"]["resourceVersion"])
    assert late["details"]["causes"][0]["reason"] == "ResourceVersionTooLarge"
    watch = await client.watch()
    behind.advance()
    assert (await watch.next())[0] == "ADDED"
    behind.drop_watches()
    await watch.ends()


async def test_a_stream_of_what_there_is_ends_with_a_mark(client: Client) -> None:
    await client.call("POST", PODS, pod(), 201)
    watch = await client.watch(
        sendInitialEvents="true", allowWatchBookmarks="true", resourceVersionMatch="NotOlderThan"
    )
    assert (await watch.next())[0] == "ADDED"
    kind, obj = await watch.next()
    assert kind == "BOOKMARK" and obj["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}


@pytest.mark.parametrize(
    ("selector", "found"),
    [
        ("a=b", "x"),
        ("a!=b", "yz"),
        ("a", "xy"),
        ("!a", "z"),
        ("a in (b,c)", "xy"),
        ("a notin (b)", "yz"),
        ("a=b,d", ""),
        ("", "xyz"),
    ],
)
def test_label_selectors(selector: str, found: str) -> None:
    labels = {"x": {"a": "b"}, "y": {"a": "c", "d": "e"}, "z": {}}
    test = selectors.labels(selector)
    assert "".join(name for name, have in labels.items() if test({"metadata": {"labels": have}})) == found


def test_merge_patches() -> None:
    assert patches.merge({"a": {"b": 1, "c": 2}, "l": [1]}, {"a": {"b": None, "d": 3}, "l": [2]}) == {
        "a": {"c": 2, "d": 3},
        "l": [2],
    }
    live = {"containers": [{"name": "a", "image": "1"}, {"name": "b", "image": "1"}], "finalizers": ["x"]}
    patch = {
        "containers": [{"name": "b", "image": "2"}],
        "finalizers": ["y"],
        "$deleteFromPrimitiveList/finalizers": ["x"],
    }
    assert patches.strategic(live, patch)["containers"] == [{"name": "a", "image": "1"}, {"name": "b", "image": "2"}]


def test_json_patches() -> None:
    live = {"a": [1, 2], "b": {"c/d": 1}}
    steps = [
        {"op": "test", "path": "/b/c~1d", "value": 1},
        {"op": "add", "path": "/a/-", "value": 3},
        {"op": "move", "from": "/b", "path": "/e"},
        {"op": "replace", "path": "/a/0", "value": 0},
    ]
    assert patches.json_patch(live, steps) == {"a": [0, 2, 3], "e": {"c/d": 1}}
    with pytest.raises(KubeError, match="testing value failed"):
        patches.json_patch(live, [{"op": "test", "path": "/a", "value": 1}])
    assert live == {"a": [1, 2], "b": {"c/d": 1}}


def test_schemas_prune_fill_and_check() -> None:
    spec = {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "default": 3},
            "l": {"type": "array", "items": {"type": "string"}, "x-kubernetes-list-type": "set"},
            "m": {"type": "object", "additionalProperties": {"type": "string", "maxLength": 2}},
        },
    }
    dropped: list[str] = []
    assert schema.prune({"a": 1, "x": 2, "m": {"k": "v"}}, spec, "", dropped) == {"a": 1, "m": {"k": "v"}}
    assert dropped == ["x"]
    assert schema.default({}, spec) == {"a": 3}
    wrong = schema.check({"a": True, "l": ["x", "x"], "m": {"k": "long"}}, spec)
    assert [field for field, _ in wrong] == ["a", "l[1]", "m.k"]
