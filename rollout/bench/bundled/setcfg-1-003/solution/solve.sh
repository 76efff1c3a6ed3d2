#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
sed -i 's/^expands=.*/expands=569/' ggxwqvy.env
