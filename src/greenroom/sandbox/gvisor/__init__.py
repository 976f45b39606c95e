"""Sandboxes by gVisor (`runsc`): see `backend`."""

from greenroom.sandbox.gvisor.backend import GvisorBackend

__all__ = ["GvisorBackend"]
