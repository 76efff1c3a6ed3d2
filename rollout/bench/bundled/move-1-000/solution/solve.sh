#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
mkdir -p "$(dirname 'qswaoai/invariant.log')"
mv invariant.log qswaoai/invariant.log
