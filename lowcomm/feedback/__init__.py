"""What becomes of the part that compression left out."""
