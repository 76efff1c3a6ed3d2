#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
sed -i 's/modifies/behave/g' machinery.txt
