#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
grep -c 'elsewhere' years.txt > reduce_violation.txt
