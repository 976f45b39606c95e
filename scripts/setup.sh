#!/usr/bin/env bash
# Makes everything that Greenroom needs, inside this directory where it can:
#   .venv        virtual environment with the pinned, hash-checked packages of requirements/
#   .tools/bin   runsc (gVisor), and with --test the Docker registry that the tests pull from, kubectl, and skopeo and
#                umoci, whose work on images the tests compare with ours (skopeo's libraries are in .tools/skopeo)
#   .tools/postgres  with --test the PostgreSQL server that the tests start
#
# usage: scripts/setup.sh [--test]
#
# Safe to interrupt and to run again; takes no time when nothing is left to do. PYTHON=... chooses the interpreter.
# The only thing that it may install into the system is Debian's python3-venv, as root, where Python can't make a
# virtual environment by itself.
set -euo pipefail
cd "$(dirname "$0")/.."
trap 'echo "setup: interrupted; run it again, it goes on" >&2; exit 130' INT

readonly ROOT=$PWD
readonly TOOLS=$ROOT/.tools
# The oldest runsc whose failed checkpoint leaves the sandbox alive and which can save listening sockets. Debian 12
# itself has 20221219, where a failed checkpoint loses the actor; the backports suite has this one.
readonly RUNSC_MIN=20240729

want=runtime
case "${1-}" in
  '') ;;
  --test) want=dev ;;
  *) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }
is_root() { [ "$(id -u)" = 0 ]; }
is_debian() { command -v apt-get >/dev/null && (. /etc/os-release && [ "${ID-}" = debian ]); }

# --- what is there already ------------------------------------------------------------------------------------

