"""The ``process`` backend: actors as ordinary processes in namespaces, without root. **Not a security boundary.**"""

from greenroom.sandbox.process.backend import ProcessBackend

__all__ = ["ProcessBackend"]
