#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
mkdir -p "$(dirname 'between.txt')"
printf '%s\n' 'objects' > 'between.txt'
