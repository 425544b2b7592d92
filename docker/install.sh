#!/bin/sh
# Install Rivulet into a virtual environment: the one script behind `make run`, `make test` and the images.
#
#   docker/install.sh VENV [auto|cpu|cuda] [WHAT...]     e.g.  docker/install.sh .venv auto -e '.[test]'
#
# VENV is made where it is missing or broken. `auto` is cuda where nvidia-smi lists a GPU, otherwise cpu. WHAT
# goes to `pip install`, by default this project. From the environment:
#   PYTHON                 the interpreter that makes VENV (default: python3)
#   RIVULET_TORCH_INDEX    package index for torch alone. Without it torch comes from pip's own index, whose
#                          build may carry several GB of CUDA; PyTorch's index for CPU wheels has a small one.
set -eu

say() { printf '==> %s\n' "$*"; }
fail() {
    printf 'install: %s\n' "$*" >&2
    exit 1
}

[ $# -ge 1 ] || fail "usage: install.sh VENV [auto|cpu|cuda] [WHAT...]"
venv=$1
shift
device=${1:-auto}
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- "$(cd "$(dirname "$0")/.." && pwd)"
python=${PYTHON:-python3}
debian='On Debian or Ubuntu: sudo apt install'

if [ "$device" = auto ]; then
    device=cpu
    if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then device=cuda; fi
fi
case $device in
cpu) torch='torch==2.13.0' ;; # the release that the tests run on
cuda) torch='torch>=2.13' ;;  # what pyproject.toml asks for
*) fail "the device is auto, cpu or cuda, not '$device'" ;;
esac

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    command -v "$python" >/dev/null ||
        fail "Python 3.11 or newer is needed, and there is no '$python'. $debian python3-venv"
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "Python 3.11 or newer is needed, and '$python' is $version. Name another: PYTHON=python3.12"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "'$python' cannot make virtual environments. $debian python$version-venv"
    say "Python $version makes $venv"
    "$python" -m venv --clear "$venv"
fi

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
quiet=
[ -t 1 ] || quiet=--quiet # pip's progress bars are for a terminal only
pip() { "$venv/bin/python" -m pip install $quiet "$@"; }

say "installing $torch for $device${RIVULET_TORCH_INDEX:+ from RIVULET_TORCH_INDEX}"
pip ${RIVULET_TORCH_INDEX:+--index-url "$RIVULET_TORCH_INDEX"} "$torch"
say "installing $*"
pip "$@"
say "installed in $venv"
