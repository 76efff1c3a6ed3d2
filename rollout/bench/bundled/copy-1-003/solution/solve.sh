#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
cp dup.txt ordinary.txt
