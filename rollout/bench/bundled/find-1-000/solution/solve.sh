#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
find . -name 'unpacked_khsih.txt' -exec cp '{}' asking.txt ';'
