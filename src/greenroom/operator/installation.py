"""What is the same for all worker pods of one installation: options of ``greenroom operator``, not of a pool."""

from __future__ import annotations

from greenroom.core.records import Record

#: Of the Secret with the installation's certificates, and of the one with its tokens.
TLS_SECRET = "greenroom-tls"
TOKEN_SECRET = "greenroom-tokens"
AGENT_IMAGE = "greenroom-agent:latest"
#: The control plane's Service, as pods of its own namespace find it.
CONTROL = ("greenroom:7434",)


class Installation(Record, frozen=True, kw_only=True):
    """Settings of worker pods.

    Attributes:
        control: where agents find the control plane (``host:port``).
        snapshots: where snapshots are kept (URL).
        image: of pools that name none.
        pull_secrets: with which images of pods are pulled.
        tls_secret: its ``ca.crt`` vouches for the control plane; "" when that speaks without TLS (on one machine).
        token_secret: its ``agents`` holds the token that agents show; "" for none.
        snapshots_secret: whose entries are environment of the agent, for the credentials of a bucket; "" for none.
    """

    control: tuple[str, ...] = CONTROL
    snapshots: str = ""
    image: str = AGENT_IMAGE
    pull_secrets: tuple[str, ...] = ()
    tls_secret: str = TLS_SECRET
    token_secret: str = TOKEN_SECRET
    snapshots_secret: str = ""
