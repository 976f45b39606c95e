"""The service of the images that workers have; see `greenroom.api.service`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from msgspec.structs import replace

from greenroom.api import convert
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2_grpc as pb_grpc
from greenroom.api.service import Service, closing, rpc
from greenroom.core.errors import InvalidArgument
from greenroom.core.records import ImageCache

#: Longest image name, digest or reference that is taken.
MAX_NAME_LENGTH = 1024
#: Data in one frame of an import.
MAX_FRAME_BYTES = 1 << 20


class Images(Service, pb_grpc.ImagesServicer):
    @rpc
    async def ListImages(self, request: Any, context: Any) -> Any:
        caches = await self._control.images.caches(request.workers)
        return pb.ListImagesResponse(caches=map(convert.to_message, caches))

    @rpc
    async def InspectImage(self, request: Any, context: Any) -> Any:
        answer = pb.InspectImageResponse()
        for cache, detail in await self._control.images.inspect(_named(request), request.workers):
            answer.there.add(workers=cache.workers, detail=convert.to_message(detail))
        return answer

    @rpc
    async def PullImage(self, request: Any, context: Any) -> None:
        pulling = self._control.images.pull(_named(request), request.workers, pin=request.pin)
        async with self._streams.open(), closing(pulling) as reports:
            async for report in reports:
                await context.write(convert.to_message(report))

    @rpc
    async def RemoveImage(self, request: Any, context: Any) -> Any:
        return _done(await self._control.images.remove(_named(request), request.workers, unpin=request.unpin))

    @rpc
    async def PinImage(self, request: Any, context: Any) -> Any:
        return _done(await self._control.images.pin(_named(request), request.workers, undo=request.undo))

    @rpc
    async def PruneImages(self, request: Any, context: Any) -> Any:
        answer = pb.PruneImagesResponse()
        for cache, evicted in await self._control.images.prune(request.workers, dry_run=request.dry_run):
            answer.there.add(workers=cache.workers, evicted=convert.to_message(evicted))
        return answer

    @rpc
    async def ImportImage(self, requests: Any, context: Any) -> Any:
        frames = aiter(requests)
        first = await anext(frames, None)
        if first is None or first.WhichOneof("frame") != "start":
            raise InvalidArgument("the first frame of ImportImage must be `start`", reason="NO_START_FRAME")
        start = first.start
        async with self._streams.open():
            prepared = await self._control.images.take_in(start.name, start.tag, _data(frames), start.worker)
        return pb.ImportImageResponse(digest=prepared.image_digest, size_bytes=prepared.size_bytes)


async def _data(frames: Any) -> AsyncIterator[bytes]:
    async for frame in frames:
        if len(frame.data) > MAX_FRAME_BYTES:
            raise InvalidArgument(f"a frame of an import may hold {MAX_FRAME_BYTES} bytes, not {len(frame.data)}")
        yield frame.data


def _named(request: Any) -> str:
    name: str = request.image
    if not 0 < len(name) <= MAX_NAME_LENGTH:
        raise InvalidArgument(
            f"image is empty or longer than {MAX_NAME_LENGTH} characters: say which one is meant", reason="INVALID_NAME"
        )
    return name


def _done(caches: Sequence[ImageCache]) -> Any:
    return pb.ImageResponse(caches=[convert.to_message(replace(cache, images=())) for cache in caches])
