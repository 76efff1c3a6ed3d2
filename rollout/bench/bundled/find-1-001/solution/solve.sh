#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
find . -name 'assertion.txt' -exec cp '{}' sun.txt ';'
