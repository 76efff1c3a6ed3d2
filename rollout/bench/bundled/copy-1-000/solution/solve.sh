#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
cp little.txt emitted.txt
