#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
sed -i 's/^unquoted=.*/unquoted=leap/' sdist_wins.ini
