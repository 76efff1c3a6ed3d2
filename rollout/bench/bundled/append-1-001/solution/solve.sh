#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
printf '%s\n' '4' >> wakeup.csv
