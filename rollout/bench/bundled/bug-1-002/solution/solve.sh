#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
cat > div.py <<'EOF'
def double_all(values):
    return [v * 2 for v in values]


def subtract(y, d):
    return y - d
EOF
