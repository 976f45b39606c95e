"""The YAML in the documentation is what `apply` reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from greenroom.cli import manifest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "manifests.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("text", BLOCKS, ids=[re.findall(r"kind: (\w+)", block)[0] for block in BLOCKS])
def test_a_manifest_of_the_documentation_is_valid(text: str, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(text)
    (found,) = manifest.load([str(tmp_path / "m.yaml")])
    assert found.kind in manifest.SPECS


def test_links_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