python_works() { # the interpreter is new enough and can make a virtual environment with pip in it
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# What the virtual environment was made from: its place, the interpreter, the pins, and the project's entry points.
fingerprint() { # $1: runtime or dev
  { echo "$ROOT"; sed -n 's/^version = //p' .venv/pyvenv.cfg; cat requirements/build.txt "requirements/$1.txt" pyproject.toml; } |
    sha256sum | cut -d' ' -f1
}

venv_done() { # dev has all that runtime has, so it serves for both
  [ -x .venv/bin/python ] && [ -f .venv/.greenroom-setup ] || return 1
  local have; have=$(cat .venv/.greenroom-setup)
  [ "$have" = "dev $(fingerprint dev)" ] || { [ "$want" = runtime ] && [ "$have" = "runtime $(fingerprint runtime)" ]; }
}

runsc_good() { # $1 runs and is new enough
  local release
  release=$("$1" --version 2>/dev/null | grep -oE '20[0-9]{6}' | head -n 1) || return 1
  [ "${release:-0}" -ge "$RUNSC_MIN" ]
}

runsc_done() {
  local found; found=$(command -v runsc || true)
  runsc_good "$TOOLS/bin/runsc" || { [ -n "$found" ] && runsc_good "$found"; }
}

registry_done() { [ -x "$TOOLS/bin/docker-registry" ] || command -v docker-registry >/dev/null; }

umoci_done() { [ -x "$TOOLS/bin/umoci" ] || command -v umoci >/dev/null; }
skopeo_done() { "$TOOLS/bin/skopeo" --version >/dev/null 2>&1 || command -v skopeo >/dev/null; }
# Of release 1.25 or newer, whose "version" prints this: an older one asks for what the fake API server does not have.
kubectl_done() {
  local found
  for found in "$TOOLS/bin/kubectl" "$(command -v kubectl || true)"; do
    [ -x "$found" ] && "$found" version --client 2>/dev/null | grep -qE '^Client Version: v1\.(2[5-9]|[3-9][0-9])' && return
  done
  return 1
}

# A server of PostgreSQL 15 or newer: Debian's package, installed or unpacked by this script, or another one on PATH.
postgres_done() {
  local found
  for found in "$TOOLS"/postgres/usr/lib/postgresql/*/bin/postgres /usr/lib/postgresql/*/bin/postgres \
    "$(command -v postgres || true)"; do
    postgres_good "$found" && return
  done
  return 1
}

postgres_good() { # $1 runs and is new enough
  local version
  [ -x "$1" ] && version=$(LD_LIBRARY_PATH=$(postgres_libraries "$1") "$1" --version 2>/dev/null | grep -oE '[0-9]+' | head -n 1) &&
    [ "${version:-0}" -ge 15 ]
}

postgres_libraries() { # of a server that this script unpacked: those that the system lacks are beside it
  case "$1" in "$TOOLS"/postgres/*) (cd "$TOOLS/postgres/usr/lib" && echo "$PWD"/*-linux-gnu*) ;; esac
}

# --- Debian packages without touching the system's apt ----------------------------------------------------------

# Mirrors of the Debian main archive among the machine's own apt sources, best first. apt itself reads them (one-line
# and deb822 files, comments, disabled entries), so whatever it accepts is understood here. Security archives have
# other suite names and drop out; a third party's archive that uses Debian's suite name fails the signature check.
debian_mirrors() { # $1: code name
  mkdir -p "$TOOLS/apt/none/lists/partial"
  apt-get -o Dir::State="$TOOLS/apt/none" -o Dir::State::lists="$TOOLS/apt/none/lists" -o Debug::NoLocking=1 update --print-uris |
    sed -nE "s,^'([^']+)/dists/($1|stable|oldstable|oldoldstable)/main/binary-[^']*'.*,\1,p" | grep -v '^cdrom:' | awk '!seen[$0]++'
}

# Unpacks one Debian package below .tools/apt/root, and with --with-libraries what it needs and the system lacks. apt
# checks the archive's signature against Debian's keyring and the packages against the signed index; its lists and cache
# live below .tools/apt, the system's stay as they are.
fetch_deb() { # $1: mirror, $2: suite, $3: package, $4: --with-libraries or nothing
  local state=$TOOLS/apt/$2 keyring=/usr/share/keyrings/debian-archive-keyring.gpg packages=$3 deb
  [ -e "$keyring" ] || keyring=${keyring%.gpg}.pgp
  [ -e "$keyring" ] || die "no Debian keyring at $keyring: apt-get install debian-archive-keyring"
  mkdir -p "$state/lists/partial" "$state/cache/archives/partial"
  echo "deb [signed-by=$keyring] $1 $2 main" >"$state/sources.list"
  local apt=(apt-get -qq -o Dir::Etc::sourcelist="$state/sources.list" -o Dir::Etc::sourceparts=- -o Dir::State="$state"
    -o Dir::State::lists="$state/lists" -o Dir::State::status=/var/lib/dpkg/status -o Dir::Cache="$state/cache"
    -o APT::Sandbox::User= -o APT::Update::Error-Mode=any -o Acquire::Retries=2)
  "${apt[@]}" update || return 1
  if [ "${4-}" = --with-libraries ]; then
    # What a just-in-time compiler would need is left out (LLVM): it is not used, and most of the bytes.
    packages=$("${apt[@]}" -s --no-install-recommends install "$3/$2" | sed -nE 's/^Inst ([^ ]+) .*/\1/p' |
      grep -E "^(${3}|lib.*)\$" | grep -vE '^lib(llvm|z3|edit|bsd|md).*|-perl$') || return 1
  fi
  rm -rf "$state/deb" "$TOOLS/apt/root" && mkdir -p "$state/deb" "$TOOLS/apt/root"
  # shellcheck disable=SC2086  # words are wanted
  (cd "$state/deb" && "${apt[@]}" download $(printf "%s/$2 " $packages)) || return 1
  for deb in "$state/deb"/*.deb; do dpkg -x "$deb" "$TOOLS/apt/root"; done
}

# Into .tools/bin by rename, so that a program there is always a whole one.
install_tool() { # $1: file below .tools/apt/root
  mkdir -p "$TOOLS/bin"
  install -m 755 "$TOOLS/apt/root/$1" "$TOOLS/bin/.new"
  mv -f "$TOOLS/bin/.new" "$TOOLS/bin/$(basename "$1")"
  rm -rf "$TOOLS/apt"
}

# A whole tree, because PostgreSQL finds its parts by their place beside its programs. Readable by all: it refuses to run
# as root, so tests run it as somebody else.
install_postgres() {
  local tree=$TOOLS/apt/root
  rm -rf "$tree/usr/share/doc" "$tree/usr/share/man" "$tree/usr/share/locale" "$TOOLS/postgres"
  # Some libraries are in /lib of their package, which is /usr/lib on every Debian since 12.
  [ ! -d "$tree/lib" ] || cp -a "$tree/lib/." "$tree/usr/lib/"
  chmod -R a+rX "$tree/usr"
  rm -rf "$TOOLS/.postgres.new" && mkdir -p "$TOOLS/.postgres.new"
  mv "$tree/usr" "$TOOLS/.postgres.new/usr" && mv "$TOOLS/.postgres.new" "$TOOLS/postgres"
  rm -rf "$TOOLS/apt"
}

# skopeo is linked to libraries that not every machine has. They stay beside it, and a script of its name finds them.
install_skopeo() {
  local tree=$TOOLS/apt/root
  rm -rf "$TOOLS/.skopeo.new" "$TOOLS/skopeo" && mkdir -p "$TOOLS/.skopeo.new" "$TOOLS/bin"
  find "$tree" -name 'lib*.so*' -exec cp -a -t "$TOOLS/.skopeo.new" {} +
  cp "$tree/usr/bin/skopeo" "$TOOLS/.skopeo.new/skopeo" && mv "$TOOLS/.skopeo.new" "$TOOLS/skopeo"
  printf '#!/bin/sh\nlibraries=$(dirname "$0")/../skopeo\nLD_LIBRARY_PATH=$libraries exec "$libraries/skopeo" "$@"\n' >"$TOOLS/bin/.new"
  chmod 755 "$TOOLS/bin/.new" && mv -f "$TOOLS/bin/.new" "$TOOLS/bin/skopeo"
  rm -rf "$TOOLS/apt"
}

fetch_skopeo() {
  local mirror
  for mirror in $(debian_mirrors "$codename"); do
    say "fetching skopeo from $codename at $mirror"
    if fetch_deb "$mirror" "$codename" skopeo --with-libraries; then
      install_skopeo
      skopeo_done && return
    fi
    say "no usable skopeo in $codename at $mirror"
  done
  die "could not get skopeo: apt's sources name no reachable Debian mirror that has it"
}

# Tries every mirror until one has a PostgreSQL server: the one of this Debian.
fetch_postgres() {
  local mirror package
  case "$codename" in bookworm) package=postgresql-15 ;; *) package=postgresql-17 ;; esac
  for mirror in $(debian_mirrors "$codename"); do
    say "fetching $package from $codename at $mirror"
    if fetch_deb "$mirror" "$codename" "$package" --with-libraries; then
      install_postgres
      postgres_done && return
    fi
    say "no usable $package in $codename at $mirror"
  done
  die "could not get $package: apt's sources name no reachable Debian mirror that has it"
}

# Tries every mirror and suite until one has the package. A suite that is retired leaves the mirrors, so runsc falls
# back from backports to trixie's package, which is a static program and runs on any Debian.
fetch_tool() { # $1: package, $2: file in it, $3...: suites
  local package=$1 file=$2 mirror suite; shift 2
  for suite in "$@"; do
    for mirror in $(debian_mirrors "$codename"); do
      say "fetching $package from $suite at $mirror"
      if fetch_deb "$mirror" "$suite" "$package" && { [ "$package" != runsc ] || runsc_good "$TOOLS/apt/root/$file"; }; then
        install_tool "$file"
        return
      fi
      say "no usable $package in $suite at $mirror"
    done
  done
  die "could not get $package: apt's sources name no reachable Debian mirror that has it (tried: $*)"
}

# --- the plan, said before anything is done ---------------------------------------------------------------------

# Not the one of .venv itself, which is first on PATH for whoever followed the README, and about to be removed.
python=${PYTHON:-$(PATH=${PATH//$ROOT\/.venv\/bin:/} command -v python3 || true)}
plan=() skipped=() do_apt='' do_venv='' do_runsc='' do_registry='' do_umoci='' do_skopeo='' do_kubectl='' do_postgres=''

if ! venv_done; then
  do_venv=1
  if [ -z "$python" ] || ! python_works "$python"; then
    [ -z "${PYTHON-}" ] || die "$PYTHON can't be used: Python 3.11 or newer with venv and ensurepip is needed"
    is_debian || die "Python 3.11 or newer with venv and ensurepip is needed; set PYTHON=/path/to/python3"
    is_root || die "${python:-python3} can't make a virtual environment; as root: apt-get install python3-venv"
    do_apt=python3-venv python=/usr/bin/python3
    plan+=("Debian package python3-venv, into the system (apt-get install)")
  fi
  plan+=("Python packages of requirements/build.txt and requirements/$want.txt, hash-checked, into .venv")
fi

codename=$( (. /etc/os-release 2>/dev/null && echo "${VERSION_CODENAME-}") || true)
if ! runsc_done; then
  if ! is_root; then skipped+=("runsc: gVisor sandboxes need root; without it the process backend is used")
  elif ! is_debian; then skipped+=("runsc: this is not Debian; put a runsc of release $RUNSC_MIN or newer on PATH")
  else do_runsc=1; plan+=("runsc from Debian $codename-backports, signature-checked, into .tools/bin"); fi
fi
if [ "$want" = dev ] && ! registry_done; then
  if is_debian; then do_registry=1; plan+=("docker-registry from Debian $codename, signature-checked, into .tools/bin (tests only)")
  else skipped+=("docker-registry: this is not Debian; tests of registries need one on PATH"); fi
fi
for tool in umoci skopeo; do
  if [ "$want" != dev ] || "${tool}_done"; then continue; fi
  if is_debian; then declare "do_$tool=1"; plan+=("$tool from Debian $codename, signature-checked, into .tools/bin (tests only)")
  else skipped+=("$tool: this is not Debian; tests that compare with it need one on PATH"); fi
done
if [ "$want" = dev ] && ! kubectl_done; then
  if is_debian; then do_kubectl=1; plan+=("kubectl from Debian trixie, signature-checked, into .tools/bin (tests only)")
  else skipped+=("kubectl: this is not Debian; tests of the fake API server need one on PATH"); fi
fi
if [ "$want" = dev ] && ! postgres_done; then
  if is_debian; then do_postgres=1; plan+=("PostgreSQL's server from Debian $codename, signature-checked, into .tools/postgres (tests only)")
  else skipped+=("PostgreSQL: this is not Debian; tests of that store need a server of version 15 or newer on PATH"); fi
fi

for item in "${skipped[@]}"; do say "left out: $item (greenroom doctor tells more)"; done
[ "${#plan[@]}" -gt 0 ] || exit 0
say "will install:"
for item in "${plan[@]}"; do say "  - $item"; done

# --- do it ------------------------------------------------------------------------------------------------------

mkdir -p "$TOOLS"
exec 9>"$TOOLS/setup.lock"
flock -n 9 || { say "waiting for another setup in this directory"; flock 9; }

if [ -n "$do_apt" ]; then
  export DEBIAN_FRONTEND=noninteractive
  apt-get -qq install -y --no-install-recommends "$do_apt" >/dev/null 2>&1 ||
    { apt-get -qq update && apt-get -qq install -y --no-install-recommends "$do_apt" >/dev/null; }
  python_works "$python" || die "$python still can't make a virtual environment (is it older than 3.11?)"
fi

if [ -n "$do_venv" ] && ! venv_done; then
  # A virtual environment that was moved, or whose interpreter went away, is made anew; one cut off half-way goes on.
  if ! { .venv/bin/python -c '' && head -n 1 .venv/bin/pip | grep -qF "$ROOT/.venv/"; } 2>/dev/null; then
    rm -rf .venv
    "$python" -m venv .venv
  fi
  rm -f .venv/.greenroom-setup
  export PIP_DISABLE_PIP_VERSION_CHECK=1
  .venv/bin/python -m pip install -qq --require-hashes --only-binary :all: -r requirements/build.txt -r "requirements/$want.txt"
  .venv/bin/python -m pip install -qq --no-deps --no-build-isolation -e .
  echo "$want $(fingerprint "$want")" >.venv/.greenroom-setup
fi
if [ -n "$do_runsc" ] && ! runsc_done; then fetch_tool runsc usr/bin/runsc "$codename-backports" trixie; fi
if [ -n "$do_registry" ] && ! registry_done; then fetch_tool docker-registry usr/bin/docker-registry "$codename"; fi
if [ -n "$do_umoci" ] && ! umoci_done; then fetch_tool umoci usr/bin/umoci "$codename"; fi
if [ -n "$do_skopeo" ] && ! skopeo_done; then fetch_skopeo; fi
# Debian 12's is of 2020; trixie's runs on it too.
if [ -n "$do_kubectl" ] && ! kubectl_done; then fetch_tool kubectl usr/bin/kubectl trixie; fi
if [ -n "$do_postgres" ] && ! postgres_done; then fetch_postgres; fi
say "done"
