#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
wc -l < weird.txt > expansion.txt
