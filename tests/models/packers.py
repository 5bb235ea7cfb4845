"""AWQ and GPTQ packings and 8-bit floats by NumPy, number by number as their packers describe them: what our reading is
tested with. A weight is [N, K]; its integers are 0 to 15, with a scale and a zero point for each row and group.
"""

import numpy as np

AWQ_NIBBLES = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of a word holds output 8 * column + AWQ_NIBBLES[i]


def quantise(weight: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Asymmetric: (integers [N, K], float16 scales [N, G], zero points [N, G]) that use all of 0 to 15."""
    rows, columns = weight.shape
    grouped = weight.reshape(rows, columns // group, group)
    low, high = np.minimum(grouped.min(axis=2), 0), np.maximum(grouped.max(axis=2), 0)
    scales = ((high - low) / 15).astype(np.float16)
    zeros = np.clip(np.rint(-low / scales.astype(np.float64)), 0, 15).astype(np.int64)
    numbers = np.rint(grouped / scales.astype(np.float64)[:, :, None]).astype(np.int64) + zeros[:, :, None]
    return np.clip(numbers, 0, 15).reshape(rows, columns), scales, zeros


def dequantise(numbers: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    group = numbers.shape[1] // scales.shape[1]
    return (numbers - zeros.repeat(group, axis=1)) * scales.astype(np.float32).repeat(group, axis=1)


def pack_awq(numbers: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "qweight": _pack_columns(numbers.T, AWQ_NIBBLES),
        "qzeros": _pack_columns(zeros.T, AWQ_NIBBLES),
        "scales": np.ascontiguousarray(scales.T),
    }


def pack_gptq(
    numbers: np.ndarray, scales: np.ndarray, zeros: np.ndarray, version: int = 1, indices: bool = True
) -> dict[str, np.ndarray]:
    """Before version 2 every word of zero points is stored less a one in each nibble."""
    columns, in_order = numbers.shape[1], list(range(8))
    zero_words = _pack_columns(zeros.T, in_order).astype(np.int64)
    if version == 1:
        zero_words = (zero_words - 0x11111111 + 2**31) % 2**32 - 2**31
    parts = {
        "qweight": np.ascontiguousarray(_pack_columns(numbers, in_order).T),
        "qzeros": zero_words.astype(np.int32),
        "scales": np.ascontiguousarray(scales.T),
    }
    group = columns // scales.shape[1]
    return parts | ({"g_idx": np.arange(columns, dtype=np.int32) // group} if indices else {})


def _pack_columns(numbers: np.ndarray, nibbles: list[int]) -> np.ndarray:
    """[a, b] -> int32 [a, b / 8]"""
    packed = np.zeros((numbers.shape[0], numbers.shape[1] // 8), dtype=np.int64)
    for row in range(packed.shape[0]):
        for column in range(packed.shape[1]):
            for i, which in enumerate(nibbles):
                packed[row, column] |= int(numbers[row, 8 * column + which]) << (4 * i)
    return np.where(packed >= 2**31, packed - 2**32, packed).astype(np.int32)
