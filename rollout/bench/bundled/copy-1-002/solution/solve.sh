#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
cp windows_dealing.txt stdout.txt
