#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
sed -i 's/^unparsed=.*/unparsed=least/' searched_winner.ini
