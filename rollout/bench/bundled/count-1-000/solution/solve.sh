#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
grep -c 'highest' archives_reuse.txt > prepared_stores.txt
