"""Measurements of time, memory and accuracy. Run one from the repository's root:
python -m benchmarks.NAME --help"""
