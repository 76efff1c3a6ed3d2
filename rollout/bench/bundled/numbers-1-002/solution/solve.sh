#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
sort -n subtract.txt | tail -n 1 > cached.md
