#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
grep -c 'history' are_reuse.txt > prepend_store.txt
