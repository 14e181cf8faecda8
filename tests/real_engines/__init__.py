"""Gradient injection under real engines: several processes, gloo, DeepSpeed.

Marker `engines`; `.ci/engines` makes the environment and runs them.
"""
