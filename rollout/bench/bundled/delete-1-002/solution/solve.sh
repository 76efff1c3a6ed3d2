#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
rm inherit_stderr.csv
