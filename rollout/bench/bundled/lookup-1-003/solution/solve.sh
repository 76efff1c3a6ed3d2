#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
echo "textual is $(sed -n 's/^textual=//p' thread.env)." > "${LOGS_DIR:-/logs}/agent/answer.txt"
