"""What a trained model is used with: asking it, talking to it, giving it away, looking for what a
machine lacks. The commands are in mtbi.py's table; the modules here do the work."""

import support  # noqa: F401  first: torch reads what it sets
