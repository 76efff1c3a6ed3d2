"""What kills do to the lengths of finished rollouts: ours against starting again from the prompt.

One process after another works on the same rollouts (one prompt, drawn at a high temperature, so that lengths differ a
lot), and each kills itself with SIGKILL after a number of tokens that is drawn from an exponential distribution: a kill
rate per token.  `never` is never killed; `resumed` goes on from the log; `restarted` is what a service without a log of
tokens does (also one that resumes from memory or by turns: a SIGKILL leaves neither, and a rollout here is one turn):
what had ended is kept, the rest is drawn anew from the prompt.  Every length is that of a rollout that ended by itself.
What is counted as drawn is what a log has: what the engine had drawn ahead of it at a kill nobody has seen, in either.

The expectation (NVIDIA-NeMo/RL issue 3599 reports the effect in training): a rollout of l tokens survives a kill rate
of lambda a token with probability e^(-lambda*l), so restarting favours short ones.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dsec.testing import FakeSubstrate
from rollout.config import RolloutConfig
from rollout.engine import Sampling
from rollout.engines.embedded.engine import EmbeddedEngine
from rollout.events import Event
from rollout.generation import drawn_ids
from rollout.jobs import make_conversation, make_job
from rollout.ledger import Ledger
from rollout.main import load_tokenizer
from rollout.request import Job, Limits, NoReward
from rollout.service import RolloutService
from wal.tokens import TokensAppended

EXAMPLE = "example: python benchmarks/length_bias.py --rollouts 2000 --figure docs/figures/length_bias.svg"
MESSAGES = '[{"role": "user", "content": "Tell me a story."}]'
CONCURRENCY = 32
TOKENS_MAX = 512
TEMPERATURE = 2.0


def job_of(name: str, count: int, seed: int) -> tuple[Job, Any]:
    """`count` draws of the story, told apart (and keyed) by the job's name."""
    prompt = make_conversation("story", messages_json=MESSAGES)
    asked = Job(
        request_id=name,
        sampling=Sampling(temperature=TEMPERATURE, seed=seed),
        limits=Limits(turns_count_max=1, turn_tokens_count_max=TOKENS_MAX),
        reward=NoReward(),
        parse_policy="tolerant",
    )
    job = make_job(asked, [prompt], group_size=min(count, 1024), group_prefix=f"{name}/")
    return job, prompt


async def work(directory: Path, names: list[str], counts: list[int], seed: int, kill_after: int) -> None:
    """One process: submit what is not in the log, go on with the rest, and die after so many tokens (0: never)."""
    left = kill_after

    def observe(event: Event) -> None:
        nonlocal left
        if kill_after and isinstance(event, TokensAppended):
            left -= len(event.token_ids)
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    config = RolloutConfig(concurrency=CONCURRENCY, log_sync="interval(5)")
    service = RolloutService(directory, EmbeddedEngine(), FakeSubstrate(), load_tokenizer(), config, observe=observe)
    async with service:
        await service.start()
        for name, count in zip(names, counts, strict=True):
            job, prompt = job_of(name, count, seed)
            await service.submit(job, [prompt])
        for name in names:
            await service.wait(name)


