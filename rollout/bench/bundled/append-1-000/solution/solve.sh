#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
printf '%s\n' 'variable requested division regex loadable' >> rmdir.txt
