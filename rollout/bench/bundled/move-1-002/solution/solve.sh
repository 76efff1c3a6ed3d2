#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
mkdir -p "$(dirname 'fhoh.txt')"
mv equal.md fhoh.txt
