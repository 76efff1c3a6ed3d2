#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
sed -i 's/^check=.*/check=2/' truncates.ini
