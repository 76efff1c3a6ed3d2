#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
cat > anymore.py <<'EOF'
def reverse_text(hitting):
    return hitting[::-1]
EOF
