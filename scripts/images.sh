#!/usr/bin/env bash
# Makes the images greenroom and greenroom-agent with podman, buildah or docker, whichever there is.
#
#   BASE=debian@sha256:...   what they are made from [default: the tag in deploy/Containerfile]
#   PREFIX=team/             before their names;  TAG=...  [default: the version in pyproject.toml]
#   BUILDER=buildah          which of the three
#   BUILD_OPTIONS="..."      more options of it
set -euo pipefail
cd "$(dirname "$0")/.."

version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
tag=${TAG:-$version}
builder=${BUILDER:-}
for found in podman buildah docker; do
  [ -n "$builder" ] || ! command -v "$found" >/dev/null || builder=$found
done
[ -n "$builder" ] || { echo "images: no podman, buildah or docker on PATH; on Debian: apt-get install buildah" >&2; exit 1; }

options=()
[ -z "${BASE:-}" ] || options+=(--build-arg "BASE=$BASE")
# shellcheck disable=SC2206  # words are wanted
options+=(${BUILD_OPTIONS:-})
for target in greenroom greenroom-agent; do
  name=${PREFIX:-}$target:$tag
  echo "images: $name with $builder"
  "$builder" build "${options[@]}" --file deploy/Containerfile --target "$target" --tag "$name" \
    --label org.opencontainers.image.version="$version" --label org.opencontainers.image.licenses=Apache-2.0 .
done
