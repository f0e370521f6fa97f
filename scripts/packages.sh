#!/usr/bin/env bash
# Installs the Debian packages whose programs the tests start, where they are missing. Nothing is started here.
set -euo pipefail
missing=()
[ -x "$(command -v prometheus)" ] || missing+=(prometheus)
[ ${#missing[@]} -eq 0 ] && exit 0
if ! command -v apt-get >/dev/null; then
    echo "error: ${missing[*]} not found; install it and put it on PATH (tests start it)" >&2
    exit 2
fi
sudo=""
[ "$(id -u)" -eq 0 ] || sudo="sudo -n"
echo "installing ${missing[*]} (Debian packages) ..."
export DEBIAN_FRONTEND=noninteractive
# the packages must not start services of their own: policy-rc.d says no while they are installed
guard=/usr/sbin/policy-rc.d
if [ ! -e "$guard" ]; then
    printf '#!/bin/sh\nexit 101\n' | $sudo tee "$guard" >/dev/null
    $sudo chmod +x "$guard"
    trap '$sudo rm -f "$guard"' EXIT
fi
$sudo apt-get -qq update
$sudo apt-get -qq install -y --no-install-recommends "${missing[@]}" >/dev/null
