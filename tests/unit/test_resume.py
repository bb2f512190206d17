"""What all ranks resume from, and that nothing is deleted before all of them could."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import nn

from lowcomm import Comm, Meter, MeteredComm
from lowcomm.assemble import save_weights
from lowcomm.checkpoint import Checkpoints
from lowcomm.comm.echo import EchoComm
from lowcomm.places import place_of
from lowcomm.resume import newest_common
from tests.world import run_world


@pytest.mark.parametrize(
    ("steps", "were_on_all", "common"),
    [
        ([[], [], []], [False, False, False], None),
        ([[10], [], [10]], [False, False, False], None),  # the first one was being written
        ([[10, 20], [10], [10, 20, 30]], [True, False, True], 10),
        ([[10, 20], [10, 20], [20]], [True, True, True], 20),
    ],
)
def test_the_newest_of_all(steps: list[list[int]], were_on_all: list[bool], common: int | None) -> None:
    def program(comm: Comm) -> int | None:
        return newest_common(steps[comm.rank], were_on_all[comm.rank], MeteredComm(comm, Meter()))

    assert run_world(3, program) == [common] * 3


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([[30, 40], [], [30, 40]], r"step 40 on ranks \[0, 2\]; none on ranks \[1\]"),
        ([[30, 40], [20], []], r"step 40 on ranks \[0\]; step 20 on ranks \[1\]; none on ranks \[2\]"),
    ],
)
def test_none_in_common_any_more_is_refused_on_every_rank(steps: list[list[int]], message: str) -> None:
    def program(comm: Comm) -> str:
        with pytest.raises(ValueError, match=message) as refused:
            newest_common(steps[comm.rank], len(steps[comm.rank]) > 1, MeteredComm(comm, Meter()))
        return str(refused.value)

    assert len(set(run_world(3, program))) == 1


def test_a_rank_knows_whether_all_had_a_checkpoint(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path / "checkpoints", place_of(EchoComm(2), 1), "run", keep=1)
    assert not saved.were_on_all()
    saved.save(1, {})
    assert not saved.were_on_all(), "it may be the only rank that came so far"
    saved.save(2, {})
    assert saved.were_on_all(), "nobody starts the second before all have the first"
    saved.confirm(2)
    saved.prune(2)
    assert saved.steps() == [2] and saved.were_on_all()
    saved.save(2, {})
    assert not saved.were_on_all(), "written anew"


def of_shards(run: Path, rank: int, num_ranks: int, num_shards: int) -> Checkpoints:
    return Checkpoints(run / "checkpoints", place_of(EchoComm(num_ranks, rank), num_shards), "run")


def test_former_names_and_those_of_other_shards_are_refused(tmp_path: Path) -> None:
    for first, second in [(1, 2), (2, 1)]:
        run = tmp_path / str(first)
        for rank in range(4):
            of_shards(run, rank, 4, first).save(1, {})
            assert of_shards(run, rank, 4, first).steps() == [1]
        for rank in range(4):
            with pytest.raises(ValueError, match="another number of shards, or of an earlier lowcomm"):
                of_shards(run, rank, 4, second).steps()
    assert sorted(x.name for x in (tmp_path / "2/checkpoints/t00000001").iterdir()) == [
        f"replica0000{replica}.shard0000{shard}" for replica in range(2) for shard in range(2)
    ]
    with pytest.raises(ValueError, match="num_replicas 2, but here num_replicas is 1"):
        of_shards(tmp_path / "2", 1, 3, 3).steps()
    (tmp_path / "former/checkpoints/t00000010/rank00001").mkdir(parents=True)
    for call in (Checkpoints.steps, Checkpoints.newest, Checkpoints.were_on_all):
        with pytest.raises(ValueError, match=r"t00000010/rank00001 is called otherwise .* earlier lowcomm .*--out"):
            call(of_shards(tmp_path / "former", 0, 2, 1))


class Rotary(nn.Module):
    """Two buffers that are parts of one tensor, one of them under two names, tied weights, and a table seen twice."""

    whole: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        table = torch.randn(2, 3)
        self.register_buffer("cos", table[0])
        self.register_buffer("sin", table[1])
        self.register_buffer("same", table[1])
        self.register_buffer("column", torch.randn(4, 2)[:, 1])
        self.register_buffer("whole", torch.randn(4, 2))
        self.register_buffer("flat", self.whole.view(8))
        self.embedding, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight


def test_weights_with_parts_of_one_tensor_are_saved(tmp_path: Path) -> None:
    model, other = Rotary(), Rotary()
    save_weights(model, tmp_path / "x.safetensors")
    missing, unexpected = other.load_state_dict(load_file(tmp_path / "x.safetensors"), strict=False)
    assert (len(missing), unexpected) == (2, [])  # one of the names of what has two
    assert missing == ["same", "head.weight"], "the first of the names stays"
    for name, x in model.state_dict().items():
        assert torch.equal(x, other.state_dict()[name]), name
    assert model.get_buffer("sin")._base is model.get_buffer("cos")._base, "the model is as it was"


def test_weights_of_a_tied_model_are_named_as_its_own_library_names_them(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True))
    model.config.save_pretrained(tmp_path)
    save_weights(model, tmp_path / "model.safetensors")
    other = AutoModelForCausalLM.from_config(model.config)
    missing, unexpected = load_model(other, tmp_path / "model.safetensors", strict=True)
    assert not missing and not unexpected
    read, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values()), told
    for name, x in model.state_dict().items():
        assert torch.equal(x, read.state_dict()[name]) and torch.equal(x, other.state_dict()[name]), name
