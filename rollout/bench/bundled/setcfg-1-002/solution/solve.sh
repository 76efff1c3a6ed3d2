#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
sed -i 's/^content=.*/content=3231/' aka.env
