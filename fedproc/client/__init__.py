"""What a federated client does: plain functions that know torch and nothing of processes."""
