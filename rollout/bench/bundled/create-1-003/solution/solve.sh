#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
mkdir -p "$(dirname 'besides.txt')"
printf '%s\n' 'obsolete' > 'besides.txt'
