#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
wc -w < sources.txt > codes_indicates.csv
