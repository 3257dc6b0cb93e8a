"""One file a command that is no stage of the way. Each reads its own options and ends in an exit status or an error."""
