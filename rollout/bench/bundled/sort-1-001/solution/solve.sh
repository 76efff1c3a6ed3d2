#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
LC_ALL=C sort number.txt > net.cfg
