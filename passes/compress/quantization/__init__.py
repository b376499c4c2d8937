"""Post-training quantization: ranges, scales, rounding."""
