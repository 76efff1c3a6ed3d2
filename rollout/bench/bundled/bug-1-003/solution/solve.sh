#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
cat > bits.py <<'EOF'
def multiply(h, b):
    return h * b
EOF
