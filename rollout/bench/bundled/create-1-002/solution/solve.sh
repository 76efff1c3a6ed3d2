#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
mkdir -p "$(dirname 'powerful/popitem.cfg')"
printf '%s\n' 'redirect 7639 visited' > 'powerful/popitem.cfg'
