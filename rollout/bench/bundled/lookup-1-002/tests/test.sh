#!/bin/bash
# Writes 1 if everything is as the request wants it, else 0.
app=${APP_DIR:-/app}; here=${TESTS_DIR:-/tests}; logs=${LOGS_DIR:-/logs}
reward=1
wrong() { echo "$1"; reward=0; }
cd "$app" || exit 1
shopt -s globstar
for path in "$here"/expected/**; do
    name=${path#"$here"/expected/}
    [ -d "$path" ] || cmp -s "$path" "$name" || wrong "not as expected: $name"
done
answer=$logs/agent/answer.txt
grep -qwF -e 'tools' "$answer" || wrong 'the final message does not say tools'
grep -qwF -e '60' "$answer" && wrong 'the final message says 60'
grep -qwF -e '4533' "$answer" && wrong 'the final message says 4533'
grep -qwF -e 'saved' "$answer" && wrong 'the final message says saved'
grep -qwF -e 'pveucjl' "$answer" && wrong 'the final message says pveucjl'
grep -qwF -e '9150' "$answer" && wrong 'the final message says 9150'
mkdir -p "$logs/verifier"
echo "$reward" > "$logs/verifier/reward.txt"
