#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
find . -name 'sunos_expr.txt' -exec cp '{}' big.csv ';'
