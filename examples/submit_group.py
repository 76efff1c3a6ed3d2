"""Submit a group of rollouts of one task to `dsec serve` and print rewards as they arrive.

python examples/submit_group.py 127.0.0.1:7710 copy-1-000     (a bundled task, or a task folder)
"""

import sys
import time
from pathlib import Path

import grpc

from rollout.pb.v1 import rollout_pb2 as pb
from rollout.pb.v1.rollout_pb2_grpc import RolloutServiceStub


def main(address: str, task: str) -> None:
    """One job; the same request again attaches to it, also after a crash of either side."""
    request = pb.SubmitRequest(request_id=f"example-{Path(task).name}", group_size=4, return_mask=[pb.FIELD_TOKENS])
    request.sampling.MergeFrom(pb.Sampling(temperature=1.0, seed=7))
    if (folder := Path(task)).is_dir():
        files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        request.tasks.add(name=folder.resolve().name, files=files)
    else:
        request.bundled_tasks.append(task)
    rewards = {}
    with grpc.insecure_channel(address) as channel:
        while True:
            try:
                for update in RolloutServiceStub(channel).Submit(request):
                    if update.WhichOneof("what") == "finished" and update.rollout_id not in rewards:
                        rewards[update.rollout_id] = value = update.finished.reward.value
                        print(update.rollout_id, value, len(update.finished.token_ids), "tokens", flush=True)
                    elif update.WhichOneof("what") == "infra_failed":  # the service, not the model: no reward, not 0
                        print(update.rollout_id, update.infra_failed.message, file=sys.stderr)
                break
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    sys.exit(f"{address}: {error.details()}")
                print(f"{address}: {error.details()}; asking again", file=sys.stderr, flush=True)
                time.sleep(1)  # it starts, or another worker takes the job over
    print(f"mean {sum(rewards.values()) / len(rewards):.2f} of {len(rewards)}" if rewards else "no rewards")


if __name__ == "__main__":
    main(*sys.argv[1:3]) if len(sys.argv) == 3 else sys.exit(__doc__)
