# Sourced by the other scripts: a virtual environment with this project in it, made once and reused.
#
#   prepare_venv [EXTRA]    creates or updates $VENV (default .venv) with $PYTHON (default python3) and sets $BIN
#
# A stamp in the environment says for which pyproject.toml, and with which extra, it was last installed.

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }

prepare_venv() {
  local extra="${1:-}" venv="${VENV:-.venv}" python="${PYTHON:-python3}" wanted
  BIN="$venv/bin"
  if [ ! -x "$BIN/pip" ]; then
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      say "Error: $python is missing or older than Python 3.11; name another one, as in PYTHON=python3.12 bash $0."
      exit 1
    fi
    say "Creating $venv with $("$python" --version)"
    "$python" -m venv "$venv"
  fi
  wanted="$("$BIN/python" -c 'import hashlib; print(hashlib.sha256(open("pyproject.toml", "rb").read()).hexdigest())')"
  # What was installed with an extra serves without it too.
  if grep -qs "^$wanted $extra" "$venv/.specattn"; then return; fi
  say "Installing into $venv (once; some minutes)"
  "$BIN/python" -m pip install -qq --disable-pip-version-check --editable ".${extra:+[$extra]}"
  printf '%s %s\n' "$wanted" "$extra" >"$venv/.specattn"
}
