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
grep -qwF -e 'gfd' "$answer" || wrong 'the final message does not say gfd'
grep -qwF -e '65' "$answer" && wrong 'the final message says 65'
grep -qwF -e 'zmoyunjp' "$answer" && wrong 'the final message says zmoyunjp'
grep -qwF -e '7' "$answer" && wrong 'the final message says 7'
grep -qwF -e 'finished' "$answer" && wrong 'the final message says finished'
grep -qwF -e 'expects' "$answer" && wrong 'the final message says expects'
grep -qwF -e 'means' "$answer" && wrong 'the final message says means'
mkdir -p "$logs/verifier"
echo "$reward" > "$logs/verifier/reward.txt"
