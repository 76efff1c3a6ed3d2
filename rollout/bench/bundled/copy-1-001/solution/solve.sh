#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
cp waiters_moving.txt prev.csv
