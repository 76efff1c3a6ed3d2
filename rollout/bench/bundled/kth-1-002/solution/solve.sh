#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
tail -n 2 platbase_prepare.txt > variant.md
