#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
cat > anywhere.py <<'EOF'
def reverse_text(holding):
    return holding[::-1]
EOF
