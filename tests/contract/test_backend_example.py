"""The example of an out-of-tree backend keeps the port's rules; its own test is run, loaded by path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

EXAMPLE = Path(__file__).parents[2] / "examples" / "out_of_tree_backend"


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_load("greenroom_inmemory", EXAMPLE / "src" / "greenroom_inmemory" / "__init__.py")
TestInMemoryBackend = _load("test_inmemory_backend", EXAMPLE / "test_inmemory_backend.py").TestInMemoryBackend
