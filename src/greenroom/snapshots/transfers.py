"""How long a bucket is waited for: what moves goes on, what hangs ends.

`obstore` gives a whole request 30 seconds, its body included, and all its attempts three minutes: a large snapshot on a
slow link ends half way. Its options replace those that it reads from the environment (``AWS_ALLOW_HTTP``,
``AWS_PROXY_URL``, ``AWS_TIMEOUT``, ...), so these are read here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, cast

from obstore.store import from_url

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

CONNECT_TIMEOUT = timedelta(seconds=15)
#: Until the next byte comes, which for what is sent is the answer to a whole part (8 MiB). Above the stall timeout, so
#: that a slow link is judged by what is told of it.
SILENCE_TIMEOUT = timedelta(seconds=90)
#: Of one request: longer than anything that moves takes.
TIMEOUT = timedelta(days=1)
#: What hangs ends by its attempts, some 15 minutes after the operation that wanted it.
RETRIES: RetryConfig = {"max_retries": 10, "retry_timeout": TIMEOUT}

_PREFIXES = ("AWS_", "GOOGLE_", "AZURE_")
_OPTIONS = (
    *("allow_http", "allow_invalid_certificates", "http1_only", "http2_only", "randomize_addresses", "user_agent"),
    *("http2_keep_alive_interval", "http2_keep_alive_timeout", "http2_keep_alive_while_idle"),
    *("pool_idle_timeout", "pool_max_idle_per_host", "proxy_url", "proxy_ca_certificate", "proxy_excludes"),
    *("connect_timeout", "read_timeout", "timeout"),
)


def open_bucket(url: str, environment: Mapping[str, str] = os.environ) -> ObjectStore:
    return from_url(url, client_options=client_options(environment), retry_config=RETRIES)


def client_options(environment: Mapping[str, str]) -> ClientConfig:
    """What the environment says goes first."""
    ours = {"connect_timeout": CONNECT_TIMEOUT, "read_timeout": SILENCE_TIMEOUT, "timeout": TIMEOUT}
    said = {
        option: environment[prefix + option.upper()]
        for prefix in _PREFIXES
        for option in _OPTIONS
        if prefix + option.upper() in environment
    }
    return cast("ClientConfig", {**ours, **said})
