def plan(args):
    """Say whether a training fits a GPU, before anything is loaded."""
