#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
mkdir -p "$(dirname 'messages.txt')"
mv happens.txt messages.txt
