"""The kubelet for tests runs pods as real processes, and says of them what a real one would."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import sys
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from greenroom.testing.fake_kube.kubelet import Kubelet
from greenroom.testing.fake_kube.objects import Objects
from greenroom.testing.fake_kube.resources import Resource

#: Answers probes, shows its environment and a secret, and says what it was sent.
APP = """
import http.server, json, os, signal, sys, time
def end(*_):
    print("asked to end", flush=True)
    if os.environ.get("SLOW"):
        return
    sys.exit(int(os.environ.get("CODE", "0")))
signal.signal(signal.SIGTERM, end)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/crash":
            os._exit(3)
        secret = os.path.join(os.environ["SECRETS"], "word")
        told = {"env": dict(os.environ), "secret": open(secret).read(), "data": sorted(os.listdir(os.environ["DATA"]))}
        body = json.dumps(told).encode()
        self.send_response(200); self.end_headers(); self.wfile.write(body)
    def log_message(self, *_): pass
if len(sys.argv) > 1 and sys.argv[1] == "init":
    open(os.path.join(os.environ["DATA"], "made"), "w").close(); sys.exit(0)
http.server.ThreadingHTTPServer((os.environ["IP"], 8000), Handler).serve_forever()
"""


@pytest.fixture
async def kubelet(tmp_path: Path) -> AsyncIterator[Kubelet]:
    app = tmp_path / "app.py"
    app.write_text(APP)
    with tempfile.TemporaryDirectory(prefix="gr-") as directory:
        images = {"app": (sys.executable, str(app))}
        async with Kubelet(Objects(), directory=Path(directory), images=images) as kubelet:
            task = asyncio.create_task(kubelet.follow())
            yield kubelet
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        assert list(Path(directory).iterdir()) == []


def resource(kubelet: Kubelet, plural: str) -> Resource:
    found = kubelet.objects.registry.get("", "v1", plural)
    assert found is not None
    return found


def pod(**changes: Any) -> dict[str, Any]:
    ip = {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    env = [
        ip,
        {"name": "AT", "value": "$(IP):8000"},
        {"name": "DATA", "value": "/data/x"},
        {"name": "SECRETS", "value": "/s"},
    ]
    mounts = [{"name": "data", "mountPath": "/data/x"}, {"name": "s", "mountPath": "/s", "readOnly": True}]
    probe = {"httpGet": {"path": "/", "port": "http"}, "periodSeconds": 1}
    container = {
        "name": "main",
        "image": changes.pop("image", "app"),
        "env": [*env, *changes.pop("env", [])],
        "ports": [{"name": "http", "containerPort": 8000}],
        "readinessProbe": probe,
        "volumeMounts": mounts,
    }
    init = {"name": "init", "image": "app", "args": ["init"], "env": env, "volumeMounts": mounts}
    volumes = [{"name": "data", "emptyDir": {}}, {"name": "s", "secret": {"secretName": "s"}}]
    spec = {"containers": [container], "initContainers": [init], "volumes": volumes, "terminationGracePeriodSeconds": 5}
    return {"metadata": {"name": "one"}, "spec": {**spec, "restartPolicy": "OnFailure", **changes}}


def secret(word: str) -> dict[str, Any]:
    return {"metadata": {"name": "s"}, "data": {"word": base64.b64encode(word.encode()).decode()}}


async def until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.05)


def status(kubelet: Kubelet) -> dict[str, Any]:
    found = kubelet.objects.find(resource(kubelet, "pods"), "default", "one")
    return dict(found["status"]) if found else {}


def ready(kubelet: Kubelet) -> bool:
    return {"type": "Ready", "status": "True"} in status(kubelet).get("conditions", ())


async def ask(kubelet: Kubelet, path: str = "/") -> dict[str, Any]:
    url = f"http://{status(kubelet)['podIP']}:8000{path}"

    def get() -> Any:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.load(answer)

    return dict(await asyncio.to_thread(get))


async def test_a_pod_lives_and_ends(kubelet: Kubelet) -> None:
    objects = kubelet.objects
    objects.create(resource(kubelet, "pods"), "default", pod())
    await until(lambda: "secret" in str(status(kubelet).get("containerStatuses")))
    assert status(kubelet)["phase"] == "Pending"
    objects.create(resource(kubelet, "secrets"), "default", secret("old"))
    await until(lambda: ready(kubelet))
    told = await ask(kubelet)
    assert told["env"]["AT"] == f"{told['env']['IP']}:8000" and told["secret"] == "old" and told["data"] == ["made"]

    changed = {**objects.get(resource(kubelet, "secrets"), "default", "s"), "data": secret("new")["data"]}
    objects.update(resource(kubelet, "secrets"), "default", "s", changed)
    async with asyncio.timeout(60):
        while (await ask(kubelet))["secret"] != "new":
            await asyncio.sleep(0.05)

    # What crashes goes on, and what is deleted is asked to end and is gone.
    with pytest.raises(OSError):
        await ask(kubelet, "/crash")
    await until(lambda: ready(kubelet) and status(kubelet)["containerStatuses"][0]["restartCount"] == 1)
    objects.delete(resource(kubelet, "pods"), "default", "one")
    await until(lambda: not status(kubelet))


async def test_one_that_does_not_end_is_killed(kubelet: Kubelet) -> None:
    kubelet.objects.create(resource(kubelet, "secrets"), "default", secret("a"))
    kubelet.objects.create(resource(kubelet, "pods"), "default", pod(env=[{"name": "SLOW", "value": "1"}]))
    await until(lambda: ready(kubelet))
    pid = kubelet.main_pid("one")
    assert pid and Path(f"/proc/{pid}").exists()
    kubelet.objects.delete(resource(kubelet, "pods"), "default", "one", grace_s=5)
    await until(lambda: "asked to end" in kubelet.log("one"))
    assert Path(f"/proc/{pid}").exists()
    await until(lambda: not status(kubelet))
    assert not Path(f"/proc/{pid}").exists()


async def test_an_image_that_can_not_be_pulled(kubelet: Kubelet) -> None:
    kubelet.objects.create(resource(kubelet, "pods"), "default", pod(image="nowhere"))
    await until(lambda: "ImagePullBackOff" in str(status(kubelet)))
    kubelet.objects.delete(resource(kubelet, "pods"), "default", "one")
    await until(lambda: not status(kubelet))
