#!/bin/sh
# Print the first Python of the given versions that really runs (a pyenv shim on the PATH may not),
# or nothing. Usage: tools/find_python.sh 3.13 3.12
for version in "$@"; do
    for python in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/python python3 python; do
        if "$python" -c "import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null; then
            command -v "$python"
            exit 0
        fi
    done
done
