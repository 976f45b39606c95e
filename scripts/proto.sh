#!/usr/bin/env bash
# Generates the code of the wire protocol again from src/greenroom/api/proto; needs the development environment.
set -euo pipefail
cd "$(dirname "$0")/.."
exec .venv/bin/python scripts/proto.py
