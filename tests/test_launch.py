"""The launch scripts for several nodes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "configs" / "launch").iterdir())


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_each_is_sound_bash_that_stops_at_errors(path):
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0
    assert "\nset -euo pipefail\n" in path.read_text()


@pytest.mark.slow
def test_torchrun_starts_two_processes_that_train_together(tmp_path):
    command = [
        "bash", str(ROOT / "configs/launch/torchrun.sh"), "fit", "-c", str(ROOT / "configs/dpo.yaml"),
        "-c", str(ROOT / "tests/conf/tiny.yaml"), "--trainer.strategy", "ddp",
        "--trainer.default_root_dir", str(tmp_path),
    ]  # fmt: skip
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "GPUS": "2", "PORT": "29417", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    # (Not the status: a process of PyTorch's on a CPU aborts now and then when all is done.)
    assert "MEMBER: 2/2" in done.stderr, done.stderr[-3000:]
    assert (tmp_path / "version_0" / "checkpoints" / "last.ckpt").exists(), done.stderr[-3000:]


def test_slurm_resumes_when_it_is_requeued_and_gives_each_node_its_rank(tmp_path):
    """With stand-ins for Slurm's commands and torchrun that print what they are given."""
    stand_ins = {
        "scontrol": "echo node7; echo node8",
        "srun": 'SLURM_NODEID=1 exec "$@"',
        "torchrun": 'echo "torchrun $*"',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "30005", "SLURM_JOB_NODELIST": "x"}
    base = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    bash = shutil.which("bash")
    said = []
    for restarts in ("0", "1"):
        done = subprocess.run(
            [bash, "configs/launch/slurm.sbatch", "fit", "-c", "a b.yaml"], cwd=ROOT, capture_output=True, text=True,
            env={**base, "SLURM_RESTART_COUNT": restarts},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.strip())
    node = "--nnodes 2 --node-rank 1 --nproc-per-node 4 --master-addr node7 --master-port 20005 --no-python"
    ending = "--trainer.num_nodes 2 --trainer.devices 4"
    assert said[0] == f"torchrun {node} lit-dpo fit -c a b.yaml {ending}"
    assert said[1] == f"torchrun {node} lit-dpo fit -c a b.yaml --ckpt_path last {ending}"
