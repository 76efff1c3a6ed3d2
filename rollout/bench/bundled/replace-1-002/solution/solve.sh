#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
sed -i 's/exists/sign/g' misc_handle.txt
