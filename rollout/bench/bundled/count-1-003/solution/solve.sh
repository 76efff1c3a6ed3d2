#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
grep -c 'prozb' expands_temporary.txt > patterns_pre.md
