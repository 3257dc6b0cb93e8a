"""The story: each file is a stage that reads from top to bottom."""
