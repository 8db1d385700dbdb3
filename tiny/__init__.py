"""The tiny world: a closed grammar, a speech synthesizer and two small checkpoints, so that everything runs offline on a CPU."""
