"""The methods that `benchmarks.convergence` compares, their optimizers and what is expected of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.simulations import Parts, part

# What is chosen beside the inner learning rate: a learning rate, a momentum and a blend, as far as the outer step has
# them; of QHADOPT its betas and omega.
Others = tuple[float, ...]


@dataclass(frozen=True)
class Setting:
    """What a run gives its method.

    Attributes:
        every: inner steps of a round.
        lr, num_warmup_steps: the inner learning rate and in how many steps it rises.
        others: how the replicas' mean is followed; empty where there is no choice.
    """

    every: int
    lr: float
    num_warmup_steps: int
    others: Others


@dataclass(frozen=True)
class Method:
    """How one method trains.

    Attributes:
        algorithm: of the config.
        optimizer: a key of `OPTIMIZERS`.
        lr: what the factors of the grid multiply.
        others: the first goes with every learning rate of the grid, the others with that in its middle (of two, the
            second) times `others_factor`.
        beside: data parallel with the same optimizer.
        is_seeded: whether it is repeated with other seeds.
        tuned_as: the method whose rates it takes; None tunes its own.
    """

    algorithm: Callable[[Setting], Parts]
    optimizer: str = "adamw"
    lr: float = 1.5e-3
    others: tuple[Others, ...] = ((),)
    others_factor: float = 1.0
    beside: str = "data parallel"
    is_seeded: bool = False
    tuned_as: str | None = None


@dataclass(frozen=True)
class Claim:
    """What a paper or an issue leads to expect: the loss of ``method`` is at most ``1 + limit`` times the other's.

    Attributes:
        in_perplexity: that is said of perplexities instead, e to the loss of a token, here of a byte.
    """

    text: str
    source: str
    method: str
    other: str
    limit: float
    in_perplexity: bool = False


def _adamw(lr: float, others: Others) -> Parts:
    return {"path": "torch.optim.AdamW", "args": {"lr": lr, "betas": [0.9, 0.95], "weight_decay": 0.1}}


def _adopt(lr: float, others: Others) -> Parts:
    args = {"lr": lr, "betas": [0.95, 0.99], "omega": 1.0}
    return {"path": "lowcomm.optim.qhadopt.QHADOPT", "args": args}


def _qhadopt(lr: float, others: Others) -> Parts:
    args = {"lr": lr, "betas": list(others[:2]), "omega": others[2]}
    return {"path": "lowcomm.optim.qhadopt.QHADOPT", "args": args}


def _muon(lr: float, others: Others) -> Parts:
    return {
        "path": "lowcomm.optim.muon_adamw.MuonAdamW",
        "args": {"lr": lr, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"},
    }


OPTIMIZERS: dict[str, Callable[[float, Others], Parts]] = {
    "adamw": _adamw,
    "adopt": _adopt,
    "qhadopt": _qhadopt,
    "muon": _muon,
}
_INT4 = {"compressor": part("Gathered", codec=part("Absmax", bits=4))}
_SPARSE = {
    "compressor": part(
        "TopK", num=64, chunk=4096, values=part("SignMagnitude"), indices="elias_fano", divide_by="present"
    ),
    "feedback": part("EF14", decay=0.95),
}


def _nesterov(others: Others) -> Parts:
    return part("Nesterov", lr=others[0], momentum=others[1])


def _data_parallel(x: Setting) -> Parts:
    return part("DataParallel")


def _local_sgd(x: Setting) -> Parts:
    return part("LocalSGD", every=x.every)


def _diloco(x: Setting) -> Parts:
    return part("DiLoCo", every=x.every, outer=_nesterov(x.others))


def _streaming(x: Setting) -> Parts:
    return part("StreamingDiLoCo", every=x.every, outer=_nesterov(x.others), blend=x.others[2], reducer=_INT4)


def _eager(x: Setting) -> Parts:
    return part("EagerDiLoCo", every=x.every, outer=_nesterov(x.others))


def _noloco_baseline(x: Setting) -> Parts:
    """The DiLoCo of NoLoCo's paper: heavy-ball momentum 0.3, all replicas, rounds of twice the length."""
    return part("NoLoCo", every=2 * x.every, group_size=None, alpha=0.3, beta=0.7)


