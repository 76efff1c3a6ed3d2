#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
mkdir -p "$(dirname 'registry/maximal.txt')"
mv maximal.txt registry/maximal.txt
