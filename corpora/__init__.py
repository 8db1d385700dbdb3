"""From any corpus to DATA/manifest.jsonl, and word times for speech that has none."""
