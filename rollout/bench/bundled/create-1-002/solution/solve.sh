#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
mkdir -p "$(dirname 'powerful/popleft.cfg')"
printf '%s\n' 'reduced 7639 void' > 'powerful/popleft.cfg'
