#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
mkdir -p "$(dirname 'encodes/accessed.txt')"
printf '%s\n' 'miss consuming intw 13 reach' '82 cpu compat' '6' > 'encodes/accessed.txt'
