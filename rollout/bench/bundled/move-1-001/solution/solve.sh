#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
mkdir -p "$(dirname 'registry/matters.txt')"
mv matters.txt registry/matters.txt
