"""How much each compressor may lose in a round, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from math import isclose, prod, sqrt

import torch

from lowcomm.codecs.base import Codec
from lowcomm.codecs.float32 import no_longer
from lowcomm.compress.base import Compressor
from lowcomm.compress.cast import _DTYPES, Cast, _coded_bytes
from lowcomm.compress.chosen import Chosen
from lowcomm.compress.count_sketch import CountSketch
from lowcomm.compress.dct import DCT
from lowcomm.compress.ef21_plus import EF21Plus
from lowcomm.compress.gathered import Gathered
from lowcomm.compress.hierarchical import Hierarchical
from lowcomm.compress.identity import Identity, outgrows
from lowcomm.compress.power_sgd import PowerSGD
from lowcomm.compress.quantized import Quantized
from lowcomm.compress.sketch import Sketch
from lowcomm.compress.top_k import TopK


@dataclass(frozen=True)
class Contraction:
    """How near what members sent is to what they had: ``E sum_i |x_i - sent_i|^2 <= loss sum_i |x_i|^2``.

    For all vectors x_i of the members together, whatever earlier rounds have left in the states. Error feedback needs
    no more than this sum; where what a member sends depends on its own vector alone, it says the same of each member.
    Rounding in floating-point arithmetic comes on top.

    Attributes:
        loss: 0 is exact, and below 1 the compressor contracts.
        in_expectation: whether E is over the random numbers of the round, of which x_i must know nothing. Otherwise the
            inequality holds whatever they are.
        unbiased: whether E sent_i = x_i. Then ``loss`` is the variance that papers call omega, and may well exceed 1.
    """

    loss: float
    in_expectation: bool = False
    unbiased: bool = False

    @property
    def delta(self) -> float:
        """1 - loss: what papers on contractive compressors call delta or alpha, in (0, 1]; others do not contract."""
        return 1.0 - self.loss

    def then(self, second: Contraction, num: int) -> Contraction:
        """This one, then ``second`` on means of ``num`` members, who each answer for 1 / num of what it loses, alone.

        A member i sends s_i, and one of the members adds n (m - C(m)) to that, m being the mean of the n vectors s_i
        (each coordinate in its part of m, which is cut among the n). With first errors a_i = x_i - s_i, seconds b_i,
        losses p and q, all norms over all members:

            |b|^2 <= n^2 q |m|^2 <= n q |s|^2,    |s| <= (1 + sqrt(p)) |x|,    |a + b| <= |a| + |b|

        Where the first is unbiased E |s|^2 <= (1 + p) |x|^2, and where the second is E |a + b|^2 = E |a|^2 + E |b|^2.
        """
        p, q = self.loss, second.loss
        added = num * q * (1 + p if self.unbiased else (1 + sqrt(p)) ** 2)
        loss = p + added if second.unbiased else (sqrt(p) + sqrt(added)) ** 2
        return Contraction(
            loss, self.in_expectation or second.in_expectation, unbiased=self.unbiased and second.unbiased
        )


EXACT = Contraction(0.0, unbiased=True)


def coded(codec: Codec, num: int) -> Contraction:
    """That of sending each vector of ``num`` values through a code."""
    loss = 1.0 - codec.contraction(num)
    return Contraction(loss, in_expectation=codec.stochastic, unbiased=codec.stochastic) if loss else EXACT


@singledispatch
def contraction(x: Compressor, shape: Sequence[int], num_members: int) -> Contraction:
    """How much of a tensor of this shape may be lost in a round among so many members."""
    raise NotImplementedError(f"tests/contraction.py says nothing of {type(x).__name__}: add what it may lose")


@contraction.register
def _identity(x: Identity, shape: Sequence[int], num_members: int) -> Contraction:
    """Exact."""
    return EXACT


@contraction.register
def _cast(x: Cast, shape: Sequence[int], num_members: int) -> Contraction:
    """Half a unit in the last place of a value, and again of a mean, within the range of normal numbers.

    With u = eps / 2 a value misses by u / (1 + u) of itx at most, which is sharp.
    """
    if outgrows(_coded_bytes(prod(shape), num_members), prod(shape), num_members):
        return EXACT
    unit = torch.finfo(_DTYPES[x.dtype]).eps / 2
    once = Contraction((unit / (1 + unit)) ** 2)
    return once if num_members == 1 else once.then(once, num_members)


@contraction.register
def _gathered(x: Gathered, shape: Sequence[int], num_members: int) -> Contraction:
    """That of the code."""
    return coded(no_longer(x.codec, prod(shape)), prod(shape))


@contraction.register
def _quantized(x: Quantized, shape: Sequence[int], num_members: int) -> Contraction:
    """That of the code on a chunk, and again on means; an owner answers for what all lose in the second shot.

    For long blocks and many members that bound exceeds 1, as a single member's memory can: what is lost of the
    mean itx, a n-th of it, does not grow with n.
    """
    if x._goes_whole(prod(shape), num_members):
        return EXACT
    once = coded(x.codec, -(-prod(shape) // num_members))
    return once if num_members == 1 else once.then(once, num_members)


@contraction.register
def _top_k(x: TopK, shape: Sequence[int], num_members: int) -> Contraction:
    """Of |x|^2 in a chunk the share k / length is kept if all magnitudes are equal, else more, and delta of that by
    the code. Where that may lose more than it gets, being random, the worst is that all of x is kept.
    """
    num = prod(shape)
    if num == 0 or x._goes_whole(num):
        return EXACT
    share, num_kept = min(piece.kept / piece.length for piece in x._pieces(num)), x._num_kept(num)
    code = coded(no_longer(x.values, num_kept), num_kept)
    lost = 1 - code.delta * (share if code.delta > 0 else 1.0)
    return Contraction(lost, code.in_expectation, unbiased=code.unbiased and share == 1)


@contraction.register
def _chosen(x: Chosen, shape: Sequence[int], num_members: int) -> Contraction:
    """Each coordinate is chosen with probability s = k / d, the same for all members, and multiplied by f.

    Of what is not chosen all is lost, 1 - s of |x|^2 on average. What is chosen, y, comes back as f Q(y) with
    ``f Q(y) - y = (f - 1) y + f (Q(y) - y)``, where |Q(y) - y|^2 <= q |y|^2; the two parts are orthogonal on
    average if Q is unbiased. At f = 1 that makes 1 - s (1 - q), at f = d / k and q = 0 it makes d / k - 1.
    """
    num, kept = prod(shape), x.num_kept(prod(shape))
    values, factor = contraction(x.values, [kept], num_members), x.factor(num, kept)
    if kept == num:
        return values
    if values.unbiased:
        chosen = (factor - 1) ** 2 + factor**2 * values.loss
    else:
        chosen = (factor - 1 + factor * sqrt(values.loss)) ** 2
    share = kept / num
    unbiased = values.unbiased and isclose(factor * share, 1.0)
    return Contraction(1 - share + share * chosen, in_expectation=True, unbiased=unbiased)


@contraction.register
def _sketch(x: Sketch, shape: Sequence[int], num_members: int) -> Contraction:
    """The projection P keeps s = kept / size of each |x|^2 on average, as E P = s: with every choice of rows.

    Divided by s it has E |P x / s - x|^2 = |P x|^2 / s^2 - 2 |P x|^2 / s + |x|^2 = (1 / s - 1) |x|^2. Where the
    vector was filled up with zeros, what comes back in their place is cut off, and less is lost.
    """
    if x._goes_whole(prod(shape)):
        return EXACT
    _, size, num_kept = x._cut(prod(shape))
    loss = size / num_kept - 1 if x.unbiased else 1 - num_kept / size
    return Contraction(loss, in_expectation=True, unbiased=x.unbiased)


@contraction.register
def _count_sketch(x: CountSketch, shape: Sequence[int], num_members: int) -> Contraction:
    """Nothing is kept for sure: members whose vectors cancel have no heavy entries in common.

    With ``exact`` a member sends no more than it has, and loses all of x at most. Otherwise it also adds noise: an
    entry that is kept misses by what shares its cell, the sum of the other m - 1 entries with signs. However entry
    and row were chosen, its square is one term of a sum over all entries and rows, of which the expectation is
    rows (m - 1) |x|^2: signs are independent, so squares add, and in each row an entry shares one cell with m - 1.
    """
    num = prod(shape)
    if x._num_sent(num) >= num:
        return EXACT
    if x.exact:
        return Contraction(1.0)
    num_columns, length, _ = x._sizes(num)
    return Contraction(1.0 + x.rows * (length // num_columns - 1), in_expectation=True)


@contraction.register
def _dct(x: DCT, shape: Sequence[int], num_members: int) -> Contraction:
    """That of ``inner``."""
    return contraction(x.inner, [prod(shape)], num_members)


@contraction.register
def _power_sgd(x: PowerSGD, shape: Sequence[int], num_members: int) -> Contraction:
    """Nothing is ever added: what is sent are projections, so |x_i - sent_i| <= |x_i|.

    With the global error that holds over all members: ``sum |x_i - P P^T x|^2 = sum |x_i|^2 - n |P P^T x|^2`` for
    the mean x. More cannot be said with a warm start, as factors that fitted earlier rounds may be orthogonal to
    this one, nor of members whose matrices cancel. A cold start of one member keeps r / min(n, m) on average: in
    the singular basis, with the s = min(n, m) singular values on the diagonal of S, P spans the columns of S G for
    normal G ``[s, r]``. No matrix with columns in there is nearer to S than P P^T S, so S G G^+ is not. G G^+
    projects on r random directions of s and loses 1 - r / s on average; so does P, if singular values are equal.
    Further iterations never lose more.
    """
    sides = x._sides(shape[1:])
    if sides is None:
        return EXACT
    n, m, rank = sides
    if x.warm_start or num_members > 1:
        return Contraction(1.0)
    return Contraction(1 - rank / min(n, m), in_expectation=True)


@contraction.register
def _hierarchical(x: Hierarchical, shape: Sequence[int], num_members: int) -> Contraction:
    """That of ``inner``, then ``outer`` on means of an island, of which each member answers for its slice."""
    inner = contraction(x.inner, shape, x.island)
    if x.island == num_members:
        return inner
    outer = contraction(x.outer, (x._slice(prod(shape)),), x._num_islands(num_members))
    return inner.then(outer, x.island)


@contraction.register
def _ef21_plus(x: EF21Plus, shape: Sequence[int], num_members: int) -> Contraction:
    """That of ``inner``, as C(x) is a candidate."""
    return EXACT if x._goes_whole(prod(shape)) else contraction(x.inner, shape, num_members)
