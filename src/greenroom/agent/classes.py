"""What sandboxes are made for: images and templates merged, and remembered."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import msgspec

from greenroom.agent.images import WorkerImages
from greenroom.agent.progress import Reports
from greenroom.agent.warm import MAX_CLASSES
from greenroom.core.agentapi import WAITS_FOR_IMAGE, Prepare, Prepared, Progress, Restore, Start, Warm
from greenroom.core.errors import FailedPrecondition
from greenroom.core.records import IMAGE_PORTS, LayerProgress, TemplateSpec
from greenroom.images.config import resolve_user, signal_number
from greenroom.images.port import Image, ImageConfig, OnProgress
from greenroom.sandbox.port import SandboxClass

#: Of an image that exposes none.
DEFAULT_PORTS = (8080,)
DEFAULT_STOP_SIGNAL = "SIGTERM"


class Classes:
    """``needs_image``: whether the backend runs images at all."""

    def __init__(self, images: WorkerImages, *, needs_image: bool) -> None:
        self._images = images
        self._needs_image = needs_image
        self._known: dict[bytes, SandboxClass] = {}

    async def held(self, call: Start | Restore, reports: Reports) -> SandboxClass:
        """For a sandbox of this actor: its image is here, and stays until it is released
        (`greenroom.agent.images.WorkerImages`).

        Raises as `greenroom.agent.images.WorkerImages.hold` and `sandbox_class` do.
        """
        image = None
        if self._needs_image:
            image = await self._images.hold(call, _telling(reports, WAITS_FOR_IMAGE))
        return await self._of(call.image_digest, call.spec, image)

    async def to_warm(self, call: Warm, reports: Reports) -> SandboxClass:
        """For sandboxes that are to be kept ready; the image is prepared, and not held."""
        image = None
        if self._needs_image:
            image = await self._images.prepare(call.spec.image, _telling(reports), call.image_digest, call.peers)
        return await self._of(call.image_digest, call.spec, image)

    async def _of(self, image_digest: str, spec: TemplateSpec, image: Image | None) -> SandboxClass:
        key = image_digest.encode() + msgspec.json.encode(spec)
        cls = self._known.get(key)
        if cls is None:
            cls = await asyncio.to_thread(sandbox_class, image or _no_image(spec.image), spec)
            if len(self._known) >= MAX_CLASSES:
                self._known.clear()
            self._known[key] = cls
        return cls

    async def pull(self, call: Prepare, reports: Reports) -> Prepared:
        """Raises as `greenroom.images.port.ImageStore.prepare` does."""
        if self._needs_image:
            return await self._images.pull(call, _telling(reports))
        image = _no_image(call.image)
        return Prepared(image_digest=image.digest, size_bytes=image.size_bytes)

    def digests(self) -> tuple[str, ...]:
        """Of the images that are here."""
        return self._images.digests() if self._needs_image else ()


def _telling(reports: Reports, prefix: str = "") -> OnProgress:
    def tell(phase: str, layers: tuple[LayerProgress, ...]) -> None:
        reports.tell(Progress(phase=prefix + phase, layers=layers))

    return tell


def sandbox_class(image: Image, spec: TemplateSpec) -> SandboxClass:
    """Image and template merged, as Kubernetes does: a command replaces entrypoint and arguments of the image. Whatever
    else the template says replaces what the image says of it; environments are merged by name. Blocks, for as long as
    the image's links take (`resolve_user`).

    Raises:
        FailedPrecondition: there is nothing to run (reason ``COMMAND_NOT_FOUND``); the image has no such user or group
            (``USER_NOT_FOUND``); its stop signal is none, or its list of users can't be read (``IMAGE_INVALID``).
    """
    config = image.config
    argv = (*spec.command, *spec.args) if spec.command else (*config.entrypoint, *(spec.args or config.cmd))
    if not argv:
        raise FailedPrecondition(
            f"image {spec.image} has no entrypoint and the template no command; set spec.command",
            reason="COMMAND_NOT_FOUND",
        )
    user = resolve_user(image.rootfs, spec.user or config.user)
    ports = (config.exposed_ports or DEFAULT_PORTS) if spec.ports == IMAGE_PORTS else spec.ports
    wanted_signal = spec.stop_signal or config.stop_signal or DEFAULT_STOP_SIGNAL
    stop_signal = signal_number(wanted_signal)
    if stop_signal is None:
        raise FailedPrecondition(
            f"image {spec.image} wants to be stopped by {wanted_signal[:32]!r}, which is no signal; set "
            "spec.stopSignal in the template",
            reason="IMAGE_INVALID",
        )
    return SandboxClass(
        rootfs=image.rootfs,
        image_digest=image.digest,
        argv=argv,
        env=tuple({"HOME": user.home, **dict(config.env), **spec.env}.items()),
        cwd=spec.workdir or config.workdir,
        uid=user.uid,
        gid=user.gid,
        port=ports[0] if ports else 0,
        resources=spec.resources,
        stop_signal=stop_signal,
    )


def _no_image(reference: str) -> Image:
    """For backends that run no image: whatever the template names."""
    digest = f"sha256:{hashlib.sha256(reference.encode()).hexdigest()}"
    config = ImageConfig(entrypoint=("none",))
    return Image(reference=reference, digest=digest, rootfs=Path("/"), config=config, size_bytes=0)
