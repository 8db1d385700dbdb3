"""What every module stands on: files and errors, options, run folders, checkpoints, processes."""
