"""What is built on the five modules: reports, comparisons, plans, and the demo."""

import support  # noqa: F401  first: torch reads what it sets
