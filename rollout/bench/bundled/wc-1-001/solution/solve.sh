#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
wc -l < mkdir.log > licenses.txt
