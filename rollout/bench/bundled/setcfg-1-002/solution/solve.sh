#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
sed -i 's/^contexts=.*/contexts=3231/' alert.env
