"""Driving the steps: run, next, compare, sweep, Slurm."""