def _noloco_in_groups(size: int | None) -> Callable[[Setting], Parts]:
    return lambda x: part("NoLoCo", every=x.every, group_size=size, alpha=x.others[1], beta=x.others[0])


def _gasloc_in_groups(size: int | None) -> Callable[[Setting], Parts]:
    return lambda x: part("GASLoC", every=x.every, group_size=size, lr=x.others[0], momentum=x.others[1])


def _qsr(x: Setting) -> Parts:
    """At the top of the schedule rounds have 2/5 of the others' length."""
    alpha, warmup = x.lr * (0.4 * x.every) ** 0.5, x.num_warmup_steps
    return part("LocalSGD", every=part("QSR", base=4, alpha=alpha, power=2, num_warmup_steps=warmup, peak_lr=x.lr))


def _sparse_loco(x: Setting) -> Parts:
    return part("DiLoCo", every=x.every, outer=part("SGD", lr=x.others[0]), reducer=_SPARSE)


def _with_rounds(algorithm: Callable[[Setting], Parts], factor: float) -> Callable[[Setting], Parts]:
    """The same with rounds of another length, at least 1 step."""
    return lambda x: algorithm(replace(x, every=max(1, round(factor * x.every))))


def _averaged_states(
    exp_avg: int, exp_avg_sq: int, start: int = 0, outer: Others | None = None
) -> Callable[[Setting], Parts]:
    """Parameters and moments averaged at periods.

    Args:
        exp_avg, exp_avg_sq: periods of the moments, in those of the parameters.
        start: steps of data parallel first, in warm-ups.
        outer: learning rate and momentum of Nesterov; None averages the parameters.
    """

    def algorithm(x: Setting) -> Parts:
        periods = {"param": x.every, "exp_avg": exp_avg * x.every, "exp_avg_sq": exp_avg_sq * x.every}
        followed = {} if outer is None else {"outer": _nesterov(outer)}
        averaged = part("DESLOC", periods=periods, **followed)
        if start == 0:
            return averaged
        return part("After", num_steps=start * x.num_warmup_steps, first=part("DataParallel"), then=averaged)

    return algorithm


def _states_at_every_step(x: Setting) -> Parts:
    return part("DESLOC", periods={"param": x.every, "exp_avg": 1, "exp_avg_sq": 1})


