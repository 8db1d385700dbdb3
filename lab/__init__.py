"""What is built on the five modules: reports, comparisons, plans, and the demo."""
