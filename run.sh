#!/usr/bin/env bash
# The whole project in one script. Creates .venv with the project in it once, then does what is asked:
#   ./run.sh                    converts the checkpoint that ships in checkpoints/ and prints the summary
#   ./run.sh convert FLAGS …    python -m vit_convert FLAGS …
#   ./run.sh serve [BUNDLE …]   a Triton server of it on this machine, without a GPU, at http://127.0.0.1:8000
#                               (Linux on x86-64)
#   ./run.sh test [ARGS …]      formatting, types, import walls, the docs' tables and the whole test suite
#   ./run.sh python             prints the interpreter that would be used, and installs nothing
# PYTHON chooses the interpreter: a version (3.12) or a path; VENV the folder of the environment, WORKDIR the folder for
# bundles.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${VENV:-$root/.venv}
workdir=${WORKDIR:-out}
versions="3.12 3.11 3.13" # in the order of preference

# Prints the real path of a candidate interpreter, if it runs (a pyenv shim may not), has the version, and can create
# environments.
interpreter() {
  "$1" -c '
import sys
import ensurepip, venv
if sys.argv[1] in ("", "%d.%d" % sys.version_info[:2]): print(sys.executable)
' "$2" 2>/dev/null | grep .
}

# Prints the interpreter of a version: from PATH under any name, or else from where pyenv, uv, conda and distributions
# keep theirs.
find_version() {
  local candidate
  for candidate in "python$1" python3 python "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/$1".*/bin/python \
    "${HOME:-}/.local/share/uv/python/cpython-$1".*/bin/python /opt/conda/bin/python \
    {/usr/local,/usr,/opt/homebrew}/bin/python"$1"; do
    interpreter "$candidate" "$1" && return
  done
  return 1
}

find_python() {
  local version
  if [[ ${PYTHON:-} == *[!0-9.]* ]]; then
    interpreter "$PYTHON" "" && return
    echo "run.sh: PYTHON=$PYTHON is not an interpreter that can create environments (venv, ensurepip)" >&2
    exit 1
  fi
  for version in ${PYTHON:-$versions}; do
    find_version "$version" && return
  done
  echo "run.sh: no Python ${PYTHON:-$versions} found that can create environments (venv, ensurepip); set PYTHON" >&2
  exit 1
}

# Describes an interpreter, as in "3.12.1 of /usr/bin"; fails if it does not run.
describe() {
  "$1" -c 'import pip, sys; print("%d.%d.%d of %s" % (*sys.version_info[:3], sys.base_prefix))' 2>/dev/null
}

# Creates the environment, unless there is one that runs and has the requested Python.
make_venv() {
  local python now wanted
  now=$(describe "$venv/bin/python" || true)
  if [ -n "$now" ]; then
    [ -z "${PYTHON:-}" ] && [[ " $versions " == *" ${now%.* of *} "* ]] && return
    python=$(find_python)
    wanted=$(describe "$python" ||
      "$python" -c 'import sys; print("%d.%d.%d of %s" % (*sys.version_info[:3], sys.base_prefix))')
    [ "$now" = "$wanted" ] && return
    echo "run.sh: $venv has Python $now; created anew with $wanted" >&2
  else
    python=$(find_python)
    if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
      echo "run.sh: VENV=$venv is a folder, but not an environment; it is left as it is" >&2
      exit 1
    fi
    [ -e "$venv/pyvenv.cfg" ] && echo "run.sh: $venv does not run any more; created anew" >&2
  fi
  "$python" -m venv --clear "$venv"
}

# install EXTRAS: once for each state of pyproject.toml, interpreter and location of the project.
install() {
  local stamp="$venv/.installed-$1" want
  make_venv
  want=$(describe "$venv/bin/python"; echo "$root"; sha256sum < "$root/pyproject.toml")
  [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && return
  echo "installing vit_convert[$1] for Python $(describe "$venv/bin/python") into $venv (a minute or two, once)" >&2
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$root[$1]"
  echo "$want" > "$stamp"
}

command=${1:-demo}
[ $# -gt 0 ] && shift
case $command in
  demo)
    install all
    cd "$root" && exec "$venv/bin/python" -m vit_convert --config vit_digits.py --workdir "$workdir"
    ;;
  convert)
    install all
    exec "$venv/bin/python" -m vit_convert "$@"
    ;;
  serve)
    install all
    if [ $# = 0 ]; then
      cd "$root"
      "$venv/bin/python" -m vit_convert --config vit_digits.py --workdir "$workdir"
      set -- "$workdir/vit_digits"
    fi
    python=$venv/bin/python
    venv=$venv-triton # an environment of its own: the server's Python needs an older NumPy
    install triton
    exec "$python" -m vit_convert.serve.triton "$@" --output="$workdir/models" --serve --stay --port=8000 \
      --environment="$venv"
    ;;
  test)
    install all,test
    cd "$root"
    echo "Python $(describe "$venv/bin/python")" >&2
    "$venv/bin/ruff" check .
    "$venv/bin/ruff" format --check .
    "$venv/bin/mypy"
    "$venv/bin/lint-imports"
    "$venv/bin/python" benchmarks/tables.py --check README.md docs/*.md
    exec "$venv/bin/python" -m pytest -n "${TEST_PROCESSES:-2}" -m "not gpu" "$@"
    ;;
  python)
    find_python
    ;;
  *)
    sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
