#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
grep -c 'elsewhere' years.txt > reduced_virtual.txt
