#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
wc -w < executed_ignored.txt > seeking.csv
