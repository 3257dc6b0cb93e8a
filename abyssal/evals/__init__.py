"""How good a checkpoint is: sampling held-out tasks, the statistics, and the page that shows them."""