class Contender:
    """One way to go on after a kill, over real processes."""

    def __init__(self, name: str, options: argparse.Namespace, directory: Path) -> None:
        self.name, self.options, self.directory = name, options, directory
        self.chance = random.Random(options.seed)  # noqa: S311 - the same kills for each, not a secret
        self.tokens: dict[str, tuple[int, ...]] = {}
        self.kills, self.drawn, self.regenerated = 0, 0, 0

    def run(self, progress: Progress) -> None:
        """Process after process until every rollout has ended by itself."""
        bar = progress.add_task(self.name, total=self.options.rollouts)
        attempt = 0
        while len(self.tokens) < self.options.rollouts:
            # What is drawn anew is drawn under new names: a service that lost its tokens cannot repeat them.
            fresh = self.name == "restarted"
            directory = self.directory / (f"{attempt}" if fresh else "log")
            left = self.options.rollouts - (len(self.tokens) if fresh else 0)
            names = [f"{attempt if fresh else 0}-{n}" for n in range(math.ceil(left / 1024))]
            counts = [min(1024, left - 1024 * n) for n in range(len(names))]
            kill_after = 0 if self.name == "never" else 1 + int(self.chance.expovariate(1 / self.options.kill_every))
            self._process(directory, names, counts, kill_after)
            self._collect(directory)
            progress.update(bar, completed=len(self.tokens))
            attempt += 1

    def _process(self, directory: Path, names: list[str], counts: list[int], kill_after: int) -> None:
        said = json.dumps({"names": names, "counts": counts, "seed": self.options.seed, "kill_after": kill_after})
        argv = [sys.executable, __file__, "--work", str(directory), said]
        ended = subprocess.run(argv, check=False, stderr=subprocess.PIPE)
        if ended.returncode not in (0, -signal.SIGKILL):
            raise SystemExit(f"a worker failed:\n{ended.stderr.decode()}")
        self.kills += ended.returncode != 0

    def _collect(self, directory: Path) -> None:
        ledger = Ledger.read(directory / "wal", load_tokenizer())
        ended = {i: drawn_ids(state) for i, state in ledger.rollouts.items() if ledger.is_done(i)}
        self.regenerated += ledger.tokens_regenerated.total()
        if self.name == "restarted":
            self.drawn += sum(state.sampled_count for state in ledger.rollouts.values())
        else:
            self.drawn = sum(state.sampled_count for state in ledger.rollouts.values())
        self.tokens |= ended


def ks_distance(first: list[int], second: list[int]) -> float:
    """Kolmogorov-Smirnov: the largest distance of the two empirical distributions."""
    counts = Counter(first), Counter(second)
    sums, largest = [0, 0], 0.0
    for value in sorted(counts[0] | counts[1]):
        sums = [sums[i] + counts[i][value] for i in (0, 1)]
        largest = max(largest, abs(sums[0] / len(first) - sums[1] / len(second)))
    return largest


def expected_mean(lengths: list[int], rate: float) -> float:
    """The mean after reweighting each length by its chance to survive."""
    weights = [math.exp(-rate * length) for length in lengths]
    return sum(length * weight for length, weight in zip(lengths, weights, strict=True)) / sum(weights)


