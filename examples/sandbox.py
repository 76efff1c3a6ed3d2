"""A sandbox from Python: run commands, move files, go on from a snapshot.

    dsec edge serve &
    python examples/sandbox.py

Set DSEC_API_URL (and DSEC_API_KEY) to use the Edge of another host.
"""

from __future__ import annotations

from dsec import Sandbox

PROGRAM = b"import sys\nprint(sum(map(int, sys.stdin)))\n"


def main() -> None:
    """Do a little of everything."""
    with Sandbox.create(memory_bytes=256 << 20, metadata={"example": "sandbox"}) as sandbox:
        sandbox.files.write("/srv/add.py", PROGRAM)
        added = sandbox.commands.run("python3 /srv/add.py", stdin="1\n2\n39\n", check=True)
        print("sum", added.stdout.strip())

        for _ in range(2):  # the second one is answered from the log: it ran once
            once = sandbox.commands.run("echo run >> /srv/runs; wc -l < /srv/runs", key="step-1")
            print("runs", once.stdout.strip())

        server = sandbox.commands.run("while read -r line; do echo got $line; done", background=True, stdin=True)
        server.send_stdin("a\nb\n")
        server.close_stdin()
        print("said", server.wait().stdout.split("\n")[:2])

        slow = sandbox.commands.run("sleep 60", timeout_s=0.2)
        print("timed out", slow.timed_out, slow.exit_code)

        for fork in sandbox.fork(2):
            with fork:
                print("fork has", [entry.path for entry in fork.files.list("/srv")])


if __name__ == "__main__":
    main()
