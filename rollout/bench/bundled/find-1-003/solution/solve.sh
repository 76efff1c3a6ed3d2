#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
find . -name 'wouldn.cfg' -exec cp '{}' ourselves.txt ';'
