"""The recipe of the images, read: what is pinned, who runs it, and that nothing comes from elsewhere. `make
images-check` builds them for real."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "deploy" / "Containerfile").read_text()


def steps() -> list[tuple[str, str, str]]:
    """(stage, instruction, the rest), with lines that go on joined."""
    joined = re.sub(r"\\\n\s*", "", "\n".join(line for line in TEXT.splitlines() if not line.startswith("#")))
    found, stage = [], ""
    for line in filter(None, map(str.strip, joined.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            stage = rest.rpartition(" AS ")[2]
        found.append((stage, word, rest))
    return found


def of(stage: str, word: str) -> list[str]:
    return [rest for where, what, rest in steps() if (where, what) == (stage, word)]


def test_every_stage_is_made_from_one_base_that_can_be_given_by_digest() -> None:
    assert [rest for stage, word, rest in steps() if word == "FROM"] == [
        "${BASE} AS build",
        "${BASE} AS greenroom",
        "greenroom AS greenroom-agent",
    ]
    (base,) = (rest for stage, word, rest in steps() if word == "ARG" and rest.startswith("BASE="))
    assert ":latest" not in base and "/" not in base, "a tag of Debian, from wherever the builder takes images"


def test_the_control_plane_is_nobody_and_the_agent_root() -> None:
    assert of("greenroom", "USER") == ["65532:65532"]
    assert of("greenroom-agent", "USER") == ["0:0"]
    # The last word on who runs it: nothing after it installs anything.
    words = [word for stage, word, _ in steps() if stage == "greenroom"]
    assert "RUN" not in words[words.index("USER") :]
    assert of("greenroom", "ENTRYPOINT") == ['["greenroom"]']


def test_packages_are_held_to_their_digests() -> None:
    installs = [i for rest in of("build", "RUN") for i in rest.split("&&") if "pip install" in i]
    assert installs
    for install in installs:
        assert "--require-hashes" in install or "--no-index" in install, install
    (runsc,) = of("greenroom-agent", "RUN")
    assert "sha256sum --check --strict" in runsc and runsc.index("sha256sum") < runsc.index("dpkg -i")
    digests = {rest.split("=")[0]: rest.split("=")[1] for rest in of("greenroom-agent", "ARG") if "SHA256" in rest}
    assert re.fullmatch(r"[0-9a-f]{64}", digests["RUNSC_SHA256_AMD64"])


def test_runsc_is_the_release_that_the_tests_use() -> None:
    (version,) = (rest.partition("=")[2] for rest in of("greenroom-agent", "ARG") if rest.startswith("RUNSC_VERSION"))
    setup = (ROOT / "scripts" / "setup.sh").read_text()
    (least,) = re.findall(r"^readonly RUNSC_MIN=(\d+)$", setup, re.MULTILINE)
    assert least in version


def test_nothing_is_fetched_by_url_and_nothing_is_left_behind() -> None:
    for _, word, rest in steps():
        assert word != "ADD", "it fetches, and unpacks"
        assert not re.search(r"\b(curl|wget)\b|https?://", rest), rest
        for part in re.split(r"&&|;", rest):
            assert "apt-get install" not in part or "--no-install-recommends" in part, part
        if word == "RUN" and "apt-get update" in rest:
            assert "rm -rf" in rest and "/var/lib/apt/lists/*" in rest, rest


def test_what_is_copied_is_there_and_let_into_the_build() -> None:
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for stage, word, rest in steps():
        if word == "COPY" and not rest.startswith("--from"):
            *sources, _ = rest.split()
            for source in sources:
                assert (ROOT / source).exists(), (stage, source)
                assert source.split("/")[0] in let_in, f"{source} is kept out by .dockerignore"
    # Whatever the package is made from is copied: else the build fails far from here.
    project = (ROOT / "pyproject.toml").read_text()
    for name in re.findall(r'^(?:readme|license-files) = \[?"([^"]+)"', project, re.MULTILINE):
        assert any(name in rest.split() for rest in of("build", "COPY")), name


@pytest.mark.parametrize("script", ["images.sh", "images_check.sh"])
def test_its_scripts_are_shell(script: str) -> None:
    path = ROOT / "scripts" / script
    assert path.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.skipif(shutil.which("sh") is None, reason="no sh")
def test_its_steps_are_shell() -> None:
    for _, word, rest in steps():
        if word == "RUN":
            subprocess.run(["sh", "-n", "-c", rest], check=True)