def figures_of(contenders: dict[str, Contender], options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is printed, and the lengths for the picture."""
    lengths = {name: sorted(map(len, each.tokens.values())) for name, each in contenders.items()}
    means = {name: sum(values) / len(values) for name, values in lengths.items()}
    never = contenders["never"]
    per_rollout = CONCURRENCY / options.kill_every  # while it draws one token, the process draws that of all that run
    return {
        "rollouts": options.rollouts,
        "kill_every_tokens": options.kill_every,
        "kill_rate_per_token_of_a_rollout": per_rollout,
        "expected_mean_of_restarted": expected_mean(lengths["never"], per_rollout),
        "contenders": {
            name: {
                "kills": each.kills,
                "mean_length": means[name],
                "mean_shift": means[name] / means["never"] - 1,
                "ks_distance": ks_distance(lengths[name], lengths["never"]),
                "longer_than_200": sum(length > 200 for length in lengths[name]) / len(lengths[name]),
                "tokens_drawn": each.drawn,
                "tokens_thrown_away": each.drawn - sum(lengths[name]),
                "tokens_regenerated_in_log": each.regenerated,
                "equal_to_never": sum(each.tokens.get(i) == ids for i, ids in never.tokens.items()),
            }
            for name, each in contenders.items()
        },
        "lengths": lengths,
    }


def draw(figures: dict[str, Any], path: Path) -> None:
    """Which share of the rollouts is longer than l, for each contender, and what was drawn for nothing."""
    import matplotlib.pyplot as plt

    styles = {"never": ("#555555", 5.0, "never killed"), "resumed": ("#1b9e77", 1.8, "killed, resumed from the log")}
    styles["restarted"] = ("#d95f02", 1.8, "killed, restarted from the prompt")
    plot, (axes, beside) = plt.subplots(1, 2, figsize=(9.5, 4.2), layout="constrained", width_ratios=(3, 1))
    for name, (colour, width, label) in styles.items():
        each, values = figures["contenders"][name], figures["lengths"][name]
        share = [1 - number / len(values) for number in range(len(values))]
        axes.step(values, share, where="post", color=colour, lw=width, label=f"{label}: mean {each['mean_length']:.0f}")
        kept = each["tokens_drawn"] - each["tokens_thrown_away"]
        beside.bar(name, kept, color=colour)
        drawn = beside.bar(name, each["tokens_thrown_away"], bottom=kept, color="white", edgecolor=colour, hatch="///")
        beside.bar_label(drawn, [f"{each['tokens_thrown_away']:,}\nfor nothing"], fontsize="x-small", padding=2)
    axes.set(xlabel="length of a finished rollout, tokens", ylabel="share of rollouts at least as long", yscale="log")
    axes.set_ylim(1 / figures["rollouts"], 1.1)
    axes.legend(frameon=False)
    axes.grid(visible=True, alpha=0.3)
    beside.set(ylabel="tokens drawn")
    beside.margins(y=0.15)
    beside.tick_params(axis="x", labelsize="small")
    beside.spines[["top", "right"]].set_visible(False)
    plot.suptitle(f"{figures['rollouts']} rollouts, a SIGKILL every {figures['kill_every_tokens']} tokens on average")
    path.parent.mkdir(parents=True, exist_ok=True)
    plot.savefig(path, metadata={"Date": None})


def show(figures: dict[str, Any]) -> None:
    """The table."""
    table = Table("", "kills", "mean length", "shift", "KS", "> 200 tokens", "drawn", "thrown away", "equal to never")
    for name, each in figures["contenders"].items():
        table.add_row(
            name,
            str(each["kills"]),
            f"{each['mean_length']:.1f}",
            f"{each['mean_shift']:+.1%}",
            f"{each['ks_distance']:.3f}",
            f"{each['longer_than_200']:.1%}",
            str(each["tokens_drawn"]),
            str(each["tokens_thrown_away"]),
            f"{each['equal_to_never']} of {figures['rollouts']}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"kill rate {figures['kill_rate_per_token_of_a_rollout']:.4f} a token of a rollout; reweighting the lengths of "
        f"`never` by it gives a mean of {figures['expected_mean_of_restarted']:.1f} for `restarted`"
    )


def main() -> None:
    """Run the three, print, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=EXAMPLE)
    parser.add_argument("--rollouts", type=int, default=2000)
    parser.add_argument("--kill-every", type=int, default=6000, help="tokens of the process, on average")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="100 rollouts")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--figure", type=Path, help="where to draw the picture")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        said = json.loads(options.work[1])
        asyncio.run(work(Path(options.work[0]), said["names"], said["counts"], said["seed"], said["kill_after"]))
        return
    if options.quick:
        options.rollouts = 100
    contenders = {}
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as scratch,
        Progress(console=Console(stderr=True), disable=options.json) as progress,
    ):
        for name in ("never", "resumed", "restarted"):
            contenders[name] = Contender(name, options, Path(scratch) / name)
            contenders[name].run(progress)
    figures = figures_of(contenders, options)
    if options.figure is not None:
        draw(figures, options.figure)
    lengths = figures.pop("lengths")
    if options.json:
        print(json.dumps({**figures, "seconds": time.monotonic() - began, "lengths": lengths}))
    else:
        show(figures)


if __name__ == "__main__":
    main()
