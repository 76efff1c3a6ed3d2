#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
grep -c 'semaphore' sendto.cfg > held_odd.txt
