# shellcheck shell=bash
# Sourced with pip's arguments: where PYTHON is empty, makes .venv, installs into it, and sets PYTHON to its python.

# new_enough python [modules]: whether the packages of requirements.txt take it, and it has these modules.
new_enough() { "$1" -c "import sys${2:+, $2}; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; }

if [ -z "$PYTHON" ]; then
  PYTHON=.venv/bin/python
  if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
    for python in python3 python3.14 python3.13 python3.12 python3.11 ""; do  # Ubuntu 22.04 calls 3.10 python3
      ! new_enough "$python" ensurepip || break
    done
    [ -n "$python" ] || {
      echo "error: found no python3 of 3.11 or newer that has venv: install one (apt install python3.11-venv), or set PYTHON" >&2
      exit 2
    }
    "$python" -m venv .venv
  fi
  new_enough "$PYTHON" || {
    echo "error: .venv has $("$PYTHON" --version), expected 3.11 or newer: delete .venv and run this again" >&2
    exit 2
  }
  "$PYTHON" -m pip install --quiet "$@"
fi
