"""The demo's chain with its artifacts in an object store, killed at random moments, against an undisturbed run.

    python bench/store_kills.py [--kills 10] [--images 20] [--train-steps 1]

A local S3 server (moto's) holds the artifacts; models stay local. Each kill takes the whole process group, up to 0.3 s
after a random commit; the same command goes on. Every shard of every artifact must have the undisturbed run's bytes, by
the manifests, and ``verify`` must find them sound. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fsspec
from moto.server import ThreadedMotoServer

sys.path.insert(0, str(Path(__file__).parent))

from _common import report, version

from capipe.manifests.artifact import Artifact
from capipe.manifests.files.stores import filesystem
from capipe.pipeline.chain.demo import RECIPE, overrides
from capipe.pipeline.inspect.chain_state import load_chain
from capipe.pipeline.inspect.verify import verify

WITHIN_SECONDS = 0.3
_COMMITS = "/_capipe/manifest.d/"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--train-steps", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "HF_HUB_OFFLINE": "1"}
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["CAPIPE_CACHE"] = f"{scratch}/cache"
        found = trial(Path(scratch), asked)
    server.stop()
    versions = {name: version(name) for name in ("moto", "s3fs", "torch")}
    report("store_kills", {"undisturbed_s": [found.pop("undisturbed_seconds")]}, versions, **found)
    raise SystemExit(0 if found["differing"] == [] == found["faults"] else 1)


def trial(scratch: Path, asked: argparse.Namespace) -> dict[str, Any]:
    whole, killed = (command(scratch / name, asked) for name in ("whole", "killed"))
    started = time.monotonic()
    subprocess.run(whole, check=True, stdout=sys.stderr)
    seconds = time.monotonic() - started
    total, rng, at = commits("whole"), random.Random(asked.seed), []
    for target in sorted(rng.randrange(total) for _ in range(asked.kills)):
        process = subprocess.Popen(killed, start_new_session=True, stdout=sys.stderr)
        while process.poll() is None and commits("killed") < target:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, WITHIN_SECONDS))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            at.append(commits("killed"))
    subprocess.run(killed, check=True, stdout=sys.stderr)
    state = load_chain(scratch / "whole")
    assert state is not None
    names = [name for stage in state.stages for name in stage.artifacts]
    digests = {run: {name: shards(f"s3://bucket/{run}/{name}") for name in names} for run in ("whole", "killed")}
    differing = [name for name in names if digests["whole"][name] != digests["killed"][name]]
    faults = [fault for name in names for fault in verify(f"s3://bucket/killed/{name}").faults]
    store, path = filesystem("s3://bucket")
    return {
        "kills": len(at),
        "killed_after_commits": at,
        "commits": total,
        "artifacts": len(names),
        "final_shards": len(digests["killed"][names[-1]]),
        "differing": differing,
        "faults": faults,
        "unfinished_uploads": len(list(store.unfinished_uploads(path))),
        "undisturbed_seconds": round(seconds),
    }


def command(out: Path, asked: argparse.Namespace) -> list[str]:
    sets = [word for each in overrides(asked.images, "transformers", asked.train_steps) for word in ("--set", each)]
    words = ["run", str(RECIPE), "--out", str(out), "--artifacts", f"s3://bucket/{out.name}", *sets]
    return [sys.executable, "-m", "capipe.pipeline", *words]


def commits(run: str) -> int:
    store, path = filesystem(f"s3://bucket/{run}")
    return sum(_COMMITS in name for name in store.find(path))


def shards(url: str) -> dict[str, Any]:
    """sha256 of each file of each committed shard."""
    records = Artifact.open(url).committed().values()
    return {record.shard: {name: file["sha256"] for name, file in record.files.items()} for record in records}


if __name__ == "__main__":
    main()
