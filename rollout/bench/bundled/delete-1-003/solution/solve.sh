#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
rm folding.txt
