"""Compressors, codecs and feedbacks with the options that matter: what the conformance tests run over."""

from lowcomm.codecs.absmax import Absmax
from lowcomm.codecs.base import Codec
from lowcomm.codecs.bins import Bins
from lowcomm.codecs.e3m0 import E3M0
from lowcomm.codecs.fp4 import FP4
from lowcomm.codecs.fp8 import FP8
from lowcomm.codecs.half import Half
from lowcomm.codecs.nf4 import NF4
from lowcomm.codecs.qsgd import QSGD
from lowcomm.codecs.sign import Sign
from lowcomm.codecs.sign_magnitude import SignMagnitude
from lowcomm.compress.base import Compressor
from lowcomm.compress.cast import Cast
from lowcomm.compress.count_sketch import CountSketch
from lowcomm.compress.dct import DCT
from lowcomm.compress.ef21_plus import EF21Plus
from lowcomm.compress.gathered import Gathered
from lowcomm.compress.power_sgd import PowerSGD
from lowcomm.compress.quantized import Quantized
from lowcomm.compress.random_block import RandomBlock
from lowcomm.compress.random_k import RandomK
from lowcomm.compress.sketch import Sketch
from lowcomm.compress.top_k import TopK
from lowcomm.feedback.base import Feedback
from lowcomm.feedback.econtrol import EControl
from lowcomm.feedback.ef14 import EF14
from lowcomm.feedback.ef21 import EF21
from lowcomm.feedback.ef21_sgdm import EF21SGDM
from lowcomm.feedback.ef_bv import EFBV
from tests.roles import players

# Beyond every class as it is by default.
CODECS: list[Codec] = [
    Absmax(4, block=8, scale="bfloat16"),
    Absmax(8, block=16, scale="e8m0"),
    Absmax(8, block=64, stochastic=True),
    Absmax(4, block=64, scale="e8m0", stochastic=True),
    Absmax(4, block=4096, scale="bfloat16", stochastic=True),
    NF4(block=128, scale="float32"),
    FP4(block=16, scale="bfloat16"),
    FP8("e5m2", block=4096),
    FP8("e4m3", block=32, scale="e8m0"),
    E3M0(block=2**20),
    E3M0(scale="bfloat16"),
    Bins(sigmas=6, block=64),
    QSGD(num_levels=1, block=64),
    QSGD(num_levels=5, block=128),
    Sign(block=8),
    Half("float16"),
    SignMagnitude(block=8, rounds=0),
]
COMPRESSORS: list[Compressor] = [
    Quantized(Absmax(4, block=8), seed=3),
    Gathered(Absmax(8, block=64, stochastic=True), seed=3),
    RandomK(0.3, Quantized(Absmax(8, block=16))),
    RandomK(0.1, unbiased=True),
    RandomBlock(0.3, Cast()),
    TopK(0.1, chunk=64, values=SignMagnitude(block=16), indices="packed"),
    TopK(num=3, chunk=None, values=Absmax(4, stochastic=True)),
    DCT(TopK(0.1, chunk=64), tile=8),
    DCT(Quantized(), tile=5),
    DCT(RandomK(0.3), tile=8),
    PowerSGD(2, num_iterations=2, warm_start=False, min_compression=1),
    PowerSGD(2, alternate=True, min_compression=1),
    PowerSGD(2, error="global", min_compression=1),
    Sketch(0.3, block=16, unbiased=True),
    EF21Plus(Gathered(Absmax(4, block=16))),
    EF21Plus(TopK(num=2, chunk=None)),
    CountSketch(rows=1, density=0.4, keep=0.2, exact=False),
]
FEEDBACKS: list[Feedback] = [
    EF14(0.95, Absmax(8, block=16)),
    EF14(0.5, Absmax(4, block=16, stochastic=True), seed=3),
    EF21(dense_first=False),
    EF21SGDM(0.5, dense_first=False),
    EFBV(0.5, 0.75),
    EControl(0.1, dense_first=False),
]


def all_codecs() -> list[Codec]:
    """Each class with its defaults, then `CODECS`."""
    return [cls() for cls in players(Codec, "codecs")] + CODECS


def all_compressors() -> list[Compressor]:
    """Each class with its defaults, then `COMPRESSORS`."""
    return [cls() for cls in players(Compressor, "compress")] + COMPRESSORS


def all_feedbacks() -> list[Feedback]:
    """Each class with its defaults, then `FEEDBACKS`."""
    return [cls() for cls in players(Feedback, "feedback")] + FEEDBACKS
