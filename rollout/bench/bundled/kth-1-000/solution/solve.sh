#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
head -n 3 queued_mutated.log > matter.cfg
