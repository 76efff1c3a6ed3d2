#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
cp dumps.txt ordering.txt
