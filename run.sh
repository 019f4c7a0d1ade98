#!/usr/bin/env bash
# The whole project in one script. Makes .venv with the project in it once, then does what is asked:
#   ./run.sh                    converts the checkpoint that ships in checkpoints/ and prints the summary
#   ./run.sh convert FLAGS …    python -m vit_convert FLAGS …
#   ./run.sh test [ARGS …]      formatting, types, import walls, the README's tables and the whole test suite
# PYTHON chooses the interpreter (3.11 or later), VENV the folder of the environment.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${VENV:-$root/.venv}

find_python() {
  for candidate in ${PYTHON:-} python3.12 python3.11 python3.13 python3; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then echo "$candidate"; return; fi
  done
  echo "run.sh: no Python 3.11 to 3.13 found; set PYTHON" >&2
  exit 1
}

# install EXTRAS: once for each state of pyproject.toml.
install() {
  local stamp="$venv/.installed-$1" want
  want=$(sha256sum "$root/pyproject.toml")
  [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && return
  [ -x "$venv/bin/python" ] || "$(find_python)" -m venv "$venv"
  echo "installing vit_convert[$1] into $venv (a minute or two, once)" >&2
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$root[$1]"
  echo "$want" > "$stamp"
}

command=${1:-demo}
[ $# -gt 0 ] && shift
case $command in
  demo)
    install all
    cd "$root" && exec "$venv/bin/python" -m vit_convert --config vit_digits.py --workdir out
    ;;
  convert)
    install all
    exec "$venv/bin/python" -m vit_convert "$@"
    ;;
  test)
    install all,test
    cd "$root"
    "$venv/bin/ruff" check .
    "$venv/bin/ruff" format --check .
    "$venv/bin/mypy"
    "$venv/bin/lint-imports"
    "$venv/bin/python" benchmarks/tables.py --check README.md
    exec "$venv/bin/python" -m pytest -n "${TEST_PROCESSES:-2}" -m "not gpu" "$@"
    ;;
  *)
    sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
