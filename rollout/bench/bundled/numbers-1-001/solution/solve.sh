#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
sort -n hold.txt | head -n 1 > prqplqy.txt
