#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
tail -n 4 reuse.txt > remove.cfg
