"""ids -> logits on one device. Knows no ranks, no engine and no files."""
