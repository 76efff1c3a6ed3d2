#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
cp winerror_deal.txt steps.txt
