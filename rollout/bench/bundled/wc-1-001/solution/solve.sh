#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
wc -l < mkdtemp.log > licenses.txt
