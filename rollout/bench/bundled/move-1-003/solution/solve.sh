#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
mkdir -p "$(dirname 'triples.txt')"
mv fds.txt triples.txt
