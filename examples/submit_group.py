"""Submit a group of rollouts of one task to `dsec serve` and print rewards as they arrive.

python examples/submit_group.py 127.0.0.1:7710 copy-1-000     (a bundled task, or a task folder)
"""

import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

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
    with grpc.insecure_channel(address) as channel:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=60)
        rewards = []
        for update in RolloutServiceStub(channel).Submit(request):
            what = update.WhichOneof("what")
            if what == "finished":
                record = update.finished
                rewards.append(record.reward.value)
                print(update.rollout_id, record.reward.value, len(record.token_ids), "tokens", flush=True)
            elif what == "infra_failed":  # the service failed, not the model: no reward, not 0
                print(update.rollout_id, update.infra_failed.message, file=sys.stderr)
        print(f"mean {sum(rewards) / max(len(rewards), 1):.2f} of {len(rewards)}")


if __name__ == "__main__":
    main(*sys.argv[1:3]) if len(sys.argv) == 3 else sys.exit(__doc__)
