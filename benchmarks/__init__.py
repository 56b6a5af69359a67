"""Measurements: scripts to be run by hand, and the package `speed`."""
