#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
LC_ALL=C sort sensitive.txt > various.txt
