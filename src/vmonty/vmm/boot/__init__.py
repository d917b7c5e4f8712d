"""Loaders that put a guest into memory and say where it starts."""
