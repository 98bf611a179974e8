"""Random numbers by counter, Philox4x32-10: which bits belong to which element stands in fastprob/ops/_random.py."""

import triton
import triton.language as tl

from fastprob.kernels import _maths


@triton.jit
def words(group, seed, stream, draw):
    """The four words, uint32, of every group (int64) of four elements."""
    low, high = (group & 0xFFFFFFFF).to(tl.uint32), (group >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, high, zero + stream, zero + draw)


@triton.jit
def normals(of_radius, of_angle, dtype: tl.constexpr):
    """A pair of standard normal numbers of two words: R cos and R sin of an angle; see csrc/random.h, too."""
    u = ((of_radius >> 8) + 1).to(dtype) * 5.9604644775390625e-08  # 2^-24
    # the quadrant is in the two highest bits, and g how many quarter turns it is from its middle
    g = (of_angle << 2 ^ 0x80000000).to(tl.int32, bitcast=True).to(dtype) * 2.3283064365386963e-10  # 2^-32
    q = g * g
    if dtype == tl.float64:
        s = 0.00016044118478735982 + q * (-3.5988432352120853e-06 + q * (5.6921729219679268e-08 + q * -6.688e-10))
        s = g * (
            1.5707963267948966
            + q * (-0.6459640975062462 + q * (0.07969262624616704 + q * (-0.004681754135318688 + q * s)))
        )
        c = -2.5202042373060605e-05 + q * (4.7108747788181715e-07 + q * (-6.3866030837918522e-09 + q * 6.566e-11))
        c = 1 + q * (
            -1.2337005501361698
            + q * (0.253669507901048 + q * (-0.020863480763352961 + q * (0.00091926027483942658 + q * c)))
        )
    else:
        s = g * (1.570796322 + q * (-0.6459634786 + q * (0.07968022806 + q * -0.004602176989)))
        c = 1 + q * (-1.233700541 + q * (0.2536692039 + q * (-0.02086007132 + q * 0.0009036317031)))
    radius = tl.sqrt(-_maths.log_normal(u, False))
    radius = tl.where(of_angle >> 31 != 0, -radius, radius)
    odd = (of_angle >> 30 & 1) != 0  # a quadrant, in which cosine and sine change places
    s = tl.where(odd, -s, s)
    cosine = radius * (c - s)
    return tl.where(odd, -cosine, cosine), radius * (c + s)
