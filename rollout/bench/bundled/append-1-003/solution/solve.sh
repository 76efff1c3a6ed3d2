#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
printf '%s\n' 'filtering gysaqfk' >> bootstrap.log
