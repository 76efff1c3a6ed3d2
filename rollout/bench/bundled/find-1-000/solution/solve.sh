#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
find . -name 'unpacking_khsih.txt' -exec cp '{}' arrow.txt ';'
