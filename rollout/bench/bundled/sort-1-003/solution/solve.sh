#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
LC_ALL=C sort -u public.csv > table_mro.txt
