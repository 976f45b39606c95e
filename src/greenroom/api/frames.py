"""What both ends of the agent link (`greenroom.api.link`, `greenroom.agent.link`) agree on; see link.proto."""

from __future__ import annotations

import asyncio

from greenroom.api._gen.greenroom.link.v1alpha1 import link_pb2

#: DATA frames of one call and direction that may be on the way unread; a frame has at most 64 KiB, so 4 MiB.
WINDOW = 64
#: One message's worth, far below gRPC's limit of 4 MiB a message.
MAX_BATCH_FRAMES = 256
MAX_BATCH_BYTES = 256 << 10


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
