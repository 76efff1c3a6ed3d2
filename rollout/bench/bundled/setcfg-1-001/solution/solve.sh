#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
sed -i 's/^charset=.*/charset=2/' truth.ini
