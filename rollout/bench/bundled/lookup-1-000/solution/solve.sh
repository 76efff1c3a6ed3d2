#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
echo "near is $(sed -n 's/^near=//p' these.env)." > "${LOGS_DIR:-/logs}/agent/answer.txt"
