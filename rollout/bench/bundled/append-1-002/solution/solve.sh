#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
printf '%s\n' 'inter binding 61' >> behind_finish.txt
