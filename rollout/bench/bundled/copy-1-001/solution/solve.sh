#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
cp waiters_moves.txt prev.csv
