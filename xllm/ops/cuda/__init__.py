"""Operators for NVIDIA GPUs, in Triton; contracts stand at the references in `xllm.ops`.

Only modules here import Triton, which comes with PyTorch for CUDA. Activations have the dtype of the weights, bfloat16 or
float32, and every kernel takes both; sums are float32, and products of float32 are exact, not TF32. Triton's interpreter
(TRITON_INTERPRET=1) runs all of it without a card. `launch` says how kernels are started and how they overlap.
"""
