"""What both ends of the agent link (`greenroom.api.link`, `greenroom.agent.link`) agree on; see link.proto."""

from __future__ import annotations

import asyncio

from msgspec.structs import replace

from greenroom.api._gen.greenroom.link.v1alpha1 import link_pb2
from greenroom.core.records import Failure

#: DATA frames of one call and direction that may be on the way unread; so 4 MiB.
WINDOW = 64
MAX_DATA_BYTES = 64 << 10
#: Of a call or an answer. gRPC takes no message of more than 4 MiB, and to send one breaks the link with all its calls;
#: a message has at most one body beside `MAX_BATCH_BYTES`. The longest that are meant to be sent are lists of all that
#: is on a worker (some hundred bytes a sandbox, `agentapi.MAX_DISK_PAGE`) and what an image says of itself.
MAX_BODY_BYTES = 3 << 20
#: Of an error's message, and of its further facts together; characters, of which JSON makes up to six bytes.
MAX_MESSAGE_CHARS = 16 << 10
#: One message's worth, but for a long body.
MAX_BATCH_FRAMES = 256
MAX_BATCH_BYTES = 256 << 10


def cut(failure: Failure) -> Failure:
    """The failure with no more text than an answer should have, and none that JSON can't hold: parts of it are what
    others said, and names of files."""
    kept, room = {}, MAX_MESSAGE_CHARS
    for name, value in failure.metadata.items():
        if len(name) + len(value) <= room:
            room -= len(name) + len(value)
            kept[name] = _utf8(value)
    message = failure.message
    if len(message) > MAX_MESSAGE_CHARS:
        message = f"{message[:MAX_MESSAGE_CHARS]} [cut]"
    return replace(failure, message=_utf8(message), metadata=kept)


def _utf8(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


async def gather_frames(queue: asyncio.Queue[link_pb2.Frame | None]) -> list[link_pb2.Frame] | None:
    """What waits to be sent, at least one frame; None when the queue says that it is over."""
    frame = await queue.get()
    frames: list[link_pb2.Frame] = []
    size = 0
    while frame is not None:
        frames.append(frame)
        size += len(frame.body) + len(frame.data)
        if queue.empty() or len(frames) >= MAX_BATCH_FRAMES or size >= MAX_BATCH_BYTES:
            return frames
        frame = queue.get_nowait()
    if frames:
        queue.put_nowait(None)  # said again after these
        return frames
    return None
