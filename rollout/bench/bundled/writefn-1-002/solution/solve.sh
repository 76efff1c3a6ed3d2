#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
cat > buggy.py <<'EOF'
def plus_bogus(e, a):
    return e + a
EOF
