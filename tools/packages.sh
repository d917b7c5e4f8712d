#!/bin/sh
# Install what debian-packages.txt lists and this host lacks; say how where that cannot be done.
set -eu
missing=
for package in $(sed 's/#.*//' debian-packages.txt); do
    if command -v dpkg-query > /dev/null; then
        status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2> /dev/null || true)
        [ "$status" = installed ] || missing="$missing $package"
    fi
done
[ -n "$missing" ] || exit 0
if ! command -v apt-get > /dev/null; then
    echo "note: no apt-get here; tests that need these packages will be skipped:$missing" >&2
    exit 0
fi
if [ "$(id -u)" = 0 ]; then
    sudo=
elif sudo -n true 2> /dev/null; then
    sudo="sudo -n"
else
    echo "note: some packages are missing, and their tests will be skipped. To install them:" >&2
    echo "    sudo apt-get install --no-install-recommends$missing" >&2
    exit 0
fi
echo "==> installing:$missing"
if ! { DEBIAN_FRONTEND=noninteractive $sudo apt-get install -qq --no-install-recommends $missing > /dev/null \
    || { $sudo apt-get update -qq \
        && DEBIAN_FRONTEND=noninteractive $sudo apt-get install -qq --no-install-recommends $missing > /dev/null; }; }; then
    echo "note: apt-get could not install them; their tests will be skipped:$missing" >&2
fi
