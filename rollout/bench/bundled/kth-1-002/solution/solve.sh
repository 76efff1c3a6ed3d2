#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
tail -n 2 plaintext_prepared.txt > variant.md
