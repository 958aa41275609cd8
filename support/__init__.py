"""What any training script needs."""
