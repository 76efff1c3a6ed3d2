#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
head -n 3 quickly_mutated.log > matters.cfg
