#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
LC_ALL=C sort -u published.csv > tabsize_moving.txt
