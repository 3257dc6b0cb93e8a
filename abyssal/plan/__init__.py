"""What a recipe needs on a machine, how long it takes and what it costs: arithmetic and simulation, without torch."""
