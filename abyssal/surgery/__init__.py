"""A model of one shape becomes one of another: GQA -> MLA, dense -> experts. Works on weights; trains nothing."""
