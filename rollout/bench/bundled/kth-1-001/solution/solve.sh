#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
head -n 4 zyomxkye.txt > populated.csv
