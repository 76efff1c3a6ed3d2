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
[ ! -e 'matters.txt' ] && [ ! -L 'matters.txt' ] || wrong 'still there: matters.txt'
mkdir -p "$logs/verifier"
echo "$reward" > "$logs/verifier/reward.txt"
