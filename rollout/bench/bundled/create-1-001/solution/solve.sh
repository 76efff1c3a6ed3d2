#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
mkdir -p "$(dirname 'slashes.md')"
printf '%s\n' 'window visible designed' 'being don offer' > 'slashes.md'
