#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
cat > nested.py <<'EOF'
def human_multiply(i, k):
    return i * k
EOF
