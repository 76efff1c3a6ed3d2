#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
mkdir -p "$(dirname 'slashes.md')"
printf '%s\n' 'windows visit desirable' 'behaves dont offset' > 'slashes.md'
