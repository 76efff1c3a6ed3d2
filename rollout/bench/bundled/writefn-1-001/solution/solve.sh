#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
cat > urlsplit.py <<'EOF'
def indented_upper(isdigit):
    return isdigit.upper()
EOF
