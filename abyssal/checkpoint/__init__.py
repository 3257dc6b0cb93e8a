"""A model on disk: the Hugging Face directory that everybody reads, and beside it what one's own run resumes from."""
