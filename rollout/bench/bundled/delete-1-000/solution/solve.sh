#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
rm exactly.txt