_noloco, _gasloc = _noloco_in_groups(2), _gasloc_in_groups(2)
_DILOCO: tuple[Others, ...] = ((0.7, 0.6), (0.6, 0.8))
_SLOW: Others = (0.5, 0.8)  # "Nesterov 0.8": the best of a few at 0.5M where runs begin in data parallel
_QH: tuple[Others, ...] = ((0.95, 0.99, 0.9), (0.98, 0.99, 0.9), (0.99, 0.99, 0.9))
_MUON, _ADOPT, _QHADOPT = "data parallel, Muon", "data parallel, ADOPT", "data parallel, QHADOPT"
METHODS: dict[str, Method] = {
    "data parallel": Method(_data_parallel, is_seeded=True),
    "Local SGD": Method(_local_sgd),
    "DiLoCo": Method(_diloco, others=_DILOCO, is_seeded=True),
    "Streaming int4": Method(_streaming, others=((0.7, 0.6, 0.0), (0.6, 0.8, 0.0)), is_seeded=True),
    "eager": Method(_eager, others=((0.7, 0.0), (0.7, 0.3), (0.5, 0.5))),
    "NoLoCo": Method(_noloco, others=((1.0, 0.3), (0.7, 0.5)), is_seeded=True),
    "GASLoC": Method(_gasloc, others=((0.7, 0.5), (1.0, 0.3))),
    "QSR": Method(_qsr),
    "SparseLoCo": Method(_sparse_loco, others=((1.0,),)),
    _MUON: Method(_data_parallel, "muon", 3e-3, beside=_MUON),
    "MuLoCo": Method(_diloco, "muon", 3e-3, others=_DILOCO[:1], beside=_MUON),
    "DES-LOC": Method(_averaged_states(3, 6), "adopt", 7.5e-4, beside=_ADOPT),
    _ADOPT: Method(_data_parallel, "adopt", beside=_ADOPT, tuned_as="DES-LOC"),
    "Local ADOPT": Method(_averaged_states(1, 1), "adopt", beside=_ADOPT, tuned_as="DES-LOC"),
    _QHADOPT: Method(_data_parallel, "qhadopt", 1e-3, _QH, 2.0, beside=_QHADOPT, is_seeded=True),
    "MT-DAO": Method(_averaged_states(1, 1), "qhadopt", 1e-3, _QH, 2.0, beside=_QHADOPT, is_seeded=True),
    # what the length of a round alone does, and what averaging states more often or in larger groups
    "DiLoCo, rounds a third": Method(_with_rounds(_diloco, 1 / 3), tuned_as="DiLoCo"),
    "DiLoCo, rounds twice": Method(_with_rounds(_diloco, 2), tuned_as="DiLoCo"),
    "eager, rounds a third": Method(_with_rounds(_eager, 1 / 3), tuned_as="eager"),
    "Local SGD, every step": Method(_with_rounds(_local_sgd, 0), tuned_as="Local SGD"),
    "Local SGD, rounds a third": Method(_with_rounds(_local_sgd, 1 / 3), tuned_as="Local SGD"),
    "NoLoCo, rounds half": Method(_with_rounds(_noloco, 1 / 2), tuned_as="NoLoCo"),
    "NoLoCo, groups of 4": Method(_noloco_in_groups(4), tuned_as="NoLoCo"),
    "DiLoCo of NoLoCo": Method(_noloco_baseline, is_seeded=True, tuned_as="NoLoCo"),
    "NoLoCo, every step": Method(_with_rounds(_noloco, 0), tuned_as="NoLoCo"),
    "GASLoC, every step": Method(_with_rounds(_gasloc, 0), tuned_as="GASLoC"),
    "NoLoCo, one group": Method(_noloco_in_groups(None), tuned_as="NoLoCo"),
    "GASLoC, one group": Method(_gasloc_in_groups(None), tuned_as="GASLoC"),
    "DiLoCo of GASLoC": Method(_diloco, tuned_as="GASLoC"),  # which the mean of its replicas follows
    "MuLoCo, rounds a third": Method(_with_rounds(_diloco, 1 / 3), "muon", beside=_MUON, tuned_as="MuLoCo"),
    # with the first 40 % of the steps, eight warm-ups, in data parallel, as DES-LOC's paper starts some of its runs
    "DES-LOC, from data parallel": Method(_averaged_states(3, 6, 8), "adopt", beside=_ADOPT, tuned_as="DES-LOC"),
    "DES-LOC-Nesterov, from data parallel": Method(
        _averaged_states(3, 6, 8, _DILOCO[0]), "adopt", beside=_ADOPT, tuned_as="DES-LOC"
    ),
    "DES-LOC-Nesterov 0.8, from data parallel": Method(
        _averaged_states(3, 6, 8, _SLOW), "adopt", beside=_ADOPT, tuned_as="DES-LOC"
    ),
    "MT-DAO, from data parallel": Method(
        _averaged_states(1, 1, 8), "qhadopt", beside=_QHADOPT, is_seeded=True, tuned_as="MT-DAO"
    ),
    "MT-DAO-Nesterov, from data parallel": Method(
        _averaged_states(1, 1, 8, _DILOCO[0]), "qhadopt", beside=_QHADOPT, is_seeded=True, tuned_as="MT-DAO"
    ),
    "MT-DAO-Nesterov 0.8, from data parallel": Method(
        _averaged_states(1, 1, 8, _SLOW), "qhadopt", beside=_QHADOPT, is_seeded=True, tuned_as="MT-DAO"
    ),
    "Local ADOPT, rounds a third": Method(
        _with_rounds(_averaged_states(1, 1), 1 / 3), "adopt", beside=_ADOPT, tuned_as="DES-LOC"
    ),
    "MT-DAO, rounds a third": Method(
        _with_rounds(_averaged_states(1, 1), 1 / 3), "qhadopt", beside=_QHADOPT, tuned_as="MT-DAO"
    ),
    "MT-DAO, states at every step": Method(_states_at_every_step, "qhadopt", beside=_QHADOPT, tuned_as="MT-DAO"),
    "MT-DAO, all at every step": Method(
        _with_rounds(_states_at_every_step, 0), "qhadopt", beside=_QHADOPT, tuned_as="MT-DAO"
    ),
}
# how long to begin in data parallel: not at all, for two or for four warm-ups, 5 % of the steps each; above it is eight
METHODS |= {
    f"{name}-Nesterov 0.8, {5 * start} % data parallel": replace(
        METHODS[name], algorithm=_averaged_states(*periods, start, _SLOW), is_seeded=False, tuned_as=name
    )
    for name, periods in (("DES-LOC", (3, 6)), ("MT-DAO", (1, 1)))
    for start in (0, 2, 4)
}
_STREAMING, _SCALING, _EAGER, _DESLOC = "arXiv:2501.18512", "arXiv:2503.09799", "arXiv:2502.12996", "arXiv:2505.22549"
CLAIMS = [
    Claim(
        "DiLoCo within 4 % of data parallel (2.0 % with 4, 3.9 % with 8 replicas at 35M, in rounds of 30 steps)",
        _SCALING,
        "DiLoCo",
        "data parallel",
        0.04,
    ),
    Claim("DiLoCo better than Local SGD", "arXiv:2311.08105", "DiLoCo", "Local SGD", 0.0),
    Claim("Streaming int4 within 0.5 % of DiLoCo", _STREAMING, "Streaming int4", "DiLoCo", 0.005),
    Claim("eager within 2.5 % of DiLoCo (3.62 against 3.54 at 35M, 2 replicas)", _EAGER, "eager", "DiLoCo", 0.025),
    Claim("NoLoCo no worse than DiLoCo in rounds as long", "nobody", "NoLoCo", "DiLoCo", 0.0),
    Claim(
        "NoLoCo no worse than its paper's DiLoCo, which talks half as often, with heavy-ball momentum",
        "arXiv:2506.10911",
        "NoLoCo",
        "DiLoCo of NoLoCo",
        0.0,
    ),
    Claim(
        "GASLoC better than NoLoCo where both talk at every step",
        "arXiv:2606.11081",
        "GASLoC, every step",
        "NoLoCo, every step",
        0.0,
    ),
    Claim("GASLoC no worse than NoLoCo", "arXiv:2606.11081, its aim", "GASLoC", "NoLoCo", 0.0),
    Claim("QSR better than Local SGD", "arXiv:2310.14423", "QSR", "Local SGD", 0.0),
    Claim("SparseLoCo no worse than DiLoCo", "arXiv:2508.15706, tables not read", "SparseLoCo", "DiLoCo", 0.0),
    Claim("MuLoCo better than DiLoCo", "arXiv:2505.23725", "MuLoCo", "DiLoCo", 0.0),
    Claim("MuLoCo no worse than data parallel with Muon", "arXiv:2505.23725, of one replica", "MuLoCo", _MUON, 0.0),
    Claim(
        "perplexity of DES-LOC within 1 % of that of Local ADOPT, whose traffic is twice as much",
        _DESLOC,
        "DES-LOC",
        "Local ADOPT",
        0.01,
        in_perplexity=True,
    ),
    Claim(
        "perplexity of DES-LOC within 1 % of that of data parallel",
        _DESLOC,
        "DES-LOC",
        _ADOPT,
        0.01,
        in_perplexity=True,
    ),
    *(
        Claim(
            f"perplexity of {name} within 1 % of that of data parallel, both sharing the first 40 % of the steps",
            _DESLOC,
            f"{name}, from data parallel",
            _ADOPT,
            0.01,
            in_perplexity=True,
        )
        for name in ("DES-LOC", "DES-LOC-Nesterov", "DES-LOC-Nesterov 0.8")
    ),
    Claim("MT-DAO no worse than data parallel", "arXiv:2510.05361", "MT-DAO", _QHADOPT, 0.0),
    *(
        Claim(
            f"{name} no worse than data parallel where both share the first 40 % of the steps",
            "arXiv:2510.05361",
            f"{name}, from data parallel",
            _QHADOPT,
            0.0,
        )
        for name in ("MT-DAO", "MT-DAO-Nesterov", "MT-DAO-Nesterov 0.8")
    ),
]
