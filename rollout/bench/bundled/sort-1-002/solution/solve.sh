#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
LC_ALL=C sort supplying.log > mid.txt
