#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
cat > urlparse.py <<'EOF'
def indents_upper(isdir):
    return isdir.upper()
EOF
