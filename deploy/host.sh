#!/bin/bash
# What the host must have before the virtual environment: Python 3.11 with venv, a C compiler with a static libc,
# and below /usr what the default sandbox base shows (bash, python3, tar).  On Debian, root gets what is missing.
set -eu

missing=()
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || missing+=(python3)
python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
command -v "${CC:-gcc}" >/dev/null || missing+=(gcc libc6-dev)
probe=$(mktemp -d)
trap 'rm -rf "$probe"' EXIT
if command -v "${CC:-gcc}" >/dev/null; then
    echo 'int main(void) { return 0; }' > "$probe/probe.c"
    "${CC:-gcc}" -static -o "$probe/probe" "$probe/probe.c" 2>/dev/null || missing+=(libc6-dev)
fi
[ -x /usr/bin/python3 ] || [ -x /usr/local/bin/python3 ] || missing+=(python3-minimal)
[ -x /usr/bin/bash ] || missing+=(bash)
[ -x /usr/bin/tar ] || missing+=(tar)
if [ "${1:-}" = dev ]; then # for the tests: the file list, sanitizers, process tools inside sandboxes
    command -v git >/dev/null || missing+=(git)
    command -v pgrep >/dev/null || missing+=(procps)
    command -v fsck.erofs >/dev/null || missing+=(erofs-utils) # layers: an opinion of its own, and compression
    command -v zstd >/dev/null || missing+=(zstd)
    compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || missing+=(postgresql) # an index that workers share
    for library in libasan:libasan8 libubsan:libubsan1; do
        "${CC:-gcc}" -print-file-name="${library%%:*}.so" 2>/dev/null | grep -q / || missing+=("${library##*:}")
    done
fi

[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    echo "installing ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
else
    echo "this host lacks: ${missing[*]}; install them (Debian: apt-get install ${missing[*]}), then try again" >&2
    exit 1
fi
