#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
printf '%s\n' 'filled gysaqfk' >> bother.log
