"""What a model draws in forward comes from the run's seed."""

import pytest
from safetensors.torch import load_file
from torch import nn

from lowcomm.cli import main
from lowcomm.tensors import digest
from tests.multiprocess.launch import write_tiny


class WithDropout(nn.Sequential):
    """A language model that leaves out half of what it sees."""

    def __init__(self):
        super().__init__(nn.Embedding(256, 8), nn.Dropout(0.5), nn.Linear(8, 256))


@pytest.mark.parametrize("command", [["train"], ["simulate", "--cluster", "Uniform", "--cluster.num_hosts", "2"]])
def test_a_run_with_dropout_can_be_repeated(command, tmp_path):
    config = write_tiny(tmp_path)
    found = []
    for k, seed in enumerate([3, 3, 4]):
        out = tmp_path / str(k)
        flags = ["--config", str(config), "--model", "Module", "--model.path", f"{__name__}.WithDropout"]
        flags += ["--seed", str(seed), "--num_steps", "6", "--checkpoint.every", "0", "--out", str(out)]
        assert main([*command, *flags]) == 0
        found.append(digest(list(load_file(out / "final.safetensors").values())))
    assert found[0] == found[1] != found[2]
