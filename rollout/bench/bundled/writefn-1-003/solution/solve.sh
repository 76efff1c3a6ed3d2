#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
cat > represent.py <<'EOF'
def pipe_reverse_text(u):
    return u[::-1]
EOF
