#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
echo "primarily is $(sed -n 's/^primarily=//p' nchannels.env)." > "${LOGS_DIR:-/logs}/agent/answer.txt"
