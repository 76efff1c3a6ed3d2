#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
find . -name 'supply_exposes.txt' -exec cp '{}' better.csv ';'
