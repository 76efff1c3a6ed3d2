#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
sed -i 's/zones/tlumtki/g' room.cfg
