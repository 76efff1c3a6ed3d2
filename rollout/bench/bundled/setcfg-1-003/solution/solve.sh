#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
sed -i 's/^expansion=.*/expansion=569/' ggxwqvy.env
