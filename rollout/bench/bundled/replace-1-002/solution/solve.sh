#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
sed -i 's/exists/signaled/g' misc_handler.txt
