#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
echo "wjjuke is $(sed -n 's/^wjjuke=//p' right.ini)." > "${LOGS_DIR:-/logs}/agent/answer.txt"
