"""How a worker is started and reached. Used on both sides; no torch."""
