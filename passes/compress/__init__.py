"""Lossy passes: pruning and quantization arrive here. Nothing in it runs unless the user asks for it by name."""
