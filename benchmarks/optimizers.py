"""Tries inner optimizers on a small Llama: whether they train, resume bitwise and can be foreseen by a dry run.

    python -m benchmarks.optimizers

An optimizer that is not installed is left out and named.
"""

from __future__ import annotations

import copy
import importlib.metadata
from typing import Any

import torch

from benchmarks.record import parser, table, write_record
from lowcomm.config import Optimizer
from lowcomm.engine.torch_engine import TorchEngine
from lowcomm.models.llama import Llama
from lowcomm.optim.groups import parameter_groups
from lowcomm.optim.schedule import Cosine
from lowcomm.tensors import rng

TORCH = "Adadelta Adafactor Adagrad Adam AdamW Adamax ASGD LBFGS Muon NAdam RAdam RMSprop Rprop SGD SparseAdam"  # all
THEIRS = (
    "AdaBelief AdaBound AdaGC AdaHessian AdaMuon AdaPNM AdamP AdamWSN AdEMAMix Adan ADOPT AggMo Alice APOLLO Conda "
    "DAdaptAdam DiffGrad EXAdam Fira GaLore Gravity Grams GrokFastAdamW Kron Lamb LARS Lion MARS Muon NorMuon Prodigy "
    "QHAdam RACS Ranger21 ScalableShampoo ScheduleFreeAdamW ScheduleFreeRAdam ScheduleFreeSGD SCION SCIONLight SGDSaI "
    "Shampoo SimplifiedAdEMAMix SM3 SOAP SophiaH SPAM SPlus StableSPAM SWATS"
)
FREE = "AdamWScheduleFree RAdamScheduleFree SGDScheduleFree"
CONFIGURATIONS: list[tuple[str, dict[str, Any]]] = [
    *((f"torch.optim.{name}", {}) for name in TORCH.split()),
    ("torch.optim.AdamW", {"amsgrad": True}),
    ("torch.optim.AdamW", {"capturable": True}),
    ("torch.optim.SGD", {"momentum": 0.9, "nesterov": True}),
    ("lowcomm.optim.muon_adamw.MuonAdamW", {}),
    ("lowcomm.optim.qhadopt.QHADOPT", {}),
    *((f"pytorch_optimizer.{name}", {}) for name in THEIRS.split()),
    *((f"schedulefree.{name}", {}) for name in FREE.split()),
]
NUM_STEPS = 4  # before saving, and again after


def engine_of(path: str, args: dict[str, Any], device: str = "cpu") -> TorchEngine:
    model = Llama(size="500k", num_layers=2, dim=32, num_heads=2, num_kv_heads=2, ffn_dim=48).build(256, 0).to(device)
    optimizer = Optimizer(path, {"lr": 1e-3, **args}).build(parameter_groups(model))
    return TorchEngine(model, optimizer, schedule=Cosine().build(optimizer, 20))


def trained(engine: TorchEngine, first: int) -> list[torch.Tensor]:
    for t in range(first, first + NUM_STEPS):
        engine.backward(torch.randint(256, (2, 33), generator=rng(0, "batch", t)))
        engine.update()
    return [x.clone() for x in engine.slots()["param"]]


def tried(path: str, args: dict[str, Any]) -> dict[str, Any]:
    """What became of one configuration; ``refused`` has the paragraph. Any error but a ValueError is raised."""
    try:
        engine = engine_of(path, args)
        trained(engine, 0)
        saved, shapes = copy.deepcopy(engine.state_dict()), shapes_of(engine)
        expected = trained(engine, NUM_STEPS)
    except ValueError as error:
        return {"path": path, "args": args, "refused": str(error)}
    other = engine_of(path, args)
    other.load_state_dict(saved)
    dry = engine_of(path, args, "meta")
    for p in dry.model.parameters():
        p.grad = torch.empty_like(p)
    dry.update()
    return {
        "path": path,
        "args": args,
        "is_finite": all(bool(x.isfinite().all()) for x in expected),
        "resumes_bitwise": all(map(torch.equal, expected, trained(other, NUM_STEPS))),
        "dry_run_agrees": shapes_of(dry) == shapes,
        "has_modes": engine.has_modes,
        "states": sorted(set(shapes) - {"param"}),
    }


def shapes_of(engine: TorchEngine) -> dict[str, list[tuple[Any, torch.dtype]]]:
    return {name: [(x.shape, x.dtype) for x in xs] for name, xs in engine.slots().items()}


def row(found: dict[str, Any]) -> list[str]:
    name = f"`{found['path']}`" + "".join(f" {key}={value}" for key, value in found["args"].items())
    if "refused" in found:
        return [name, "refused", "", "", ""]
    answers = ["yes" if found[key] else "no" for key in ("is_finite", "resumes_bitwise", "dry_run_agrees")]
    modes = ["train(), eval()"] if found["has_modes"] else []
    return [name, *answers, ", ".join(found["states"] + modes)]


def main() -> None:
    given = parser(__doc__, "optimizers").parse_args()
    torch.set_num_threads(1)
    missing, results = [], []
    versions = {}
    for library in ("pytorch_optimizer", "schedulefree"):
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            missing.append(library)
    for path, args in CONFIGURATIONS:
        if path.split(".")[0] not in missing:
            torch.manual_seed(0)  # a few draw from the global generator when they are made
            results.append(tried(path, args))
            print(row(results[-1]), flush=True)
    results.sort(key=lambda found: "refused" in found)
    columns = ["optimizer", f"{2 * NUM_STEPS} finite steps", "resumes bitwise", "dry run agrees", "slots and modes"]
    refused = [f"- {row(found)[0]}: {found['refused']}" for found in results if "refused" in found]
    notes = [f"{name} {version}" for name, version in versions.items()] + [f"no {name} here" for name in missing]
    summary = "\n".join([table(columns, [row(x) for x in results]), "", "Refused:", "", *refused, "", "; ".join(notes)])
    write_record(given, results, summary)


if __name__ == "__main__":
    main()
