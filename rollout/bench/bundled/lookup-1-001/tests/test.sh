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
grep -qwF -e '1246' "$answer" || wrong 'the final message does not say 1246'
grep -qwF -e 'wrong' "$answer" && wrong 'the final message says wrong'
grep -qwF -e '6' "$answer" && wrong 'the final message says 6'
grep -qwF -e '960' "$answer" && wrong 'the final message says 960'
grep -qwF -e '768' "$answer" && wrong 'the final message says 768'
grep -qwF -e '9' "$answer" && wrong 'the final message says 9'
grep -qwF -e '940' "$answer" && wrong 'the final message says 940'
mkdir -p "$logs/verifier"
echo "$reward" > "$logs/verifier/reward.txt"
