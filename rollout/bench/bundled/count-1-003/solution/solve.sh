#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
grep -c 'prozb' expanded_terminal.txt > pay_pre.md
