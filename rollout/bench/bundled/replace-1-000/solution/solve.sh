#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
sed -i 's/library/getatime/g' signals_analogous.md
