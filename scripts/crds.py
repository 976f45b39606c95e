"""Writes deploy/crds.yaml, the CustomResourceDefinitions, from the records (greenroom.operator.crds)."""

from __future__ import annotations

from pathlib import Path

from greenroom.operator.crds import render

if __name__ == "__main__":
    target = Path(__file__).resolve().parent.parent / "deploy" / "crds.yaml"
    target.write_text(render())
    print(target)
