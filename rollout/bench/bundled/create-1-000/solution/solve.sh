#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
mkdir -p "$(dirname 'encoders/accessed.txt')"
printf '%s\n' 'mismatch container intw 13 ratio' '82 cpython compilers' '6' > 'encoders/accessed.txt'
