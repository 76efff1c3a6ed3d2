#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
grep -c 'send' sense.cfg > helpers_octal.txt
