"""Weights that become zero, alone or in patterns."""
