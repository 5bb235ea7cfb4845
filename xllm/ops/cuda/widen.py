"""Numbers of 8 and 4 bits as float32, in registers, exactly.

A card converts integers at a fraction of the speed of its multiply-adds, so integers become floats by their bits: under
the exponent of 2**23 the lowest mantissa bits count ones, and subtracting 2**23 leaves the number.
"""

import triton
from triton import language as tl

EXPONENT = 0x4B000000  # of 2**23
TWO_23 = tl.constexpr(8388608.0)


@triton.jit
def widen_bytes(numbers):
    """int8 or float8_e4m3fn -> float32"""
    if numbers.dtype == tl.int8:
        # flipping the sign bit adds 128 to the byte
        bits = numbers.to(tl.uint8, bitcast=True).to(tl.int32) ^ 0x4B000080
        return bits.to(tl.float32, bitcast=True) - (TWO_23 + 128.0)
    else:
        return numbers.to(tl.float32)


@triton.jit
def widen_nibbles(words, zeros, PAIR: tl.constexpr, HALF: tl.constexpr, exponent):
    """(number - zero) * 16**PAIR -> float32, of the nibbles of int32 words that hold chunk 2 PAIR + HALF; zeros int32.

    Nibbles are taken where they lie, so that no shift is needed: what is four bits further up counts sixteen. `exponent`
    is EXPONENT, out of a kernel's argument: of "and" and "or" with two constants the assembler makes two instructions,
    with one constant a single one.
    """
    bits = ((words >> (16 * HALF)) & (15 << 4 * PAIR)) | exponent
    zero_bits = (zeros << 4 * PAIR) | exponent
    return bits.to(tl.float32, bitcast=True) - zero_bits.to(tl.float32, bitcast=True)


@triton.jit
def nibble_scale(scales, PAIR: tl.constexpr):
    """What `widen_nibbles` is to be multiplied by, out of scales with their zero points -> float32"""
    return (scales & ~15).to(tl.float32, bitcast=True) * (1.0 / 16**PAIR)
