"""Writes the CustomResourceDefinitions from the records (greenroom.operator.crds): deploy/crds.yaml, and the same for
the Helm chart, which can't read files outside of it."""

from __future__ import annotations

from pathlib import Path

from greenroom.operator.crds import render

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
TARGETS = (DEPLOY / "crds.yaml", DEPLOY / "helm" / "greenroom" / "files" / "crds.yaml")

if __name__ == "__main__":
    for target in TARGETS:
        target.write_text(render())
        print(target)
