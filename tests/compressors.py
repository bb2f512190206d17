"""Parts of reductions by their names, and with the options that matter: what the conformance tests run over."""

from lowcomm.codecs.absmax import Absmax as Absmax
from lowcomm.codecs.base import Codec
from lowcomm.codecs.bins import Bins as Bins
from lowcomm.codecs.blocks import BlockCodec as BlockCodec
from lowcomm.codecs.e3m0 import E3M0 as E3M0
from lowcomm.codecs.float32 import Float32 as Float32
from lowcomm.codecs.fp4 import FP4 as FP4
from lowcomm.codecs.fp8 import FP8 as FP8
from lowcomm.codecs.half import Half as Half
from lowcomm.codecs.nf4 import NF4 as NF4
from lowcomm.codecs.qsgd import QSGD as QSGD
from lowcomm.codecs.sign import Sign as Sign
from lowcomm.codecs.sign_magnitude import SignMagnitude as SignMagnitude
from lowcomm.compress.base import Compressor
from lowcomm.compress.cast import Cast as Cast
from lowcomm.compress.chosen import Chosen as Chosen
from lowcomm.compress.count_sketch import CountSketch as CountSketch
from lowcomm.compress.dct import DCT as DCT
from lowcomm.compress.ef21_plus import EF21Plus as EF21Plus
from lowcomm.compress.gathered import Gathered as Gathered
from lowcomm.compress.hierarchical import Hierarchical as Hierarchical
from lowcomm.compress.identity import Identity as Identity
from lowcomm.compress.power_sgd import PowerSGD as PowerSGD
from lowcomm.compress.quantized import Quantized as Quantized
from lowcomm.compress.random_block import RandomBlock as RandomBlock
from lowcomm.compress.random_k import RandomK as RandomK
from lowcomm.compress.sketch import Sketch as Sketch
from lowcomm.compress.top_k import TopK as TopK
from lowcomm.feedback.base import Feedback
from lowcomm.feedback.econtrol import EControl as EControl
from lowcomm.feedback.ef14 import EF14 as EF14
from lowcomm.feedback.ef21 import EF21 as EF21
from lowcomm.feedback.ef21_sgdm import EF21SGDM as EF21SGDM
from lowcomm.feedback.ef_bv import EFBV as EFBV
from lowcomm.feedback.none import NoFeedback as NoFeedback
from lowcomm.outer.nesterov import Nesterov as Nesterov
from lowcomm.outer.sgd import SGD as SGD
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
