#!/bin/bash
set -e
cd "${APP_DIR:-/app}"
cat > undone.py <<'EOF'
def case_spread(nums):
    return max(nums) - min(nums)
EOF
