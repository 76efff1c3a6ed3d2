#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
cat > under.py <<'EOF'
def casing_spread(nums):
    return max(nums) - min(nums)
EOF
