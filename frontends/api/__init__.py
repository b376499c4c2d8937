"""Paring: pares a network down, and compiles what is left."""
