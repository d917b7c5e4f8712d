"""Runners for test suites that a user supplies by path. Nothing of them is part of the repository."""
