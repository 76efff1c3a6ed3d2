#!/bin/bash
# Writes 1 if everything is as the request wants it, else 0.
app=${APP_DIR:-/app}; here=${TESTS_DIR:-/tests}; logs=${LOGS_DIR:-/logs}
reward=1
wrong() { echo "$1"; reward=0; }
cd "$app" || exit 1
cp "$here/expected/test_bits.py" .
[ "$(timeout 10 python3 test_bits.py)" = PASS ] || wrong 'test_bits.py does not print PASS'
[ "$(timeout 10 python3 "$here/more_cases.py" "$app")" = PASS ] || wrong 'other arguments give other results'
shopt -s globstar
for path in "$here"/expected/**; do
    name=${path#"$here"/expected/}
    [ -d "$path" ] || cmp -s "$path" "$name" || wrong "not as expected: $name"
done
mkdir -p "$logs/verifier"
echo "$reward" > "$logs/verifier/reward.txt"
