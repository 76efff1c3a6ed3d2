#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
printf '%s\n' 'interact big 61' >> behave_finish.txt
