#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
wc -w < executed_ignore.txt > seeking.csv
