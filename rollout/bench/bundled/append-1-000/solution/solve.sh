#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
printf '%s\n' 'variable requested divide regex loadable' >> rmtree.txt
