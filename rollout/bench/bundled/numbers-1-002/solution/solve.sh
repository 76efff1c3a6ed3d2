#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
sort -n subscript.txt | tail -n 1 > caching.md
