#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
wc -w < spaces.txt > cmp_indicated.csv
