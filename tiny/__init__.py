"""The tiny world: a closed grammar, a speech synthesizer and two small checkpoints.

With them everything runs offline on a CPU.
"""
