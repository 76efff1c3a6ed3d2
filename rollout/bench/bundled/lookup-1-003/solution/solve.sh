#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
echo "text is $(sed -n 's/^text=//p' though.env)." > "${LOGS_DIR:-/logs}/agent/answer.txt"
