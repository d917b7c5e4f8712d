"""Tests of the guest images: archives, packages, cache."""
