#!/usr/bin/env bash
# Builds both images for real and looks at what is in them. As root, on Debian, with buildah and mmdebstrap; takes some
# minutes and 4 GB below TMPDIR. No image is pulled: the base is a Debian made from this machine's own mirror.
#
#   KEEP=dir   keep the storage there, for the next time and for a look
set -euo pipefail
cd "$(dirname "$0")/.."

for tool in buildah mmdebstrap; do
  command -v "$tool" >/dev/null || { echo "images-check: no $tool; apt-get install buildah mmdebstrap" >&2; exit 1; }
done
work=${KEEP:-$(mktemp -d)}
mkdir -p "$work"
cleanup() { # what is mounted can't be removed
  buildah rm --all >/dev/null 2>&1 || true
  findmnt --raw --noheadings --output TARGET | grep -F "$work/" | sort -r | xargs --no-run-if-empty umount || true
  [ -n "${KEEP:-}" ] || rm -rf "$work"
}
trap cleanup EXIT
# Without the namespaces and control groups of a container, which are not to be had everywhere.
export BUILDAH_ISOLATION=chroot
buildah() { command buildah --root "$work/storage" --runroot "$work/run" "$@"; }

say() { printf 'images-check: %s\n' "$*"; }
die() { printf 'images-check: %s\n' "$*" >&2; exit 1; }

base=localhost/greenroom-base
if ! buildah images "$base" >/dev/null 2>&1; then
  say "a Debian as base"
  codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
  mmdebstrap --quiet --variant=minbase "$codename" "$work/base.tar"
  container=$(buildah from scratch)
  buildah add --quiet "$container" "$work/base.tar" / >/dev/null
  buildah commit --quiet --rm "$container" "$base" >/dev/null
  rm "$work/base.tar"
fi

# What vouches for the package index on this machine, which may have an authority of its own; for the build alone.
printf '[global]\ncert = /run/authorities.crt\n' >"$work/pip.conf"
cp /etc/ssl/certs/ca-certificates.crt "$work/authorities.crt"
mkdir -p "$work/bin"
printf '#!/bin/sh\nexec %s --root %q --runroot %q "$@"\n' "$(type -P buildah)" "$work/storage" "$work/run" >"$work/bin/buildah"
chmod +x "$work/bin/buildah"
PATH=$work/bin:$PATH BUILDER=buildah BASE=$base TAG=check PREFIX=localhost/ \
  BUILD_OPTIONS="--layers --pull=never --volume $work/pip.conf:/etc/pip.conf:ro --volume $work/authorities.crt:/run/authorities.crt:ro" \
  scripts/images.sh

in_image() { # $1: image, then the command
  local image=$1 container status=0; shift
  container=$(buildah from --pull-never "localhost/$image:check")
  buildah run "$container" -- "$@" || status=$?
  buildah rm "$container" >/dev/null
  return $status
}
inspect() { buildah inspect --type image --format "$2" "localhost/$1:check"; }

version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
say "greenroom"
[ "$(in_image greenroom greenroom version --client)" = "client: $version" ] || die "another version than $version"
[ "$(in_image greenroom id -u)" = 65532 ] || die "it runs as root"
[ "$(inspect greenroom '{{.OCIv1.Config.User}}')" = 65532:65532 ] || die "its user is another"
in_image greenroom sh -c '! command -v pip && ! command -v gcc && ! [ -e /src ] && ! [ -e /opt/build ]' || die "it has build tools"
in_image greenroom sh -c '! find / -xdev -perm -4000 -user root -path "/opt/*" | grep .' || die "it has setuid programs"
in_image greenroom sh -c '[ -z "$(find /opt/greenroom -writable | head -n 1)" ]' || die "it can change itself"
in_image greenroom python3 -c 'import greenroom.cli.up, greenroom.cli.operator, greenroom.cli.server, grpc, apsw, obstore, psycopg'
say "greenroom-agent"
in_image greenroom-agent runsc --version
in_image greenroom-agent greenroom agent --help >/dev/null || die "no agent in it"
in_image greenroom-agent tar --version >/dev/null && in_image greenroom-agent unshare --version >/dev/null || die "tools are missing"
[ "$(inspect greenroom-agent '{{.OCIv1.Config.User}}')" = 0:0 ] || die "its user is another"
say "both are as they should be"
