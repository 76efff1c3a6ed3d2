#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
cat > build.py <<'EOF'
def plus_bootstrap(e, a):
    return e + a
EOF
