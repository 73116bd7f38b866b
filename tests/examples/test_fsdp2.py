"""Two processes of the FSDP2 example end with the parameters of the plain loop."""

import os
import subprocess
import sys

import torch

from examples import plain_loop
from tests.support import ROOT
from tests.support.fully_shard import skip_where_it_is_wrong

CODE = """
import os, sys, torch, torch.distributed as dist
from examples import fsdp2
dist.init_process_group("gloo")
whole = fsdp2.main(steps=3)
if dist.get_rank() == 0:
    torch.save(whole, sys.argv[1])
dist.barrier()
os._exit(0)
"""


def test_two_processes_equal_one(tmp_path):
    skip_where_it_is_wrong()
    script, file = tmp_path / "run.py", tmp_path / "whole.pt"
    script.write_text(CODE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, str(script), str(file)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    model = plain_loop.main(steps=3)
    whole = torch.load(file)
    for name, p in model.named_parameters():
        torch.testing.assert_close(whole[name], p.detach(), rtol=1e-4, atol=1e-5, msg=name)
